"""A memory is fitted where it helps: on validation examples, case by case."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest

from gemst.config import Config
from gemst.evaluation.protocols import met_items
from gemst.memory.choices import choices
from gemst.memory.evidence import ALONE
from gemst.tuning.remember import remember
from tests.ranking.tiny import make_tuned, random_ids

USERS, N = 80, 21


def example(user: int, query: str | None, past: list[int], target: int) -> dict[str, object]:
    return {
        "user_id": f"u{user:02}", "task": "search" if query else "recommendation", "query": query,
        "history": [f"i{item}" for item in past], "targets": [f"i{target}"],
    }  # fmt: skip


def tables(knows: bool) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Train and valid: where the log `knows`, "comedy" and "old film" have an item each, and i2 follows i1."""
    rng = np.random.default_rng(0)
    train, valid = [], []
    for user in range(USERS):
        query, own = ("comedy", 3) if user % 2 else ("old film", 4)
        asked = own if knows else int(rng.integers(N))
        train += [example(user, None, [], 1), example(user, None, [1], 2), example(user, query, [1, 2], asked)]
        wanted = own if rng.random() < 0.9 else int(rng.integers(N))
        if not knows:
            wanted = int(rng.integers(N))
        valid += [example(user, query, [], wanted), example(user, None, [1], int(rng.integers(N)))]
    schema = {"user_id": pl.String, "task": pl.String, "query": pl.String, "history": pl.List(pl.String)}
    return tuple(pl.DataFrame(rows, schema=schema | {"targets": pl.List(pl.String)}) for rows in (train, valid))  # type: ignore[return-value]


def configured(**tuning: object) -> Config:
    return Config.model_validate({"evaluation": {"exclude_seen": False}, "tuning": tuning, "ranking": {"beams": 5}})


@pytest.mark.parametrize("sizes", [(23,), (3, 9)])
def test_clicks_that_tell_the_target_are_weighed(sizes: tuple[int, ...]) -> None:
    tuned = make_tuned("llama", random_ids(N, sizes))
    memory = remember(tuned, *tables(knows=True), configured())
    by_case = {fit.case: fit for fit in memory.fits}
    assert set(by_case) == {"recommendation", "search"}
    assert by_case["search"].examples == USERS
    assert by_case["search"].after > 0.85 > 0.5 > by_case["search"].before
    model, clicked, rate, *_ = by_case["search"].weights
    assert 0.3 * clicked + rate > 0.6  # log(1 + 1000 * 40 / 45) is near 7: e to the power of 5 against other items
    assert model < 0.9


def test_a_log_that_tells_nothing_leaves_the_model_alone_or_better() -> None:
    tuned = make_tuned("llama", random_ids(N, (23,)))
    memory = remember(tuned, *tables(knows=False), configured())
    for fit in memory.fits:
        assert fit.after >= fit.before
        if fit.after == fit.before:
            assert fit.weights == ALONE


def test_a_single_task_is_fitted_alone_and_few_examples_are_not() -> None:
    tuned = make_tuned("llama", random_ids(N, (23,)))
    train, valid = tables(knows=True)
    memory = remember(tuned, train, valid, configured(tasks="search"))
    assert [fit.case for fit in memory.fits] == ["search"]
    few = valid.filter(pl.col("user_id") < "u12")
    memory = remember(tuned, train, few, configured())
    assert {fit.weights for fit in memory.fits} == {ALONE}
    assert all(fit.after == fit.before for fit in memory.fits)
    assert memory.mixture(tuned.ids, few).model.tolist() == [ALONE[0]] * len(few)


def test_what_was_seen_is_no_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the target itself was met before: then nothing is left out."""
    offered: list[pl.DataFrame] = []

    def watched(memory: object, catalogue: object, examples: object, candidates: pl.DataFrame, evidence: object) -> Any:
        offered.append(candidates)
        return choices(memory, catalogue, examples, candidates, evidence)  # type: ignore[arg-type]

    monkeypatch.setattr("gemst.memory.choices.choices", watched)
    tuned = make_tuned("llama", random_ids(N, (23,)))
    train, valid = tables(knows=True)
    met = met_items(valid, [train])
    targets = valid.with_row_index("row").select("row", item_id=pl.col("targets").list.first())
    again = targets.join(met, on=["row", "item_id"], how="semi")["row"]
    for exclude in (True, False):
        remember(tuned, train, valid, Config.model_validate({"evaluation": {"exclude_seen": exclude}}))
        kept = offered[-1].filter(~pl.col("row").is_in(again.implode()))
        assert len(kept.join(met, on=["row", "item_id"], how="semi")) == 0 or not exclude
        assert len(offered[-1].join(met, on=["row", "item_id"], how="semi")) > 0
    assert len(kept.join(met, on=["row", "item_id"], how="semi")) > 0

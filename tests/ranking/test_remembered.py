"""Rankings with a memory: the mixture's order for atomic and semantic IDs, in `rank` and in `score`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from gemst import memory
from gemst.config import Ranking
from gemst.memory import Memory
from gemst.memory.evidence import Fit
from gemst.ranking import rank, score
from gemst.ranking.remembered import listed
from tests.ranking.test_ranker import assert_scores, expected, lists
from tests.ranking.tiny import brute_force, examples, make_tuned, random_ids

WEIGHTS = {
    "recommendation": (0.6, 0.0, 0.0, 0.7, 0.3),
    "search": (0.5, 2.0, 0.4, 0.6, -0.1),
    "new query": (0.9, 0.0, 0.0, 0.2, 0.0),
}


def fits(weights: dict[str, tuple[float, ...]]) -> list[Fit]:
    return [Fit(case, 9, 0.1, 0.2, found) for case, found in weights.items()]


def counted(ids: object) -> Memory:
    """Of a random log that asks for two of the three queries."""
    rng = np.random.default_rng(3)
    past = [[f"i{item}" for item in rng.integers(0, 21, 3)] for _ in range(40)]
    train = pl.DataFrame(
        {
            "user_id": [f"u{n // 4}" for n in range(40)],
            "task": ["search" if n % 2 else "recommendation" for n in range(40)],
            "query": [("comedy", "OLD film")[n // 2 % 2] if n % 2 else None for n in range(40)],
            "history": past,
            "targets": [[f"i{item}"] for item in rng.integers(0, 21, 40)],
        }
    )
    return memory.build(ids, memory.train_events(train)).fitted(fits(WEIGHTS))  # type: ignore[arg-type]


@pytest.mark.parametrize("sizes", [(23,), (3, 9), (3, 4, 4)])
def test_the_order_is_that_of_the_mixture(family: str, sizes: tuple[int, ...]) -> None:
    ids = random_ids(21, sizes)
    tuned = replace(make_tuned(family, ids), memory=counted(ids))
    asked = examples(ids, 7)
    seen = pl.DataFrame({"row": [0, 0, 3], "item_id": ["i3", "i5", "i8"]}, schema_overrides={"row": pl.UInt32})
    made = counted(ids).mixture(ids, asked)
    mixed = made.model[:, None] * brute_force(tuned, asked) + made.popular[:, None] * made.prior + made.added.toarray()
    ranked = rank(tuned, asked, 10, Ranking(beams=64, batch_size=3))
    assert_scores(ranked, mixed)
    assert lists(ranked, 7) == expected(mixed, 10)
    assert ranked.schema == {"row": pl.UInt32, "item_id": pl.String, "rank": pl.UInt16, "score": pl.Float32}
    scored = score(tuned, asked, pl.Series([ids.item_id] * 7), Ranking(batch_size=2))
    assert_scores(scored, mixed)
    without = mixed.copy()
    without[[0, 0, 3], [3, 5, 8]] = -np.inf
    assert lists(rank(tuned, asked, 21, Ranking(beams=64), seen), 7) == expected(without, 21)


@pytest.mark.parametrize("sizes", [(23,), (3, 9)])
def test_ranking_memory_false_is_the_model_alone(sizes: tuple[int, ...]) -> None:
    ids = random_ids(21, sizes)
    plain = make_tuned("llama", ids)
    tuned, asked = replace(plain, memory=counted(ids)), examples(ids, 5)
    alone = Ranking(memory=False)
    assert_frame_equal(rank(tuned, asked, 9, alone), rank(plain, asked, 9, alone))
    candidates = pl.Series([ids.item_id[:6]] * 5)
    assert_frame_equal(score(tuned, asked, candidates, alone), score(plain, asked, candidates, alone))
    assert not rank(tuned, asked, 9, Ranking()).equals(rank(plain, asked, 9, Ranking()))


def test_a_memory_brings_up_what_too_few_beams_miss() -> None:
    ids = random_ids(21, (3, 9))
    plain = make_tuned("llama", ids)
    asked = examples(ids, 8)
    made = counted(ids).fitted(fits(dict.fromkeys(WEIGHTS, (0.01, 5.0, 1.0, 5.0, 0.0))))
    found = lists(rank(replace(plain, memory=made), asked, 1, Ranking(beams=1)), 8)
    dense = made.mixture(ids, asked).added.toarray()
    known = np.flatnonzero(dense.any(1))
    assert len(known) > 4
    assert all(dense[row, int(found[row][0][1:])] == dense[row].max() for row in known)


def test_retired_items_are_not_remembered() -> None:
    ids = random_ids(21, (3, 9))
    for one in (ids, random_ids(21, (23,))):
        tuned = replace(make_tuned("llama", one), memory=counted(one)).only(pl.Series(one.item_id[:10]))
        assert set(rank(tuned, examples(one, 6), 21, Ranking())["item_id"]) <= set(one.item_id[:10])


def test_lists_hold_every_example_and_no_item_twice() -> None:
    first = pl.DataFrame({"row": [0, 2], "item_id": ["a", "b"]})
    second = pl.DataFrame({"row": [2, 2], "item_id": ["b", "c"]})
    assert listed(4, first, second).to_list() == [["a"], [], ["b", "c"], []]

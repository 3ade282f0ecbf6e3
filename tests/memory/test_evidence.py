"""What a memory counts, what it says of an item, and that a folder gives it back."""

from __future__ import annotations

import shutil
from math import log1p
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from scipy import sparse

from gemst import memory
from gemst.errors import GemstError
from gemst.memory.evidence import ALONE, Fit, at_cells
from tests.ranking.tiny import make_ids


def fits(**weights: tuple[float, ...]) -> list[Fit]:
    return [Fit(case, 9, 0.1, 0.2, found) for case, found in weights.items()]


IDS = make_ids(np.arange(5)[:, None], (5,))


def train() -> pl.DataFrame:
    """i0 and i1 go together; i2 is asked for by "Rock ", i0 by both spellings of it; i4 is never met."""
    lines = [
        ("u0", None, [], "i0"), ("u0", None, ["i0"], "i1"), ("u0", "rock", ["i0", "i1"], "i0"),
        ("u1", None, [], "i0"), ("u1", None, ["i0"], "i1"), ("u1", "Rock ", ["i0", "i1"], "i2"),
        ("u2", "ROCK", [], "i0"), ("u2", "jazz", ["i0"], "i3"),
    ]  # fmt: skip
    return pl.DataFrame(
        [(user, "search" if query else "recommendation", query, past, [item]) for user, query, past, item in lines],
        schema={
            "user_id": pl.String, "task": pl.String, "query": pl.String, "history": pl.List(pl.String),
            "targets": pl.List(pl.String),
        },
        orient="row",
    )  # fmt: skip


def asked(*examples: tuple[list[str], str | None]) -> pl.DataFrame:
    return pl.DataFrame(examples, schema={"history": pl.List(pl.String), "query": pl.String}, orient="row")


def test_evidence_is_what_the_log_counts() -> None:
    made = memory.build(IDS, memory.train_events(train()))
    clicked, rate, similar = (
        part.toarray()
        for part in made.evidence(IDS, asked(([], " rock"), (["i0"], None), (["i9", "i1", "i3"], "folk")))
    )
    assert clicked.tolist() == [[1, 0, 1, 0, 0], [0] * 5, [0] * 5]
    events = [4, 2, 1, 1, 0]
    assert made.events.tolist() == events
    assert rate[0] == pytest.approx([log1p(1000 * 2 / 9), 0, log1p(1000 / 6), 0, 0], rel=1e-6)
    assert not rate[1:].any()
    cosine = 2 / np.sqrt(3 * 2)  # i0 was taken by three users, i1 by two of them
    assert similar[0].tolist() == [0] * 5
    assert similar[1][:2] == pytest.approx([log1p(100), log1p(100 * cosine)], rel=1e-6)
    assert similar[2][1] == pytest.approx(log1p(100 * 0.7), rel=1e-6)  # itself, one event old
    assert similar[2][4] == 0
    assert made.cases(asked(([], "rock"), ([], None), ([], "folk"))).tolist() == [1, 0, 2]


def test_events_of_long_ago_say_nothing() -> None:
    made = memory.build(IDS, memory.train_events(train()))
    long, short = asked((["i4"] * 30 + ["i0"] * 19, None), (["i4"] + ["i0"] * 19, None)), asked((["i0"] * 19, None))
    found = made.evidence(IDS, long)[2].toarray()
    assert np.array_equal(found[0], found[1])
    assert found[0][4] == pytest.approx(log1p(100 * 0.7**19), rel=1e-4)
    assert not made.evidence(IDS, short)[2].toarray()[0][4]


def test_the_bonus_is_the_weighed_sum_of_a_cases_evidence() -> None:
    weighed = fits(recommendation=(0.5, 9.0, 9.0, 0.25, 0.4), search=(0.8, 2.0, -0.1, 0.3, 0.0))
    made = memory.build(IDS, memory.train_events(train())).fitted(weighed)
    examples = asked((["i0"], "rock"), (["i0"], None), (["i0"], "folk"))
    clicked, rate, similar = (part.toarray() for part in made.evidence(IDS, examples))
    made_of = made.mixture(IDS, examples)
    assert made_of.model == pytest.approx([0.8, 0.5, 1.0])
    assert made_of.popular == pytest.approx([0.0, 0.4, 0.0])
    assert made_of.prior == pytest.approx(np.log([5, 3, 2, 2, 1]))
    found = made_of.added.toarray()
    assert found[0] == pytest.approx(2 * clicked[0] - 0.1 * rate[0] + 0.3 * similar[0])
    assert found[1] == pytest.approx(0.25 * similar[1])
    assert not found[2].any()  # no weights for new queries: the model alone
    everywhere = np.divmod(np.arange(15), 5)
    scores = np.linspace(-9, -1, 15, dtype=np.float32)
    whole = made_of.model[:, None] * scores.reshape(3, 5) + made_of.popular[:, None] * made_of.prior + found
    assert made_of.cells(*everywhere, scores) == pytest.approx(whole.ravel(), rel=1e-6)


def test_cells_are_found_where_rows_are_empty() -> None:
    matrix = sparse.csr_array(np.array([[0, 0, 0], [1, 0, 2], [0, 0, 0]], np.float32))
    assert at_cells(matrix, np.array([0, 1, 1, 1, 2]), np.array([2, 2, 1, 0, 0])).tolist() == [0, 2, 0, 1, 0]
    assert at_cells(matrix[:1], np.array([0]), np.array([0])).tolist() == [0]


def test_a_folder_gives_a_memory_back_and_new_items_have_no_counts(tmp_path: Path) -> None:
    made = memory.build(IDS, memory.train_events(train())).fitted(fits(search=(0.8, 2.0, -0.1, 0.3, 0.2)))
    made.save(tmp_path / "memory", IDS)
    examples = asked((["i0"], "jazz"), (["i1"], "rock"))
    again = memory.load(tmp_path / "memory", IDS)
    assert again.fits == made.fits
    assert (again.mixture(IDS, examples).added != made.mixture(IDS, examples).added).nnz == 0
    (tmp_path / "memory" / "similar.parquet").rename(tmp_path / "similar.parquet")
    with pytest.raises(GemstError, match=r"similar\.parquet"):
        memory.load(tmp_path / "memory", IDS)
    (tmp_path / "similar.parquet").rename(tmp_path / "memory" / "similar.parquet")
    (tmp_path / "memory" / "clicks.parquet").write_bytes(b"PAR1")
    with pytest.raises(GemstError, match=r"clicks\.parquet cannot be read"):
        memory.load(tmp_path / "memory", IDS)
    shutil.rmtree(tmp_path / "memory")
    made.save(tmp_path / "memory", IDS)
    with pytest.raises(GemstError, match="of other items than the model's item IDs"):
        memory.load(tmp_path / "memory", make_ids(np.arange(3)[:, None], (3,)))
    more = make_ids(np.arange(7)[:, None], (7,))
    grown = memory.load(tmp_path / "memory", more)
    found = grown.mixture(more, examples)
    assert np.array_equal(found.added.toarray()[:, :5], made.mixture(IDS, examples).added.toarray())
    assert not found.added.toarray()[:, 5:].any()
    assert found.prior.tolist() == [*made.prior.tolist(), 0, 0]


@pytest.mark.parametrize("column", ["query", "history"])
def test_a_log_without_searches_or_histories_has_less_to_say(column: str) -> None:
    bare = train().with_columns(pl.lit(None if column == "query" else []).cast(train().schema[column]).alias(column))
    made = memory.build(IDS, memory.train_events(bare))
    clicked, _, similar = made.evidence(IDS, asked((["i0"], "rock"), ([], None)))
    assert (clicked.nnz == 0) == (column == "query")
    assert similar.nnz > 0


def test_without_weights_nothing_is_added() -> None:
    mixture = memory.build(IDS, memory.train_events(train())).mixture(IDS, asked((["i0"], "rock"), ([], None)))
    assert mixture.model.tolist() == [ALONE[0]] * 2
    assert not mixture.popular.any()
    assert not mixture.added.toarray().any()

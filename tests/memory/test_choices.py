"""The candidates a fit sees, with their evidence, their example's case and what was taken."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from scipy import sparse

from gemst import memory
from gemst.memory.choices import best, choices
from tests.memory.test_evidence import IDS, train


def test_candidates_are_told_apart_by_case_and_by_what_was_taken() -> None:
    made = memory.build(IDS, memory.train_events(train()))
    examples = pl.DataFrame(
        {
            "query": ["rock", None, "folk"],
            "history": [[], ["i0"], ["i0"]],
            "targets": [["i2", "i3"], ["i1"], ["i4"]],
        },
        schema_overrides={"history": pl.List(pl.String)},
    )
    candidates = pl.DataFrame({"row": [0, 0, 1, 1, 2], "item_id": ["i0", "i2", "i1", "i3", "i0"]})
    chosen = choices(made, IDS, examples, candidates.cast({"row": pl.UInt32}), made.evidence(IDS, examples))
    assert chosen.row.tolist() == [0, 0, 1, 1, 2]
    assert chosen.target.tolist() == [False, True, True, False, False]
    assert chosen.case.tolist() == [1, 0, 2]
    clicked, rate, similar = (part.toarray() for part in made.evidence(IDS, examples))
    expected = [[kind[row, item] for kind in (clicked, rate, similar)] for row, item in ((0, 0), (0, 2), (1, 1))]
    assert chosen.evidence[:3, :3] == pytest.approx(np.array(expected))
    assert chosen.evidence[:, 3] == pytest.approx(np.log1p([4, 1, 2, 1, 4]), rel=1e-6)
    mine, relevant = chosen.of(1)
    assert mine.tolist() == [True, True, False, False, False]
    assert relevant.rows() == [(0, "i2"), (0, "i3")]  # what is no candidate counts for NDCG all the same


def test_a_retired_item_takes_no_place_among_the_best() -> None:
    evidence = sparse.csr_array(np.array([[3, 2, 1, 0], [0, 0, 5, 4]], np.float32))
    names, seen = pl.Series(["a", "b", "c", "d"]), pl.DataFrame({"row": [1], "item_id": ["c"]})
    assert best(names, evidence, 2, None).rows() == [(0, "a"), (0, "b"), (1, "c"), (1, "d")]
    assert best(names, evidence, 2, seen, np.array([False, True, True, True])).rows() == [(0, "b"), (0, "c"), (1, "d")]

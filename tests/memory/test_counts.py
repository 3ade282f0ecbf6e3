"""Counting a log; the rankers made of the counts are in tests/evaluation/references."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from gemst.memory.counts import clicks_by_query, history_matrix, rows_of, similar_items


def test_one_query_in_any_spelling_is_counted_once() -> None:
    events = pl.DataFrame({"query": ["Rock", " rock ", None, "jazz", "ROCK"], "column": [2, 2, 0, 1, 0]})
    queries, clicks = clicks_by_query(events, 4)
    assert queries.rows() == [("jazz", 0), ("rock", 1)]
    assert clicks.toarray().tolist() == [[0, 1, 0, 0], [1, 0, 2, 0]]
    asked = pl.DataFrame({"query": ["rOCk ", None, "folk", "jazz"]})
    assert rows_of(queries, asked).to_list() == [1, None, None, 0]


def test_a_log_without_queries_has_no_rows() -> None:
    events = pl.DataFrame({"query": [None], "column": [0]}, schema={"query": pl.String, "column": pl.UInt32})
    queries, clicks = clicks_by_query(events, 3)
    assert clicks.shape == (0, 3)
    assert rows_of(queries, pl.DataFrame({"query": ["a"]})).to_list() == [None]


def test_the_newest_event_weighs_one_and_unknown_items_keep_their_age() -> None:
    at, lengths = np.array([0, 1, 0, 2, -1]), np.array([3, 0, 2])
    found = history_matrix(at, lengths, 3, 0.5).toarray()
    assert found.tolist() == [[1.25, 0.5, 0], [0, 0, 0], [0, 0, 0.5]]


def test_similarity_is_the_cosine_of_two_items_users() -> None:
    pairs = [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("b", 1), ("c", 1), ("c", 2)]
    events = pl.DataFrame(pairs, schema=["user_id", "column"], orient="row")
    found = similar_items(events, 4, 5).toarray()
    assert found[0] == pytest.approx([0, 2 / np.sqrt(2 * 3), 0, 0], rel=1e-6)
    assert found[2] == pytest.approx([0, 1 / np.sqrt(3), 0, 0], rel=1e-6)
    assert not found[3].any()
    assert similar_items(events, 4, 1).toarray()[1] == pytest.approx([2 / np.sqrt(6), 0, 0, 0], rel=1e-6)

"""Co-behaviour vectors: items in the same company are near, items without any are zero and guessed from text."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from gemst.item_ids.behaviour import behaviour_vectors, from_text, query_vectors


def examples(rows: list[tuple[str, str | None, str]]) -> pl.DataFrame:
    return pl.DataFrame(
        {"user_id": [row[0] for row in rows], "query": [row[1] for row in rows], "targets": [[row[2]] for row in rows]},
        schema_overrides={"query": pl.String},
    )


ITEMS = pl.DataFrame({"item_id": [*"abcdxyz", "unmet"]})


def test_items_clicked_in_a_row_by_the_same_users_are_near() -> None:
    rows = [(f"u{n}", None, item) for n in range(4) for item in "abcd"]
    rows += [(f"v{n}", None, item) for n in range(4) for item in "xyz"]
    vectors, known = behaviour_vectors(ITEMS, examples(rows), 2)
    cosine = vectors @ vectors.T
    assert cosine[0, 1] > 0.9
    assert cosine[4, 5] > 0.9
    assert abs(cosine[0, 4]) < 0.1
    assert known.tolist() == [True] * 7 + [False]
    assert not vectors[7].any()


def test_items_clicked_for_the_same_query_are_near_though_no_user_met_both() -> None:
    rows = [(f"u{item}", "war" if item in "abcd" else "love", item) for item in "abcdxyz"]
    vectors, _ = behaviour_vectors(ITEMS, examples(rows), 4)
    cosine = vectors @ vectors.T
    assert cosine[0, 1] > 0.9
    assert abs(cosine[0, 4]) < 0.1


def test_the_last_event_of_a_user_is_no_company_of_the_next_users_first() -> None:
    vectors, known = behaviour_vectors(ITEMS, examples([("u", None, "a"), ("v", None, "b")]), 4)
    assert not known.any()
    assert not vectors.any()


def test_equal_logs_give_equal_vectors() -> None:
    rng = np.random.default_rng(0)
    rows = [(f"u{n // 9}", None, "abcdxyz"[rng.integers(7)]) for n in range(300)]
    assert np.array_equal(*(behaviour_vectors(ITEMS, examples(rows), 4)[0] for _ in range(2)))


def test_behaviour_of_an_unmet_item_is_guessed_from_its_text() -> None:
    rng = np.random.default_rng(0)
    text, turn = rng.standard_normal((200, 6)).astype(np.float32), rng.standard_normal((6, 3)).astype(np.float32)
    known = np.arange(200) < 190
    behaviour = (text @ turn) * known[:, None]
    guessed = text[~known] @ from_text(text, behaviour, known)
    np.testing.assert_allclose(guessed, text[~known] @ turn, atol=0.2)


def test_items_clicked_for_the_same_query_have_like_query_vectors_as_long_as_their_share_of_it() -> None:
    asked = {"a": "war", "b": "war", "x": "love", "y": None}
    rows = [(f"u{n}{item}", query, item) for n in range(20) for item, query in asked.items()]
    rows += [(f"v{n}", None, "b") for n in range(60)]  # b is mostly met without a query
    vectors = query_vectors(ITEMS, examples(rows), 1)
    assert vectors.shape == (8, 1)
    a, b, x, y = (abs(float(vectors["abcdxyz".index(item), 0])) for item in "abxy")
    np.testing.assert_allclose([a, b], [np.sqrt(20 / 25), np.sqrt(20 / 85)], rtol=1e-5)  # clicks / (events + prior)
    assert x < 1e-6
    assert y == 0


@pytest.mark.parametrize("queries", [[None, None], ["war", "war"]])
def test_without_queries_that_differ_there_are_no_query_vectors(queries) -> None:
    rows = [("u", queries[0], "a"), ("v", queries[1], "b")]
    assert query_vectors(ITEMS, examples(rows), 4).shape == (8, 0)
    assert query_vectors(ITEMS, examples([("u", "war", "a"), ("v", "love", "b")]), 0).shape == (8, 0)

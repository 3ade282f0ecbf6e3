from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from gemst.data.bm25 import hardest, index, postings, words
from tests.data.conftest import items_table


def test_words_of_several_scripts():
    frame = pl.DataFrame({"text": ["Red-tea, 2nd!", "红茶tea", "<item_0>"]})
    assert frame.select(words(pl.col("text"))).to_series().to_list() == [
        ["red", "tea", "2nd"],
        ["红", "茶", "tea"],
        ["item_0"],
    ]


def test_weights_equal_those_of_an_independent_library():
    bm25s = pytest.importorskip("bm25s")
    rng = np.random.default_rng(1)
    vocabulary = [f"w{n}" for n in range(12)]
    texts = [" ".join(rng.choice(vocabulary, rng.integers(1, 9))) for _ in range(30)]
    ids = [f"i{n:02}" for n in range(30)]
    mine = postings(items_table(*ids, title=texts, categories=[[]] * 30), pl.Series(ids))
    theirs = bm25s.BM25(method="lucene", k1=1.2, b=0.75)
    theirs.index([text.split() for text in texts], show_progress=False)
    for word in vocabulary:
        scores = np.zeros(30)
        rows = mine.filter(pl.col("word") == word)
        scores[rows["item"].to_numpy()] = rows["weight"].to_numpy() / 1e6
        expected = theirs.get_scores([word])
        # The library's Lucene variant leaves out the constant factor k1 + 1.
        np.testing.assert_allclose(scores, expected * 2.2, atol=2e-5)


def test_ties_are_settled_the_same_way_whatever_the_order():
    ids = [f"i{n}" for n in range(40)]
    items = items_table(*ids, title=["drama"] * 40, categories=[[]] * 40)
    queries = pl.DataFrame({"row": [0, 1], "query": ["drama", "drama"]}, schema={"row": pl.UInt32, "query": pl.String})
    barred = pl.DataFrame({"row": [1], "item": [5]}, schema={"row": pl.UInt32, "item": pl.UInt32})
    first = hardest(queries, index(items, pl.Series(ids)), barred, 10)
    assert first.equals(hardest(queries, index(items.reverse(), pl.Series(ids)), barred, 10))
    assert first.group_by("row").len()["len"].to_list() == [10, 10]
    assert 5 not in first.filter(pl.col("row") == 1)["item"]


def test_rows_of_one_query_each_get_past_what_is_barred_to_them():
    """The best item of each row comes right after those barred to it, however many those are."""
    ids = [f"i{n:02}" for n in range(30)]
    table = index(items_table(*ids, title=["drama"] * 30, categories=[[]] * 30), pl.Series(ids))
    cells = {"row": pl.UInt32, "item": pl.UInt32}
    asked = pl.DataFrame({"row": [0, 1, 2], "query": ["drama"] * 3}, schema={"row": pl.UInt32, "query": pl.String})
    order = hardest(asked.head(1), table, pl.DataFrame(schema=cells), 30)["item"].to_list()
    barred = pl.DataFrame({"row": [0] * 29 + [1] * 5 + [2], "item": order[:29] + order[:5] + order[3:4]}, schema=cells)
    found = hardest(asked, table, barred, 4)
    by_row = {row: found.filter(pl.col("row") == row)["item"].to_list() for row in range(3)}
    assert by_row == {0: order[29:], 1: order[5:9], 2: [*order[:3], order[4]]}


def test_a_query_without_words_of_the_catalogue_finds_nothing():
    table = index(items_table("a", title=["tea"], categories=[[]]), pl.Series(["a"]))
    cells = {"row": pl.UInt32, "item": pl.UInt32}
    asked = pl.DataFrame({"row": [0, 1], "query": ["?", "shoe"]}, schema={"row": pl.UInt32, "query": pl.String})
    assert hardest(asked, table, pl.DataFrame(schema=cells), 3).is_empty()

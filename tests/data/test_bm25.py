from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from gemst.data.bm25 import hardest, postings, words
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
    first = hardest(queries, items, pl.Series(ids), barred, 10)
    assert first.equals(hardest(queries, items.reverse(), pl.Series(ids), barred, 10))
    assert first.group_by("row").len()["len"].to_list() == [10, 10]
    assert 5 not in first.filter(pl.col("row") == 1)["item"]

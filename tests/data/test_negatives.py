from __future__ import annotations

import numpy as np
import polars as pl

from gemst.config import Data
from gemst.data import examples
from gemst.data.hashing import stable_hash
from gemst.data.negatives import uniform
from tests.data.conftest import events_table, items_table

CELLS = {"row": pl.UInt32, "item": pl.UInt32}


def keys(rows: int) -> np.ndarray:
    return stable_hash(pl.Series([str(n) for n in range(rows)]))


def test_uniform_over_what_is_not_barred():
    rows, items, wanted = 4000, 20, 5
    barred = pl.DataFrame({"row": np.repeat(np.arange(rows), 2), "item": np.tile([3, 17], rows)}, schema=CELLS)
    drawn = uniform(keys(rows), barred, items, np.full(rows, wanted))
    assert drawn.group_by("row").len()["len"].unique().to_list() == [wanted]
    assert not drawn.is_duplicated().any()
    counts = np.bincount(drawn["item"].to_numpy(), minlength=items)
    assert counts[[3, 17]].sum() == 0
    expected = rows * wanted / (items - 2)
    assert np.abs(np.delete(counts, [3, 17]) - expected).max() < 5 * expected**0.5


def test_rows_do_not_depend_on_each_other():
    alone = uniform(keys(3)[1:2], pl.DataFrame(schema=CELLS), 50, np.array([4]))
    among = uniform(keys(3), pl.DataFrame(schema=CELLS), 50, np.array([9, 4, 2]))
    assert among.filter(pl.col("row") == 1)["item"].to_list() == alone["item"].to_list()
    assert np.bincount(among["row"].to_numpy()).tolist() == [9, 4, 2]


def test_takes_all_there_is_when_it_is_too_little():
    barred = pl.DataFrame({"row": [0] * 7, "item": list(range(7))}, schema=CELLS)
    drawn = uniform(keys(2), barred, 10, np.array([5, 0]))
    assert drawn.rows() == [(0, 7), (0, 8), (0, 9)]


def test_bm25_negatives_share_words_with_the_query_first():
    titles = ["red tea", "red tea pot", "green tea", "red shoe", "blue hat", "white hat"]
    items = items_table(*"abcdef", title=titles, categories=[[]] * 6)
    events = events_table(("u", "f", 0, None), ("u", "e", 1, "hat"), ("u", "a", 2, "red tea"))
    splits = examples.build(items, events, Data(negatives="bm25", num_negatives=3), seed=0)
    (search,) = splits.test.filter(pl.col("task") == "search").to_dicts()
    assert search["negatives"][0] == "b"  # shares both words
    assert set(search["negatives"][1:]) == {"c", "d"}  # one word each; e and f share none, and were met

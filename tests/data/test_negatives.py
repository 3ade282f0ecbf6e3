from __future__ import annotations

import hashlib

import numpy as np
import polars as pl
import pytest

from gemst.config import Data
from gemst.data import blocks, examples
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


def test_an_item_met_outside_the_core_is_no_negative():
    """The 2-core drops the events with x and y, which ann met all the same."""
    items = items_table(*"abcxyz")
    rows = [("ann", item, at, query) for at, (item, query) in enumerate([("a", None), ("b", "q"), ("c", None)])]
    events = events_table(
        *rows, *(("bob", *row[1:]) for row in rows), ("ann", "x", 3, None), ("ann", "y", 4, "film")
    )  # fmt: skip
    for kind in ("uniform", "bm25"):
        splits = examples.build(items, events, Data(negatives=kind, num_negatives=6, core=2), seed=0)
        assert splits.counts["dropped"]["outside the 2-core"] == 2
        drawn = {row["user_id"]: set(row["negatives"]) for row in splits.test.to_dicts()}
        assert drawn == {"ann": {"z"}, "bob": {"x", "y", "z"}}


def log(light: int = 100, heavy: int = 250) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Users with a few events each, one with many, all searching with common words."""
    words = ["tea", "red", "green", "pot", "cup"]
    ids = [f"i{n}" for n in range(300)]
    titles = [f"{words[n % 5]} {words[n * n % 3]} {n % 17}" for n in range(300)]
    queries = [None, "tea", "red pot", "cup 3", "green tea", "nothing like it"]
    few = [(f"u{n}", ids[(n * 7 + k * k * 31) % 300], k, queries[(n + k) % 6]) for n in range(light) for k in range(6)]
    many = [("heavy", ids[n * 11 % 300], n, queries[n % 6]) for n in range(heavy)]
    return items_table(*ids, title=titles, categories=[[]] * 300), events_table(*few, *many)


# Made by the code that held all rows at once: the size of the blocks has no part in the negatives.
PINNED = {"uniform": "7cc08b4cbdc73779", "bm25": "ebe763c398d29696"}


@pytest.mark.parametrize("kind", PINNED)
@pytest.mark.parametrize("cells", [None, 1, 2000])
def test_negatives_are_the_same_for_ever(kind, cells, monkeypatch):
    if cells is not None:
        monkeypatch.setattr(blocks, "CELLS", cells)
    digest, rows = hashlib.sha256(), 0
    for split in ("leave-last-out", "global-time"):
        splits = examples.build(*log(), Data(negatives=kind, num_negatives=20, split=split), seed=5)
        for table in (splits.valid, splits.test):
            rows += table.height
            digest.update(repr(table["negatives"].to_list()).encode())
    assert (rows, digest.hexdigest()[:16]) == (374, PINNED[kind])


@pytest.mark.parametrize("kind", ["uniform", "bm25"])
@pytest.mark.parametrize("split", ["leave-last-out", "global-time"])
def test_intermediate_tables_are_bounded(kind, split, monkeypatch):
    """Neither the number of rows nor one user with a long history makes a table of more cells than allowed."""
    monkeypatch.setattr(blocks, "CELLS", 2000)
    sizes, join = [], pl.DataFrame.join

    def spied(left: pl.DataFrame, right: pl.DataFrame, **options: object) -> pl.DataFrame:
        joined = join(left, right, **options)
        if options.get("how") == "anti" and options.get("on") == ["row", "item"]:
            sizes.extend([left.height, right.height])
        return joined

    monkeypatch.setattr(pl.DataFrame, "join", spied)
    splits = examples.build(*log(), Data(negatives=kind, num_negatives=20, split=split), seed=5)
    assert splits.test["negatives"].list.len().min() == 20
    assert 500 < max(sizes) <= 2000

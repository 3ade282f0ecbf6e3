"""Slices say what is new about a query, an item and a history."""

from __future__ import annotations

import polars as pl

from gemst.evaluation.slices import slice_columns


def test_labels() -> None:
    lists = {"history": pl.List(pl.String), "targets": pl.List(pl.String), "query": pl.String}
    train = pl.DataFrame({"history": [["h"]], "targets": [["t"]], "query": ["Red Shoes"]}, schema=lists)
    test = pl.DataFrame(
        {
            "history": [["x"]] * 6,
            "targets": [["t"], ["h"], ["new"], ["new", "t"], [], ["new"]],
            "query": ["red shoes ", "blue", None, None, "Red Shoes", "red"],
        },
        schema=lists,
    )
    met = [(row, f"i{n}") for row, count in enumerate((0, 10, 11, 49, 200, 201)) for n in range(count)]
    met.append((3, "t"))
    past = pl.DataFrame(met, schema={"row": pl.UInt32, "item_id": pl.String}, orient="row")
    labels = slice_columns(test, train, past)
    assert labels["row"].to_list() == list(range(6))
    assert labels["query"].to_list() == ["seen 1-5", "unseen", None, None, "seen 1-5", "unseen"]
    assert labels["item"].to_list() == ["seen", "seen", "unseen", "seen", "unseen", "unseen"]
    assert labels["target"].to_list() == ["new", "new", "new", "again", "new", "new"]
    assert labels["history"].to_list() == ["0-10", "0-10", "11-50", "11-50", "51-200", "201+"]


def test_queries_are_told_apart_by_their_train_clicks() -> None:
    lists = {"history": pl.List(pl.String), "targets": pl.List(pl.String), "query": pl.String}
    clicks = {"a": 1, "b": 5, "c": 6, "d": 100, "e": 101}
    queries = [query.upper() if n % 2 else query for query, count in clicks.items() for n in range(count)]
    none: list[list[str]] = [[]] * len(queries)
    train = pl.DataFrame({"history": none, "targets": none, "query": queries}, schema=lists)
    test = pl.DataFrame({"history": [[]] * 6, "targets": [[]] * 6, "query": [*clicks, "f"]}, schema=lists)
    past = pl.DataFrame(schema={"row": pl.UInt32, "item_id": pl.String})
    found = slice_columns(test, train, past)["query"].to_list()
    assert found == ["seen 1-5", "seen 1-5", "seen 6-100", "seen 6-100", "seen 101+", "unseen"]


def test_train_without_queries_makes_every_query_new() -> None:
    lists = {"history": pl.List(pl.String), "targets": pl.List(pl.String), "query": pl.String}
    train = pl.DataFrame({"history": [["h"]], "targets": [["t"]], "query": [None]}, schema=lists)
    past = pl.DataFrame(schema={"row": pl.UInt32, "item_id": pl.String})
    assert slice_columns(train.with_columns(query=pl.lit("q")), train, past)["query"].to_list() == ["unseen"]

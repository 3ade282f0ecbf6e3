"""Queries for logs that have none: the category-query proxy of the product-search literature.

A fixed hash gives each event to one task, half to each; a search event's query is built from the item's categories.
Numbers made with such queries are to be called proxy numbers.
"""

from __future__ import annotations

import numpy as np
import polars as pl

from gemst.data.hashing import Hashes, mix, stable_hash
from gemst.data.rules import item_rules, judge
from gemst.data.sources.base import item_order
from gemst.data.tables import RECOMMENDATION, SEARCH


def event_hash(events: pl.DataFrame, salt: int = 0) -> Hashes:
    """A fixed hash of each event's user, item and time, uint64 (rows,)."""
    time = events["timestamp"].dt.epoch("ms").fill_null(0).to_numpy().astype(np.uint64)
    return mix(mix(stable_hash(events["user_id"], salt), stable_hash(events["item_id"])), time)


def one_each(catalogue: pl.DataFrame) -> pl.DataFrame:
    """One row per item_id, whatever the order of the rows: the one that `settle` and `validate` keep.

    Needs the columns item_id, title, text and categories; any others are text.
    """
    again = catalogue["item_id"].is_duplicated()
    if not again.any():
        return catalogue
    no_list = pl.lit([], dtype=pl.List(pl.String))
    rows = catalogue.filter(again).with_columns(pl.col("categories").fill_null(no_list))  # as `settle` has it
    others = [name for name in rows.columns if name not in ("item_id", "title", "text", "categories")]
    rows = rows.sort(*item_order(rows), *others, nulls_last=True)
    # As in `validate`: a bad row does not take the place of a good one.
    bad = judge(rows, item_rules()).is_not_null()
    chosen = rows.with_columns(bad.alias("_bad")).sort("_bad", maintain_order=True).drop("_bad")
    return pl.concat([catalogue.filter(~again), chosen.unique("item_id", keep="first", maintain_order=True)])


def split_tasks(events: pl.DataFrame, queries: pl.DataFrame) -> pl.DataFrame:
    """Add `task` and `query` to events: half are searches.

    `queries` has item_id, unique, and `choices`, the queries an item can be found by; hash picks one. An event whose
    item has no choice stays a recommendation.
    """
    hashes = event_hash(events)
    picked = pl.Series("_pick", (hashes >> np.uint64(1)) & np.uint64(0x7FFFFFFF)).cast(pl.Int64)
    searched = pl.Series("_search", hashes & np.uint64(1)).cast(pl.Boolean)
    choice = pl.col("choices").list.get(pl.col("_pick") % pl.col("choices").list.len(), null_on_oob=True)
    return (
        events.with_columns(picked, searched)
        .join(queries.select("item_id", "choices"), on="item_id", how="left", maintain_order="left")
        .with_columns(query=pl.when("_search").then(choice))
        .with_columns(task=pl.when(pl.col("query").is_null()).then(pl.lit(RECOMMENDATION)).otherwise(pl.lit(SEARCH)))
        .drop("_pick", "_search", "choices")
    )

"""The alignment task: from an item's title to its ID, mixed into the train examples.

Logs hold the titles of few items as queries, so by themselves they teach a model little about what an item is called.
An alignment row is a search like any other: nothing clicked so far, the title as the query, the item as the target. It
counts as search in batches, gradients and gates, because the model is asked the same thing: text in, ID out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from gemst.prompts import SEARCH

if TYPE_CHECKING:
    from gemst.item_ids import ItemIds

_LONGEST = 200  # characters of a title that are asked for


def with_alignment(train: pl.DataFrame, items: pl.DataFrame, ids: ItemIds, weight: float, seed: int) -> pl.DataFrame:
    """`train` followed by `weight` alignment rows for each of its rows, every active item as often as any other.

    Each row is a user of its own, so no layout takes two of them for one history. Deterministic for `seed`.
    """
    known = pl.DataFrame({"item_id": ids.item_id}).filter(pl.Series(ids.active))
    titles = known.join(items, on="item_id", how="inner", maintain_order="left").select("item_id", "title")
    count = round(weight * len(train))
    if count == 0 or titles.is_empty():
        return train
    rng = np.random.default_rng(seed)
    passes = [rng.permutation(len(titles)) for _ in range(-(-count // len(titles)))]
    chosen = titles[np.concatenate(passes)[:count]]
    empty = pl.lit([], dtype=pl.List(pl.String))
    anywhen = pl.lit(train["timestamp"][0]).cast(train.schema["timestamp"])
    rows = chosen.with_row_index("row").select(
        user_id="\0alignment " + pl.col("row").cast(pl.String),
        task=pl.lit(SEARCH),
        query=pl.col("title").str.slice(0, _LONGEST),
        history=empty,
        targets=pl.concat_list("item_id"),
        negatives=empty,
        timestamp=anywhen,
        clicked=anywhen,
    )
    return pl.concat([train, rows.select(train.columns)])

"""Parts of a test set that behave differently: known and new queries, new items, short and long histories."""

from __future__ import annotations

import polars as pl

SLICES = ("query", "item", "history")
_LENGTHS = (5, 10, 20)  # upper bounds of the history buckets


def slice_columns(examples: pl.DataFrame, train: pl.DataFrame) -> pl.DataFrame:
    """Labels of each example, one line per row of `examples`:

    row UInt32; query "seen" | "unseen" in train (letter case aside), null without a query; item "seen" when any
    target was met in train, as target or in a history, else "unseen"; history "0-5", "6-10", "11-20" or "21+" events.
    """
    queries = train.select(_key()).drop_nulls().unique().get_column("key").implode()
    met = [train.select(item_id=name).explode("item_id", empty_as_null=False).unique() for name in ("targets", "history")]
    met_items = pl.concat(met).drop_nulls().unique()
    rows = examples.with_row_index("row")
    found = rows.select("row", item_id="targets").explode("item_id", empty_as_null=False).join(met_items, on="item_id", how="semi")
    bounds = [0, *_LENGTHS]
    labels = [f"{low + (low > 0)}-{high}" for low, high in zip(bounds, _LENGTHS, strict=False)] + [f"{_LENGTHS[-1] + 1}+"]
    seen, unseen = pl.lit("seen"), pl.lit("unseen")
    return rows.select(
        "row",
        query=pl.when(_key().is_in(queries)).then(seen).when(pl.col("query").is_not_null()).then(unseen),
        item=pl.when(pl.col("row").is_in(found["row"].unique().implode())).then(seen).otherwise(unseen),
        history=pl.col("history").list.len().cut(_LENGTHS, labels=labels).cast(pl.String),
    )


def _key() -> pl.Expr:
    return pl.col("query").cast(pl.String).str.to_lowercase().str.strip_chars().alias("key")

"""Parts of a test set that behave differently: rare and new queries, new items, items taken again, short histories."""

from __future__ import annotations

import polars as pl

SLICES = ("query", "item", "target", "history")
_CLICKS = (5, 100)  # upper bounds of the buckets of seen queries
_LENGTHS = (10, 50, 200)  # of the history buckets


def slice_columns(examples: pl.DataFrame, train: pl.DataFrame, past: pl.DataFrame) -> pl.DataFrame:
    """Labels of each example, one line per row of `examples`:

    row UInt32; query "unseen" in train (letter case aside), or "seen 1-5", "seen 6-100" or "seen 101+": how many train
    clicks it has, null without a query; item "seen" when any target was met in train by anyone, as target or in a
    history, else "unseen"; target "again" when this user had met one, else "new"; history "0-10", "11-50", "51-200" or
    "201+": how many items the user has met. `past` (row, item_id) lists them (`protocols.met_items`); an example's own
    history is cut to the model's window and would say little.
    """
    clicks = train.select(_key()).drop_nulls().group_by("key").len("clicks")
    met = [
        train.select(item_id=name).explode("item_id", empty_as_null=False).unique() for name in ("targets", "history")
    ]
    met_items = pl.concat(met).drop_nulls().unique()
    rows = (
        examples.with_row_index("row")
        .with_columns(_key())
        .join(past.group_by("row").len("met"), on="row", how="left", maintain_order="left")
        .join(clicks, on="key", how="left", maintain_order="left")
    )
    asked = pl.concat_str(pl.lit("seen "), _bucket(pl.col("clicks"), 1, _CLICKS))
    targets = rows.select("row", item_id="targets").explode("item_id", empty_as_null=False)
    found = targets.join(met_items, on="item_id", how="semi")
    again = targets.join(past, on=["row", "item_id"], how="semi")
    seen, unseen = pl.lit("seen"), pl.lit("unseen")
    return rows.select(
        "row",
        query=pl.when(pl.col("query").is_not_null()).then(asked.fill_null(unseen)),
        item=pl.when(pl.col("row").is_in(found["row"].unique().implode())).then(seen).otherwise(unseen),
        target=pl.when(pl.col("row").is_in(again["row"].unique().implode()))
        .then(pl.lit("again"))
        .otherwise(pl.lit("new")),
        history=_bucket(pl.col("met").fill_null(0), 0, _LENGTHS),
    )


def _bucket(count: pl.Expr, least: int, bounds: tuple[int, ...]) -> pl.Expr:
    """Labels "least-bound", ..., "bound+1+" of whole numbers from `least` on."""
    lower = [least, *(bound + 1 for bound in bounds)]
    label = pl.lit(f"{lower[-1]}+")
    for low, high in reversed(list(zip(lower, bounds, strict=False))):
        label = pl.when(count <= high).then(pl.lit(f"{low}-{high}")).otherwise(label)
    return pl.when(count.is_not_null()).then(label)


def _key() -> pl.Expr:
    return pl.col("query").cast(pl.String).str.to_lowercase().str.strip_chars().alias("key")

"""Parts of a test set that behave differently: known and new queries, new items, items taken again, short histories."""

from __future__ import annotations

import polars as pl

SLICES = ("query", "item", "target", "history")
_LENGTHS = (10, 50, 200)  # upper bounds of the history buckets


def slice_columns(examples: pl.DataFrame, train: pl.DataFrame, past: pl.DataFrame) -> pl.DataFrame:
    """Labels of each example, one line per row of `examples`:

    row UInt32; query "seen" | "unseen" in train (letter case aside), null without a query; item "seen" when any
    target was met in train by anyone, as target or in a history, else "unseen"; target "again" when this user had met
    one, else "new"; history "0-10", "11-50", "51-200" or "201+": how
    many items the user has met. `past` (row, item_id) lists them (`protocols.met_items`); an example's own history is
    cut to the model's window and would say little.
    """
    queries = train.select(_key()).drop_nulls().unique().get_column("key").implode()
    met = [
        train.select(item_id=name).explode("item_id", empty_as_null=False).unique() for name in ("targets", "history")
    ]
    met_items = pl.concat(met).drop_nulls().unique()
    rows = examples.with_row_index("row").join(
        past.group_by("row").len("met"), on="row", how="left", maintain_order="left"
    )
    targets = rows.select("row", item_id="targets").explode("item_id", empty_as_null=False)
    found = targets.join(met_items, on="item_id", how="semi")
    again = targets.join(past, on=["row", "item_id"], how="semi")
    seen, unseen = pl.lit("seen"), pl.lit("unseen")
    return rows.select(
        "row",
        query=pl.when(_key().is_in(queries)).then(seen).when(pl.col("query").is_not_null()).then(unseen),
        item=pl.when(pl.col("row").is_in(found["row"].unique().implode())).then(seen).otherwise(unseen),
        target=pl.when(pl.col("row").is_in(again["row"].unique().implode()))
        .then(pl.lit("again"))
        .otherwise(pl.lit("new")),
        history=_bucket(pl.col("met").fill_null(0)),
    )


def _bucket(length: pl.Expr) -> pl.Expr:
    lower = [0, *(bound + 1 for bound in _LENGTHS)]
    label = pl.lit(f"{lower[-1]}+")
    for low, high in reversed(list(zip(lower, _LENGTHS, strict=False))):
        label = pl.when(length <= high).then(pl.lit(f"{low}-{high}")).otherwise(label)
    return label


def _key() -> pl.Expr:
    return pl.col("query").cast(pl.String).str.to_lowercase().str.strip_chars().alias("key")

"""The text of an item, as a text ranker reads it."""

from __future__ import annotations

import polars as pl


def documents(items: pl.DataFrame) -> pl.Series:
    """One text per item: title, categories, description, and the decade of a year the title ends with.

    "Toy Story (1995)" gets "1995 1990s 90s", so that a query for a decade can match.
    """
    year = pl.col("title").str.extract(r"\b((?:18|19|20)\d\d)\)?\s*$", 1)
    decade = pl.concat_str(
        year, year.str.slice(0, 3) + "0s", year.str.slice(2, 1) + "0s", separator=" ", ignore_nulls=False
    )
    parts = ["title", pl.col("categories").list.join(" "), "text", decade]
    return items.select(document=pl.concat_str(parts, separator=" ", ignore_nulls=True))["document"]

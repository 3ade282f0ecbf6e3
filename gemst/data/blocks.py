"""Work in pieces whose memory is bounded, however uneven the rows are."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import polars as pl
from numpy.typing import ArrayLike

CELLS = 1 << 20  # cells of intermediate tables at once: up to 300 bytes each; four times as many take longer


def blocks(sizes: ArrayLike) -> Iterator[slice]:
    """Consecutive slices of rows that have at most CELLS cells together; a row with more is a slice of its own.

    `sizes` (rows,) is each row's number of cells.
    """
    ends = np.cumsum(np.asarray(sizes, np.int64))
    start = 0
    while start < len(ends):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + CELLS, side="right")))
        yield slice(start, stop)
        start = stop


def spread(table: pl.DataFrame, values: pl.DataFrame) -> pl.DataFrame:
    """Each row of `table` beside each of rows begin .. begin + length - 1 of `values`, in that order.

    `begin` and `length` are columns of `table`, replaced by the columns of `values`.
    """
    places = table.with_columns(_place=pl.int_ranges("begin", pl.col("begin") + pl.col("length")))
    long = places.drop("begin", "length").filter(pl.col("_place").list.len() > 0).explode("_place", empty_as_null=True)
    return pl.concat([long.drop("_place"), values[long["_place"]]], how="horizontal")

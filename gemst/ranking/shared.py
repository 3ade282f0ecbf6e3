"""Ranking shared out over the processes of a run: each takes every n-th example, all get the whole table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import polars as pl

Beside = TypeVar("Beside")


def shared(
    rank: Callable[[pl.DataFrame, Beside], pl.DataFrame],
    examples: pl.DataFrame,
    beside: Beside,
    number: int,
    count: int,
    gathered: Callable[[pl.DataFrame], list[pl.DataFrame]],
) -> pl.DataFrame:
    """What `rank(examples, beside)` returns, made by `count` processes of which this is the one with `number`.

    `beside` goes with the examples: a Series with a value for each (candidates), or a frame whose `row` names them
    (seen items), or None. `gathered` returns every process's table on all of them.
    """
    part: Any = beside
    if isinstance(beside, pl.DataFrame):
        part = beside.filter(pl.col("row") % count == number).with_columns(pl.col("row") // count)
    elif isinstance(beside, pl.Series):
        part = beside[number::count]
    mine = rank(examples[number::count], part).with_columns(pl.col("row") * count + number)
    return pl.concat(gathered(mine)).sort("row", "rank")

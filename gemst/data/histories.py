"""Histories: which events a target may see, as slices of one sequence."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from gemst.data.log import Log, Rows


@dataclass(frozen=True)
class Histories:
    """The history of event e is `sequence[begin[e]:end[e]]`, positions in the log, oldest first."""

    sequence: Rows
    begin: Rows
    end: Rows

    def lengths(self) -> Rows:
        """Number of history events of each event, (events,)."""
        return self.end - self.begin

    def items(self, at: Rows, log: Log, longest: int) -> pl.Series:
        """History item ids of the events at positions `at`, the last `longest` of each: list[str] (len(at),)."""
        end = self.end[at]
        begin = np.maximum(self.begin[at], end - longest)
        return lists(begin, end, log.items.gather(log.item[self.sequence[_spread(begin, end)]]))


def histories(log: Log, allowed: NDArray[np.bool_], own_task: bool) -> Histories:
    """The allowed events strictly before each event's unit, of its user, and of its task alone when `own_task`.

    Strictly: an event at the very time of the target is in no history, whatever its place in the table.
    """
    group = log.user.astype(np.int64) * 2 + (log.search if own_task else 0)
    order = np.argsort(group, kind="stable") if own_task else np.arange(len(log))
    group, time = group[order], log.time[order]
    seen = np.r_[0, np.cumsum(allowed[order])]  # allowed events before each position
    new_group = np.r_[True, group[1:] != group[:-1]][: len(group)]
    new_time = new_group | np.r_[True, time[1:] != time[:-1]][: len(time)]
    begin, end = np.empty(len(log), np.int64), np.empty(len(log), np.int64)
    begin[order] = seen[_last_true(new_group)]
    end[order] = seen[_last_true(new_time)]
    return Histories(order[allowed[order]], begin, end[log.unit])


def lists(begin: Rows, end: Rows, values: pl.Series) -> pl.Series:
    """A list series whose i-th entry takes the next `end[i] - begin[i]` of `values`."""
    offsets = np.r_[0, np.cumsum(end - begin)]
    array = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), values.to_arrow())
    return pl.Series(pl.from_arrow(array), dtype=pl.List(pl.String))


def _spread(begin: Rows, end: Rows) -> Rows:
    """begin[0]..end[0]-1, begin[1]..end[1]-1, ... in one array."""
    lengths = end - begin
    stops = np.cumsum(lengths)
    return np.arange(stops[-1] if len(stops) else 0) + np.repeat(begin - stops + lengths, lengths)


def _last_true(flags: NDArray[np.bool_]) -> Rows:
    """Position of the last True at or before each position."""
    return np.maximum.accumulate(np.where(flags, np.arange(len(flags)), 0))

"""Which events train, validate and test."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemst.config import Data
from gemst.data.histories import histories
from gemst.data.log import Log

TRAIN, VALID, TEST = 0, 1, 2
PARTS = ("train", "valid", "test")


@dataclass(frozen=True)
class Split:
    """`part` (events,) is TRAIN, VALID or TEST; `target` (events,) is False for events that are context only."""

    part: NDArray[np.int8]
    target: NDArray[np.bool_]


def split(log: Log, config: Data) -> Split:
    """Split by `config.split`; the events of one unit always stay together."""
    if config.split == "leave-last-out":
        return _leave_last_out(log, config)
    return _global_time(log, config)


def _leave_last_out(log: Log, config: Data) -> Split:
    """Per user and task: the last unit tests, the one before it validates.

    A unit with fewer than `min_history` events before it stays in train, and so does a task's only unit; a task with
    two units gives a test unit alone. Every user and task therefore has a train event for each it is tested on, as
    long as that is not a spoiled one. Events without a request are held out only where their user and task have none.
    """
    part = np.zeros(len(log), np.int8)
    for held in (TEST, VALID):
        last, before = _last_unit(log, part == TRAIN)
        enough = histories(log, part <= held, config.history == "own").lengths() >= config.min_history
        part[last & before & enough] = held
    return Split(part, np.ones(len(log), dtype=bool))


def _last_unit(log: Log, free: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Masks: events of the last free, paged unit of their user and task; those whose task has another free unit."""
    group = log.user.astype(np.int64) * 2 + log.search
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.r_[True, group[order][1:] != group[order][:-1]][: len(order)])
    if not len(starts):
        return free, free
    counts = np.diff(np.r_[starts, len(order)])
    unit = np.where(free, log.unit, -1)[order]
    latest = np.repeat(np.maximum.reduceat(np.where(log.paged[order], unit, -1), starts), counts)
    second = np.repeat(np.maximum.reduceat(np.where(unit == latest, -1, unit), starts), counts)
    last, before = np.empty(len(log), bool), np.empty(len(log), bool)
    last[order] = (unit == latest) & (unit >= 0)
    before[order] = second >= 0
    return last, before


def _global_time(log: Log, config: Data) -> Split:
    """The newest `test_fraction` of the events tests, the `valid_fraction` before it validates.

    All events of one moment fall on one side.
    """
    time = log.unit_time
    ordered = np.sort(time)
    part = np.zeros(len(log), np.int8)
    for held, share in ((VALID, config.valid_fraction + config.test_fraction), (TEST, config.test_fraction)):
        at = len(log) - round(min(share, 1.0) * len(log))
        if at < len(log):
            part[time >= ordered[at]] = held
    return with_history(log, Split(part, np.ones(len(log), dtype=bool)), config)


def with_history(log: Log, parts: Split, config: Data) -> Split:
    """Held-out events with fewer than `min_history` events before them are no targets, but stay in later histories."""
    target = parts.target.copy()
    for held in (VALID, TEST):
        lengths = histories(log, parts.part <= held, config.history == "own").lengths()
        target &= (parts.part != held) | (lengths >= config.min_history)
    return Split(parts.part, target)


def spoiled(log: Log, parts: Split) -> NDArray[np.bool_]:
    """(events,) train events that give a held-out target away: its user and item again, at its moment or later.

    Such events come with what was held out, as the second tag of an item does, or repeat it afterwards.
    """
    pair = log.user.astype(np.int64) * len(log.items) + log.item
    held = (parts.part != TRAIN) & parts.target
    pairs, at = np.unique(pair[held], return_inverse=True)
    if not len(pairs):
        return np.zeros(len(log), bool)
    earliest = np.full(len(pairs), np.iinfo(np.int64).max)
    np.minimum.at(earliest, at, log.unit_time[held])
    spot = np.minimum(np.searchsorted(pairs, pair), len(pairs) - 1)
    return (parts.part == TRAIN) & (pairs[spot] == pair) & (log.time >= earliest[spot])

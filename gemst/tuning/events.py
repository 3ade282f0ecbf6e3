"""Train examples as flat event sequences, one stretch per user, or per user and task where tasks share no history."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from gemst.errors import GemstError
from gemst.item_ids.ids import rows_by
from gemst.prompts import SEARCH, Prompter

Ints = NDArray[np.int64]

_HEAD = np.iinfo(np.int64).min


@dataclass
class Events:
    """Train examples, sorted by user and own time, as flat arrays; the trunk of a user is a stretch of `items`.

    Where histories hold the target's own task alone, each task of a user counts as a user.
    """

    items: Ints  # item row of each trunk event
    time: Ints  # ms, the event's own; the head of a user (events before the first target) has the lowest value
    page: Ints  # ms, of the result page the event is on: what was before it is the event's history
    task: NDArray[np.int8]  # 0 rec, 1 src, -1 head: context without a target
    query: NDArray[np.int64]  # row into `suffixes`
    start: Ints  # (users + 1,) offsets of users
    suffixes: list[list[int]]


def load_events(train: pl.DataFrame, prompter: Prompter, own: bool = False) -> Events:
    """Flatten train examples into each user's event sequence, or into one for each of a user's tasks (`own`).

    The first example's history is the user's head; after it, every example's target is the next event, by the time it
    was clicked and then the fixed order of the table. `own` is for tables made with `data.history: own`. Raises
    GemstError when the table does not say when its targets were clicked.
    """
    if "clicked" not in train.columns:
        raise GemstError(
            "the train examples have no column `clicked`: an older gemst made them",
            "Run `gemst split`; a study makes its own again once artifacts/study/shared/split-* is removed",
        )
    train = train.filter(pl.col("targets").list.len() > 0)
    keys = ["user_id", "task"] if own else ["user_id"]
    train = train.sort(keys, maintain_order=True) if own else train  # a user's tasks interleave, in order of time
    users = _numbers(train.select(keys))
    train = train[np.lexsort((train["clicked"].to_physical().to_numpy(), users))]
    first = train.group_by(keys, maintain_order=True).first()
    heads = prompter.history_rows(first["history"])
    head_lengths = np.array([len(head) for head in heads], np.int64)
    rows = rows_by(prompter.index, train["targets"].list.first())
    counts = np.bincount(users)
    start = np.concatenate([[0], np.cumsum(counts + head_lengths)])
    total = int(start[-1])
    events = Events(
        np.full(total, -1, np.int64), np.full(total, _HEAD), np.full(total, _HEAD), np.full(total, -1, np.int8),
        np.zeros(total, np.int64), start, [],
    )  # fmt: skip
    at = np.arange(len(users)) + np.cumsum(head_lengths)[users]
    events.items[at] = rows
    events.time[at], events.page[at] = (train[name].dt.epoch("ms").to_numpy() for name in ("clicked", "timestamp"))
    events.task[at] = (train["task"] == SEARCH).to_numpy()
    queries = train.with_columns(query=pl.when(pl.col("task") == SEARCH).then("query"))["query"]
    distinct = queries.unique(maintain_order=True)
    events.suffixes = prompter.suffixes(distinct.to_list())
    events.query[at] = (
        pl.DataFrame({"query": queries})
        .join(
            pl.DataFrame({"query": distinct}).with_row_index("at"),
            on="query",
            how="left",
            nulls_equal=True,
            maintain_order="left",
        )["at"]
        .to_numpy()
    )
    within = np.arange(head_lengths.sum()) - np.repeat(np.cumsum(head_lengths) - head_lengths, head_lengths)
    events.items[np.repeat(start[:-1], head_lengths) + within] = np.concatenate(heads) if heads else []
    return events


def visible(events: Events) -> Ints:
    """Where the trunk that each event may see as a target ends: before the first event of its user that is not strictly
    before its page, (events,)."""
    users = np.repeat(np.arange(len(events.start) - 1), np.diff(events.start))
    times, place = np.unique(np.concatenate([events.time, events.page]), return_inverse=True)
    own, page = place.reshape(2, -1) + users * len(times)
    return np.searchsorted(own, page)


def _numbers(keys: pl.DataFrame) -> Ints:
    """0, 0, 1, ...: which stretch of equal rows each row is in."""
    return keys.select(pl.struct(pl.all()).rle_id()).to_series().to_numpy().astype(np.int64)

"""Canonical tables to train, valid and test examples (docs/data.md).

What a history may hold: events of the user strictly before the target's time. Train histories hold train events alone,
valid histories train and valid events, test histories everything before. Nothing of a held-out event reaches training:
events of the same user and item that come with it or after it are dropped.
Every train event is an example, so a user's train examples in order are the user's train events in order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from gemst.config import Data
from gemst.data import negatives
from gemst.data.histories import Histories, histories, lists
from gemst.data.kcore import k_core
from gemst.data.log import Log, Rows, code
from gemst.data.split import PARTS, TEST, TRAIN, Split, split, spoiled, with_history
from gemst.data.tables import EXAMPLES, RECOMMENDATION, SEARCH, TIME, TRAIN_EXAMPLES
from gemst.errors import GemstError
from gemst.files import atomic_file

_BLOCK = 250_000  # examples made at once: bounds the memory of `write`


@dataclass(frozen=True)
class Splits:
    """The three example tables, sorted by user, time, task and the tie hash, and their account.

    Their schema is tables.EXAMPLES, that of train tables.TRAIN_EXAMPLES.

    `counts` has events, users, items, train, valid, test (examples), unseen_test_items and `dropped`: events by rule.
    events = train + targets of valid and test + dropped.
    """

    train: pl.DataFrame
    valid: pl.DataFrame
    test: pl.DataFrame
    counts: dict[str, Any]


def build(items: pl.DataFrame, events: pl.DataFrame, config: Data, seed: int) -> Splits:
    """Examples in memory. Deterministic for `seed`, whatever the order of the rows and the number of threads.

    Raises GemstError when nothing is left to train on.
    """
    plan = _plan(items, events, config, seed)
    train, valid, test = (pl.concat([_schema(part).to_frame(), *plan.blocks(part)]) for part in range(len(PARTS)))
    return Splits(train, valid, test, plan.counts)


def write(items: pl.DataFrame, events: pl.DataFrame, config: Data, seed: int, folder: Path) -> dict[str, Any]:
    """The same examples straight to `folder`/{train,valid,test}.parquet, block by block, for logs of any size.

    Returns the counts. Raises GemstError when nothing is left to train on.
    """
    plan = _plan(items, events, config, seed)
    for part, name in enumerate(PARTS):
        path = folder / f"{name}.parquet"
        schema = _schema(part).to_frame().to_arrow(compat_level=pl.CompatLevel.oldest()).schema
        options: dict[str, Any] = {"compression": "zstd", "write_statistics": ["user_id", "task", "timestamp"]}
        with atomic_file(path) as temporary, pq.ParquetWriter(temporary, schema, **options) as file:
            for block in plan.blocks(part):
                file.write_table(block.to_arrow(compat_level=pl.CompatLevel.oldest()))
    return plan.counts


@dataclass(frozen=True)
class _Plan:
    """Everything decided, nothing spelt out yet."""

    log: Log
    met: pl.DataFrame  # user, item of every event, as codes of the log: also of those outside the k-core
    split: Split
    items: pl.DataFrame
    events: pl.DataFrame
    config: Data
    seed: int
    counts: dict[str, Any]

    def blocks(self, part: int) -> Iterator[pl.DataFrame]:
        """The examples of one part, in order, at most _BLOCK at once."""
        chosen = np.flatnonzero((self.split.part == part) & self.split.target)
        # A train example has one target; a held-out one has all targets of its unit, and stands at its first event.
        heads = chosen if part == TRAIN else np.unique(self.log.unit[chosen])
        if not len(heads):
            return
        seen = histories(self.log, self.split.part <= part, self.config.history == "own")
        time = self.log.unit_time[heads]
        if (time != self.log.time[heads]).any():  # a click later than its page stands at the page's time
            heads = heads[np.lexsort((heads, self.log.search[heads], time, self.log.user[heads]))]
        for start in range(0, len(heads), _BLOCK):
            yield self._block(heads[start : start + _BLOCK], seen, None if part == TRAIN else chosen)

    def _block(self, heads: Rows, seen: Histories, targets: Rows | None) -> pl.DataFrame:
        """The examples at `heads`; `targets` are the held-out part's events, None in train: each is its own."""
        log, rows = self.log, self.log.row[heads]
        task = pl.Series(log.search[heads]).replace_strict(
            {False: RECOMMENDATION, True: SEARCH}, return_dtype=pl.String
        )
        table = pl.DataFrame(
            {
                "user_id": log.users.gather(log.user[heads]),
                "task": task,
                "query": self.events["query"].gather(rows),
                "history": seen.items(heads, log, self.config.max_history),
                "timestamp": _times(log.unit_time[heads]),
            }
        )
        if targets is None:
            one = np.arange(len(heads))
            found = lists(one, one + 1, log.items.gather(log.item[heads]))
            empty = pl.lit([], dtype=pl.List(pl.String))
            clicked = _times(log.time[heads])
            return table.with_columns(targets=found, negatives=empty, clicked=clicked).select(TRAIN_EXAMPLES.names())
        wanted = _targets_of(log, heads, targets)
        found = _as_lists(wanted, len(heads), log.items)
        drawn = negatives.draw(self.config, self.seed, log, heads, wanted, self.items, self.events, self.met)
        return table.with_columns(targets=found, negatives=_as_lists(drawn, len(heads), log.items)).select(
            EXAMPLES.names()
        )


def _plan(items: pl.DataFrame, events: pl.DataFrame, config: Data, seed: int) -> _Plan:
    log, unknown = code(items, events)
    met = pl.DataFrame({"user": log.user, "item": log.item})
    kept = k_core(log.user, log.item, config.core)
    dropped = {"item not in items": unknown, f"outside the {config.core}-core": int((~kept).sum())}
    log = log.only(kept)
    if not len(log):
        raise GemstError(f"no event is left after the {config.core}-core", "Lower data.core or bring more events")
    parts = split(log, config)
    spoils = spoiled(log, parts)
    dropped["a held-out item of the same user, at its moment or later"] = int(spoils.sum())
    log = log.only(~spoils)
    parts = with_history(log, Split(parts.part[~spoils], parts.target[~spoils]), config)
    if not ((parts.part == TRAIN) & parts.target).any():
        raise GemstError("no event is left to train on", "Lower data.valid_fraction and data.test_fraction")
    dropped[f"held out with fewer than {config.min_history} events before it"] = int((~parts.target).sum())
    counts: dict[str, Any] = {
        "events": len(events),
        "users": len(np.unique(log.user)),
        "items": len(np.unique(log.item)),
    }
    repeated = 0
    for part, name in enumerate(PARTS):
        chosen = np.flatnonzero((parts.part == part) & parts.target)
        if part == TRAIN:
            counts[name] = len(chosen)
            continue
        units = log.unit[chosen]
        targets = len(np.unique(units * len(log.items) + log.item[chosen]))
        counts[name], counts[f"{name}_targets"] = len(np.unique(units)), targets
        repeated += len(chosen) - targets
    dropped["same item again in a held-out request"] = repeated
    train_items = np.unique(log.item[parts.part == TRAIN])
    counts["unseen_test_items"] = len(np.setdiff1d(log.item[(parts.part == TEST) & parts.target], train_items))
    counts["dropped"] = {rule: rows for rule, rows in dropped.items() if rows}
    return _Plan(log, met, parts, items, events, config, seed, counts)


def _schema(part: int) -> pl.Schema:
    return TRAIN_EXAMPLES if part == TRAIN else EXAMPLES


def _times(epoch_ms: Rows) -> pl.Series:
    return pl.Series(epoch_ms).cast(TIME)


def _targets_of(log: Log, heads: Rows, targets: Rows) -> pl.DataFrame:
    """Columns row (position in `heads`), item (code): the distinct targets of each head's unit, in canonical order."""
    ordered = np.sort(heads)
    spot = np.searchsorted(ordered, log.unit[targets])
    spot[spot == len(ordered)] = 0
    mine = ordered[spot] == log.unit[targets]
    row = np.argsort(heads, kind="stable")[spot[mine]]
    table = pl.DataFrame({"row": row.astype(np.uint32), "item": log.item[targets[mine]]})
    return table.unique(maintain_order=True).sort("row", maintain_order=True)


def _as_lists(table: pl.DataFrame, rows: int, ids: pl.Series) -> pl.Series:
    """List series of `rows` entries from columns row, item (code), sorted by row."""
    counts = np.bincount(table["row"].to_numpy(), minlength=rows)
    return lists(np.zeros(rows, np.int64), counts, ids.gather(table["item"]))

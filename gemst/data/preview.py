"""What an ingest would do, without doing it: the body of `gemst ingest --dry-run`."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import Any

import polars as pl

from gemst.config import Data
from gemst.data import rules, sources

_ROWS = 10


@dataclass(frozen=True)
class Preview:
    """`mapping`: canonical column -> where it comes from. `items` and `events`: the first ten rows.

    `rows_in` and `rows_out` count rows, `dropped` those that ingest would drop by "table: rule", `quarantined` those
    that validate would set aside by "table: reason"; `profile` describes the rows that are left (rules.profile).
    """

    mapping: dict[str, str]
    items: pl.DataFrame
    events: pl.DataFrame
    rows_in: dict[str, int]
    rows_out: dict[str, int]
    dropped: dict[str, int]
    quarantined: dict[str, int]
    profile: dict[str, Any]


def preview(config: Data) -> Preview:
    """Load the logs, judge every row, write nothing. Raises GemstError as `sources.load` does."""
    loaded = sources.load(config)
    bad_items, bad_events = rules.judge_tables(loaded.items, loaded.events, dt.datetime.now(dt.UTC))
    return Preview(
        loaded.mapping,
        loaded.items.head(_ROWS),
        loaded.events.head(_ROWS),
        loaded.rows_in,
        {"items": bad_items.null_count(), "events": bad_events.null_count()},
        loaded.dropped,
        rules.count("items", bad_items) | rules.count("events", bad_events),
        rules.profile(loaded.items.filter(bad_items.is_null()), loaded.events.filter(bad_events.is_null())),
    )

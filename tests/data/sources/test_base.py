from __future__ import annotations

import polars as pl
import pytest

from gemst.data import tables
from gemst.data.sources.base import Loaded, settle
from gemst.errors import GemstError
from tests.data.conftest import events_table, items_table


def test_an_adapter_that_loses_a_row_is_caught():
    items, events = items_table("a"), events_table(("u", "a", 0, None))
    with pytest.raises(GemstError, match="events: 1 rows are unaccounted for"):
        settle(Loaded(items, events, rows_in={"items": 1, "events": 2}))
    named = settle(Loaded(items, events, {"events: too early": 1}, {"items": 1, "events": 2}))
    assert named.dropped == {"events: too early": 1}


def test_rows_whose_time_cannot_be_read_are_no_duplicates():
    events = pl.concat([events_table(("u", "a", 0, None))] * 2).with_columns(timestamp=pl.lit(None, tables.TIME))
    settled = settle(Loaded(items_table("a"), events, rows_in={"items": 1, "events": 2}))
    assert (len(settled.events), settled.dropped) == (2, {})


def test_rows_that_differ_in_any_column_are_no_duplicates():
    events = events_table(
        ("u", "a", 0, "q", "r", ["b"]), ("u", "a", 0, "q", "r", ["c"]), ("u", "a", 0, "q", "r", ["b"])
    )
    settled = settle(Loaded(items_table("a"), events, rows_in={"items": 1, "events": 3}))
    assert sorted(settled.events["shown"].to_list()) == [["b"], ["c"]]
    assert settled.dropped == {"events: exact duplicate of another row": 1}

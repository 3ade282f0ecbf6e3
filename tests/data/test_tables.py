from __future__ import annotations

from itertools import pairwise

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from gemst.data import tables
from gemst.errors import GemstError
from tests.data.conftest import events_table, items_table, logs


@given(logs(), st.randoms())
def test_order_depends_on_the_rows_alone(log, random):
    order = list(range(log[1].height))
    random.shuffle(order)
    ordered = tables.in_order(log[1])
    assert_frame_equal(ordered, tables.in_order(log[1][order]))
    assert ordered.select("user_id", "timestamp", "task").equals(
        ordered.select("user_id", "timestamp", "task").sort(pl.all())
    )


def test_ties_do_not_follow_the_ids():
    ids = [f"i{n:03}" for n in range(200)]
    tied = tables.in_order(events_table(*(("u", item, 0, None) for item in ids)))["item_id"].to_list()
    assert tied != ids
    assert sum(a < b for a, b in pairwise(tied)) in range(70, 130)


def test_an_event_with_a_page_leaves_the_order_of_the_others():
    rows = [("u", f"i{n:03}", 0, None) for n in range(50)]
    alone = tables.in_order(events_table(*rows))["item_id"]
    grown = tables.in_order(events_table(*rows, ("v", "i000", 0, None, "r", ["i000", "i001"])))
    assert grown.filter(user_id="u")["item_id"].equals(alone)


def test_round_trip_and_optional_columns(tmp_path):
    items, events = items_table("a"), events_table(("u", "a", 0, "q"))
    tables.write_items(items.drop("text"), tmp_path / "items.parquet")
    tables.write_events(events.drop("request_id", "shown"), tmp_path / "events.parquet")
    assert_frame_equal(tables.read_items(tmp_path / "items.parquet"), items)
    assert_frame_equal(tables.read_events(tmp_path / "events.parquet"), events)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.drop("user_id"), "events lacks user_id"),
        (lambda e: e.with_columns(pl.col("timestamp").dt.replace_time_zone(None)), "timestamp is Datetime"),
        (lambda e: e.with_columns(item_id=pl.lit(3)), "item_id is Int32, not String"),
        (lambda e: e.with_columns(shown=pl.lit("a b")), r"shown is String, not List\(String\)"),
    ],
)
def test_another_schema_is_not_written(tmp_path, change, message):
    with pytest.raises(GemstError, match=message):
        tables.write_events(change(events_table(("u", "a", 0, None))), tmp_path / "events.parquet")
    assert list(tmp_path.iterdir()) == []


def test_damaged_file(tmp_path):
    (tmp_path / "items.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(GemstError, match="not readable as Parquet"):
        tables.read_items(tmp_path / "items.parquet")
    with pytest.raises(GemstError, match=r"does not exist.*gemst ingest"):
        tables.read_events(tmp_path / "events.parquet")

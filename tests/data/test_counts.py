"""What becomes of the real logs, stage by stage: every source's rows from the raw files to the examples, pinned.

The files are development data sets that are not part of this project; without them these tests are skipped.
"""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from gemst.config import Data
from gemst.data import account, examples, rules, sources
from tests.data.conftest import PROJECT

NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)


def flow(config: Data) -> dict[str, Any]:
    """Ingest, the rules of validation, split: the counts that each of them prints."""
    if not config.path.is_dir():
        pytest.skip(f"{config.path.name} is absent")
    loaded = sources.load(config)
    why_items, why_events = rules.judge_tables(loaded.items, loaded.events, NOW)
    items, events = loaded.items.filter(why_items.is_null()), loaded.events.filter(why_events.is_null())
    quarantined = rules.count("items", why_items) | rules.count("events", why_events)
    counts = examples.build(items, events, config, seed=7).counts
    return {
        "rows": account.lines(
            loaded.rows_in, {"items": len(items), "events": len(events)}, loaded.dropped, quarantined
        ),
        "quarantined": quarantined,
        "examples": [counts[name] for name in ("train", "valid", "test")],
        "targets": [counts["valid_targets"], counts["test_targets"]],
        "dropped": counts["dropped"],
        "unseen": counts["unseen_test_items"],
    }


def test_recbole_movielens_100k():
    found = flow(Data(source="recbole", path=PROJECT / "data" / "ml-100k"))
    assert found == {
        "rows": [
            "items: 1,682 rows in = 1,682 out + 0 in quarantine + 0 dropped",
            "events: 100,000 rows in = 100,000 out + 0 in quarantine + 0 dropped",
        ],
        "quarantined": {},
        "examples": [96228, 1886, 1886],
        "targets": [1886, 1886],
        "dropped": {},
        "unseen": 3,
    }


def test_hetrec_lastfm_2k(shared_data):
    found = flow(Data(source="hetrec", path=shared_data / "hetrec-lastfm-2k"))
    assert found == {
        "rows": [
            "items: 17,632 rows in = 17,632 out + 0 in quarantine + 0 dropped",
            "events: 257,541 rows in = 255,231 out + 2,310 in quarantine + 0 dropped",
        ],
        "quarantined": {"events: item is not in items": 2305, "events: timestamp is before 1990": 5},
        "examples": [242906, 2590, 2932],
        "targets": [2873, 3099],
        "dropped": {"a held-out item of the same user, at its moment or later": 6353},
        "unseen": 199,
    }


def test_amazon_gift_cards(shared_data):
    found = flow(Data(source="amazon", path=shared_data / "amazon-gift-cards", core=2))
    assert found == {
        "rows": [
            "items: 1,547 rows in = 1,547 out + 0 in quarantine + 0 dropped",
            "events: 2,972 rows in = 2,969 out + 0 in quarantine + 3 dropped",
        ],
        "quarantined": {},
        "examples": [2128, 323, 518],
        "targets": [323, 518],
        "dropped": {},
        "unseen": 0,
    }


def test_qilin_toy(shared_data):
    found = flow(Data(source="qilin", path=shared_data / "qilin-toy", negatives="shown"))
    assert found == {
        "rows": [
            "items: 765 rows in = 765 out + 0 in quarantine + 0 dropped",
            "events: 1,482 rows in = 762 out + 0 in quarantine + 720 dropped",
        ],
        "quarantined": {},
        "examples": [678, 14, 34],
        "targets": [21, 63],
        "dropped": {},
        "unseen": 62,
    }


def test_table_yelp(shared_data, tmp_path: Path):
    """Sequences without times, brought into the template as a user would: the place in the sequence is the time."""
    folder = shared_data / "yelp-s3rec"
    if not folder.is_dir():
        pytest.skip("yelp-s3rec is absent")
    lines = pl.read_csv(folder / "Yelp.txt", has_header=False, separator="\n", new_columns=["line"])
    sequences = lines.select(pl.col("line").str.split(" ")).select(
        user_id=pl.col("line").list.first(), item_id=pl.col("line").list.slice(1)
    )
    events = sequences.with_columns(timestamp=pl.int_ranges(pl.col("item_id").list.len()) + 1_500_000_000)
    events = events.explode("item_id", "timestamp", empty_as_null=True)
    events.write_parquet(tmp_path / "events.parquet")
    items = events.select("item_id").unique().sort("item_id").with_columns(title=pl.format("business {}", "item_id"))
    items.write_csv(tmp_path / "items.csv")
    found = flow(Data(source="table", path=tmp_path, core=5))
    assert found == {
        "rows": [
            "items: 20,033 rows in = 20,033 out + 0 in quarantine + 0 dropped",
            "events: 316,354 rows in = 316,354 out + 0 in quarantine + 0 dropped",
        ],
        "quarantined": {},
        "examples": [255492, 30431, 30431],
        "targets": [30431, 30431],
        "dropped": {},
        "unseen": 14,
    }

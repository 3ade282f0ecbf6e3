from __future__ import annotations

import datetime as dt
from typing import Any

import polars as pl
import pytest

from gemst.config import Data
from gemst.data import account, examples, rules, sources
from gemst.errors import GemstError


def shown(note: int, click: int, time: float) -> dict:
    return {"click": click, "note_idx": note, "note_id": "6741a8ab000000000201b7d4", "page_time": 1.5, "time": time}


# (file, user, query, request, recent clicks newest first, results); times of search in seconds, of recommendation in ms
S, MS = 1_732_000_000, 1_732_000_000_000
REQUESTS = [
    (
        "search_train",
        1,
        " red tea ",
        5,
        [30, 20, 10],
        [shown(40, 1, S + 0.0), shown(41, 0, S + 0.0), shown(42, 1, S + 9.0)],
    ),
    ("search_test", 1, "tea", 6, [42, 40, 30, 20], [shown(43, 1, S + 9000.0), shown(40, 0, S + 9000.0)]),
    ("recommendation_train", 2, None, 5, [50], [shown(51, 0, MS + 123), shown(50, 1, MS + 120)]),
    ("recommendation_test", 1, None, 7, [60, 43], [shown(44, 0, MS + 10_000_000), shown(45, 0, MS + 10_000_001)]),
]
NOTES = [
    {"note_idx": n, "note_title": "Tea" if n != 41 else None, "note_content": f"All about note {n}"}
    for n in (10, 20, 30, 40, 41, 42)
]


def fields(file: str) -> tuple[str, str, str]:
    if file.startswith("search"):
        return "search_result_details_with_idx", "search_idx", "search_timestamp"
    return "rec_result_details_with_idx", "request_idx", "request_timestamp"


def write_csv(folder) -> None:
    """Arrays in their printed form, as in the CSV release."""
    pl.DataFrame(NOTES).write_csv(folder / "notes.csv")
    for file, user, query, request, recent, results in REQUESTS:
        details, idx, stamp = fields(file)
        entries = [
            f"{{'click': {r['click']}, 'note_id': '{r['note_id']}', 'note_idx': {r['note_idx']}, 'page_time': nan, "
            f"'{stamp}': {r['time']}}}"
            for r in results
        ]
        row = {
            "recent_clicked_note_idxs": "[" + " ".join(map(str, recent)).replace(" ", "  \n", 1) + "]",
            details: "[" + "\n ".join(entries) + "]",
            idx: request,
            "session_idx": 1,
            "user_idx": user,
            "query": query or "made up",
        }
        pl.DataFrame([row]).write_csv(folder / f"{file}.csv")


def write_parquet(folder) -> None:
    """Nested columns in shards, as in the Parquet release."""
    (folder / "notes").mkdir()
    pl.DataFrame(NOTES[:3]).write_parquet(folder / "notes" / "train-0.parquet")
    pl.DataFrame(NOTES[3:]).write_parquet(folder / "notes" / "train-1.parquet")
    for file, user, query, request, recent, results in REQUESTS:
        details, idx, stamp = fields(file)
        entries = [{**{k: v for k, v in r.items() if k != "time"}, stamp: r["time"]} for r in results]
        row = {
            "recent_clicked_note_idxs": recent,
            details: entries,
            idx: request,
            "user_idx": user,
            "query": query or "made up",
        }
        pl.DataFrame([row]).write_parquet(folder / f"{file}.parquet")


@pytest.fixture(params=[write_csv, write_parquet])
def loaded(request, tmp_path) -> sources.Loaded:
    request.param(tmp_path)
    return sources.load(Data(source="qilin", path=tmp_path))


def test_clicks_of_a_request_share_its_time_and_what_was_shown(loaded):
    clicks = loaded.events.filter(pl.col("request_id") == "s5").sort("item_id")
    assert clicks["item_id"].to_list() == ["40", "42"]
    assert clicks["timestamp"].dt.epoch("s").to_list() == [1_732_000_000] * 2
    assert clicks["shown"].to_list() == [["41"]] * 2
    assert clicks["query"].to_list() == ["red tea"] * 2
    assert loaded.events.filter(pl.col("request_id") == "r5").select("item_id", "task", "query").rows() == [
        ("50", "recommendation", None)
    ]


def test_recent_clicks_come_before_the_first_request_that_lists_them(loaded):
    recent = loaded.events.filter(pl.col("request_id").is_null())
    assert recent.sort("timestamp").select("user_id", "item_id").rows() == [
        ("1", "10"),
        ("1", "20"),
        ("1", "30"),
        ("1", "60"),
    ]
    assert set(recent["task"]) == {"recommendation"}
    first = recent.filter(pl.col("item_id") == "30")["timestamp"].dt.epoch("ms").item()
    assert first == 1_732_000_000_000 - 1
    # The log itself has 40, 42 and 43 by then; 50 is the very click of its request.
    assert loaded.dropped["events: recent click that the log has at or before that time"] == 4
    assert loaded.dropped["events: recent click that an earlier request lists"] == 2


def test_a_request_without_a_time_takes_no_recent_click_from_one_with(tmp_path):
    write_parquet(tmp_path)
    whole = sources.load(Data(source="qilin", path=tmp_path))
    untimed = pl.read_parquet(tmp_path / "search_train.parquet").with_columns(
        pl.lit([], dtype=pl.read_parquet(tmp_path / "search_train.parquet").schema[fields("search")[0]]).alias(
            fields("search")[0]
        ),
        search_idx=0,
    )
    untimed.write_parquet(tmp_path / "search_train-0.parquet")
    (tmp_path / "search_train").mkdir()
    for name in ("search_train", "search_train-0"):
        (tmp_path / f"{name}.parquet").rename(tmp_path / "search_train" / f"{name}.parquet")
    again = sources.load(Data(source="qilin", path=tmp_path))
    assert again.events.sort(pl.col("user_id", "item_id", "timestamp")).equals(
        whole.events.sort(pl.col("user_id", "item_id", "timestamp"))
    )
    said = "events: recent click that an earlier request lists"
    assert again.dropped[said] == whole.dropped[said] + 3


def test_every_result_is_an_event_or_named(loaded):
    assert loaded.rows_in["events"] == 9
    assert loaded.dropped["events: shown and not clicked (kept in `shown` of the clicks)"] == 5


def test_notes_without_title_or_entry_get_one(loaded):
    titles = dict(loaded.items.select("item_id", "title").iter_rows())
    assert titles["41"] == "All about note 41"
    assert titles["43"] == "note 43"
    assert loaded.rows_in["items: clicked note without an entry in notes"] == 3  # 43, 50, 60


def test_several_targets_and_shown_negatives(loaded):
    splits = examples.build(loaded.items, loaded.events, Data(negatives="shown", min_history=1), seed=0)
    (test,) = splits.test.filter(pl.col("task") == "search", pl.col("user_id") == "1").to_dicts()
    assert (test["targets"], test["negatives"], test["query"]) == (["43"], ["40"], "tea")
    assert sorted(test["history"]) == ["10", "20", "30", "40", "42"]


WRITERS = [write_csv, write_parquet]


def change(folder, file: str, **columns: Any) -> None:
    """Set columns of a file with one row, in either layout."""
    if (folder / f"{file}.csv").exists():
        row = pl.read_csv(folder / f"{file}.csv", infer_schema=False)
        row.with_columns(**columns).write_csv(folder / f"{file}.csv")
    else:
        pl.read_parquet(folder / f"{file}.parquet").with_columns(**columns).write_parquet(folder / f"{file}.parquet")


def judged(folder) -> tuple[sources.Loaded, dict[str, int]]:
    """The tables and what is put in quarantine; every row is accounted for."""
    loaded = sources.load(Data(source="qilin", path=folder))
    why_items, why_events = rules.judge_tables(loaded.items, loaded.events, dt.datetime(2026, 1, 1, tzinfo=dt.UTC))
    quarantined = rules.count("items", why_items) | rules.count("events", why_events)
    good = {"items": why_items.null_count(), "events": why_events.null_count()}
    assert account.lines(loaded.rows_in, good, loaded.dropped, quarantined)
    return loaded, quarantined


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("written", ["{}.0", " {}", "{}"])
def test_numbers_written_in_other_ways_are_the_same_ids(tmp_path, write, written):
    """Pandas writes 1.0 for 1 where another row has none."""
    write(tmp_path)
    plain = sources.load(Data(source="qilin", path=tmp_path))
    for file, user, _, request, recent, _ in REQUESTS:
        floats = pl.col("recent_clicked_note_idxs").cast(pl.List(pl.Float64))
        if write is write_csv:
            floats = pl.lit(f"[{' '.join(f'{n}.' for n in recent)}]")
        ids = {"user_idx": pl.lit(written.format(user)), fields(file)[1]: pl.lit(written.format(request))}
        change(tmp_path, file, recent_clicked_note_idxs=floats, **ids)
    again = sources.load(Data(source="qilin", path=tmp_path))
    assert again.events.equals(plain.events)
    assert again.items.equals(plain.items)
    assert again.dropped == plain.dropped


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("user", ["abc", "1.5", "nan", None])
def test_users_that_are_no_numbers_go_to_quarantine(tmp_path, write, user):
    write(tmp_path)
    column = pl.lit(user, dtype=pl.String)
    if write is write_parquet and user in ("1.5", "nan"):
        column = column.cast(pl.Float64)
    for file in ("search_train", "search_test"):
        change(tmp_path, file, user_idx=column)
    loaded, quarantined = judged(tmp_path)
    # Clicks 40, 42 and 43; recent clicks 30, 20, 10 and, of what may be another user, 42, 40, 30, 20.
    assert quarantined == {"events: user_id is missing": 10}
    assert loaded.dropped["events: shown and not clicked (kept in `shown` of the clicks)"] == 5


@pytest.mark.parametrize("write", WRITERS)
def test_results_without_a_note_are_dropped_by_name(tmp_path, write):
    write(tmp_path)
    if write is write_csv:
        details = pl.col("search_result_details_with_idx").str.replace("'note_idx': 4[01]", "'note_idx': nan", n=-1)
        recent = pl.lit("[nan 20.  10.]")
    else:
        entry = pl.element().struct
        note = pl.when(entry.field("note_idx") > 41).then(entry.field("note_idx").cast(pl.Float64))
        changed = entry.with_fields(note_idx=note.fill_null(float("nan")))
        details = pl.col("search_result_details_with_idx").list.eval(changed)
        recent = pl.lit(pl.Series([[float("nan"), 20.0, 10.0]]))
    change(tmp_path, "search_train", search_result_details_with_idx=details, recent_clicked_note_idxs=recent)
    loaded, quarantined = judged(tmp_path)
    assert not quarantined
    assert loaded.rows_in["events"] == 9
    assert loaded.dropped["events: result without a note"] == 2
    assert loaded.dropped["events: recent click without a note"] == 1
    assert loaded.events.filter(pl.col("request_id") == "s5").select("item_id", "shown").rows() == [("42", None)]


@pytest.mark.parametrize("write", WRITERS)
def test_a_click_that_is_no_number_is_shown_and_not_clicked(tmp_path, write):
    write(tmp_path)
    if write is write_csv:
        details = pl.col("search_result_details_with_idx").str.replace("'click': 1", "'click': nan")
    else:
        entry = pl.element().struct
        click = pl.when(entry.field("note_idx") != 40).then(entry.field("click").cast(pl.Float64))
        changed = entry.with_fields(click=click.fill_null(float("nan")))
        details = pl.col("search_result_details_with_idx").list.eval(changed)
    change(tmp_path, "search_train", search_result_details_with_idx=details)
    loaded, _ = judged(tmp_path)
    clicks = loaded.events.filter(pl.col("request_id") == "s5")
    assert clicks.select("item_id", "shown").rows() == [("42", ["40", "41"])]
    assert loaded.dropped["events: shown and not clicked (kept in `shown` of the clicks)"] == 6


def test_a_note_without_a_number_goes_to_quarantine(tmp_path):
    write_csv(tmp_path)
    notes = pl.read_csv(tmp_path / "notes.csv", infer_schema=False)
    notes = pl.concat([notes, notes.head(1).with_columns(note_idx=pl.lit("x9"))])
    notes.write_csv(tmp_path / "notes.csv")
    loaded, quarantined = judged(tmp_path)
    assert quarantined == {"items: item_id is missing": 1}
    assert loaded.rows_in["items"] == 7


def test_missing_column(tmp_path):
    write_csv(tmp_path)
    pl.read_csv(tmp_path / "search_test.csv").drop("user_idx").write_csv(tmp_path / "search_test.csv")
    with pytest.raises(GemstError, match=r"search_test in .* lacks the column user_idx"):
        sources.load(Data(source="qilin", path=tmp_path))


def test_toy_release(shared_data):
    folder = shared_data / "qilin-toy"
    if not folder.is_dir():
        pytest.skip("qilin-toy is absent")
    loaded = sources.load(Data(source="qilin", path=folder))
    assert loaded.rows_in == {
        "items": 10, "items: clicked note without an entry in notes": 755, "events": 701, "events: recent clicks": 781,
    }  # fmt: skip
    assert loaded.dropped == {
        "events: shown and not clicked (kept in `shown` of the clicks)": 582,
        "events: recent click that an earlier request lists": 127,
        "events: recent click that the log has at or before that time": 11,
    }
    assert dict(loaded.events["task"].value_counts().iter_rows()) == {"recommendation": 692, "search": 70}

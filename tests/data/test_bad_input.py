"""What becomes of bad input: an error that names it, a quarantined row with its reason, a row dropped by a named
rule, or, where it only looks bad, a row that is kept. Nothing is lost silently.
"""

from __future__ import annotations

import datetime as dt
import gzip
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from gemst.config import Data
from gemst.data import expectations, rules, sources, tables
from gemst.data.sources import text
from gemst.errors import GemstError
from tests.data.conftest import PROJECT

GOOD = 600
DROPPED, QUARANTINED, KEPT = "dropped", "quarantined", "kept"

# kind -> (what differs from a good event, outcome, reason or a column's value afterwards)
EVENTS: dict[str, tuple[dict[str, Any], str, Any]] = {
    "unknown item": ({"item_id": "nowhere"}, QUARANTINED, "item is not in items"),
    "no item": ({"item_id": None}, QUARANTINED, "item_id is missing"),
    "no user": ({"user_id": None}, QUARANTINED, "user_id is missing"),
    "blank user": ({"user_id": " \t"}, QUARANTINED, "user_id is missing"),
    "huge user": ({"user_id": "u" * 300}, QUARANTINED, "user_id is longer than 256 characters"),
    "no time": ({"timestamp": None}, QUARANTINED, "timestamp is missing or not a time"),
    "words for a time": ({"timestamp": "yesterday"}, QUARANTINED, "timestamp is missing or not a time"),
    "impossible date": ({"timestamp": "2021-02-30"}, QUARANTINED, "timestamp is missing or not a time"),
    "number too large for a time": ({"timestamp": "9" * 40}, QUARANTINED, "timestamp is missing or not a time"),
    "negative time": ({"timestamp": "-5"}, QUARANTINED, "timestamp is before 1990"),
    "ancient date": ({"timestamp": "0001-01-01"}, QUARANTINED, "timestamp is before 1990"),
    "future date": ({"timestamp": "2999-01-01"}, QUARANTINED, "timestamp is in the future"),
    "no task": ({"task": None}, QUARANTINED, "task is not one of recommendation, search"),
    "unknown task": ({"task": "browse"}, QUARANTINED, "task is not one of recommendation, search"),
    "search without a query": ({"task": "search"}, QUARANTINED, "search without a query"),
    "search with a blank query": ({"task": "search", "query": "  "}, QUARANTINED, "search without a query"),
    "recommendation with a query": ({"query": "red"}, QUARANTINED, "recommendation with a query"),
    "huge query": ({"task": "search", "query": "red " * 100_000}, QUARANTINED, "query is longer than 1000 characters"),
    "event of an item without a title": ({"item_id": "untitled"}, QUARANTINED, "its item is in quarantine"),
    "other time zone": (
        {"timestamp": "2021-05-01T10:00:00+05:30"},
        KEPT,
        {"timestamp": dt.datetime(2021, 5, 1, 4, 30, tzinfo=dt.UTC)},
    ),
    "time without a zone": (
        {"timestamp": "2021-05-01 10:00"},
        KEPT,
        {"timestamp": dt.datetime(2021, 5, 1, 10, tzinfo=dt.UTC)},
    ),
    "epoch milliseconds among dates": (
        {"timestamp": "1620000000500"},
        KEPT,
        {"timestamp": dt.datetime(2021, 5, 3, 0, 0, 0, 500_000, dt.UTC)},
    ),
    "item token in a query": (
        {"task": "search", "query": "<item_0> <id_0_17> red"},
        KEPT,
        {"query": "<item_0> <id_0_17> red"},
    ),
    "markup in a query": (
        {"task": "search", "query": "<script>alert(1)</script>' OR 1=1"},
        KEPT,
        {"query": "<script>alert(1)</script>' OR 1=1"},
    ),
    "control characters in a query": ({"task": "search", "query": "a\x00b\x1fc\nd"}, KEPT, {"query": "a\x00b\x1fc\nd"}),
    "other scripts in a query": ({"task": "search", "query": "مرحبا 蝈蝈 🇲🇾"}, KEPT, {"query": "مرحبا 蝈蝈 🇲🇾"}),
    "unknown items shown": ({"shown": ["gone", "i1"]}, KEPT, {"shown": ["gone", "i1"]}),
}
# kind -> (row, outcome, reason)
BAD_ITEMS: dict[str, tuple[dict[str, Any], str, str]] = {
    "item without an id": ({"item_id": None, "title": "No id"}, QUARANTINED, "item_id is missing"),
    "item without a title": ({"item_id": "untitled", "title": None}, QUARANTINED, "title is missing"),
    "item with a blank title": ({"item_id": "blank", "title": " "}, QUARANTINED, "title is missing"),
    "item with a huge title": (
        {"item_id": "huge", "title": "x" * 5000},
        QUARANTINED,
        "title is longer than 2000 characters",
    ),
    "item with a huge text": (
        {"item_id": "long", "title": "x", "text": "x" * 200_000},
        QUARANTINED,
        "text is longer than 100000 characters",
    ),
    "two titles for one item": ({"item_id": "i3", "title": "Zebra"}, QUARANTINED, "item_id is in an earlier row"),
    "item given twice": (
        {"item_id": "i4", "title": "Thing 4", "text": "A thing."},
        DROPPED,
        "items: exact duplicate of another row",
    ),
}


def good_event(user: str, n: int = 0) -> dict[str, Any]:
    event = {"user_id": user, "item_id": f"i{n}", "timestamp": "2021-01-01T00:00:00Z", "task": "recommendation"}
    return {**event, "query": None, "shown": None}


def write_raw(folder: Path, items: list[dict[str, Any]], events: list[dict[str, Any]]) -> Data:
    folder.mkdir(parents=True, exist_ok=True)
    schema = {"item_id": pl.String, "title": pl.String, "text": pl.String}
    pl.DataFrame([{"text": None, **row} for row in items], schema=schema).write_parquet(folder / "items.parquet")
    kinds = dict.fromkeys(("user_id", "item_id", "timestamp", "task", "query"), pl.String)
    pl.DataFrame(events, schema={**kinds, "shown": pl.List(pl.String)}).write_parquet(folder / "events.parquet")
    return Data(source="table", path=folder)


def run(config: Data, work: Path) -> tuple[sources.Loaded, dict[str, Any]]:
    loaded = sources.load(config)
    tables.write_items(loaded.items, work / "tables" / "items.parquet")
    tables.write_events(loaded.events, work / "tables" / "events.parquet")
    return loaded, expectations.validate(work / "tables", work / "validated", work / "quarantine", work / "validation")


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """One log with every kind of bad row among good ones, ingested and validated."""
    work = tmp_path_factory.mktemp("bad")
    events = [good_event(f"good {n}", n) for n in range(GOOD)]
    events[::2] = [{**event, "task": "search", "query": "red"} for event in events[::2]]
    events += [{**good_event(kind), **change} for kind, (change, _, _) in EVENTS.items()]
    events += [good_event("twice"), good_event("twice")]
    items = [{"item_id": f"i{n}", "title": f"Thing {n}", "text": "A thing."} for n in range(GOOD)]
    items += [row for row, _, _ in BAD_ITEMS.values()]
    loaded, report = run(write_raw(work / "raw", items, events), work)
    read = {name: pl.read_parquet(work / name / "events.parquet") for name in ("validated", "quarantine")}
    read |= {f"{name} items": pl.read_parquet(work / name / "items.parquet") for name in ("validated", "quarantine")}
    return loaded, report, read


@pytest.mark.parametrize("kind", EVENTS)
def test_event(outcome, kind):
    change, what, expected = EVENTS[kind]
    _, report, read = outcome
    mine = pl.col("user_id").eq_missing(pl.lit(change.get("user_id", kind), dtype=pl.String))
    kept, bad = read["validated"].filter(mine).to_dicts(), read["quarantine"].filter(mine).to_dicts()
    if what == KEPT:
        assert not bad
        assert [{name: row[name] for name in expected} for row in kept] == [expected]
    else:
        assert not kept
        assert [row["reason"] for row in bad] == [expected]
        assert report["quarantined"][f"events: {expected}"] >= 1


@pytest.mark.parametrize("kind", BAD_ITEMS)
def test_item(outcome, kind):
    row, what, expected = BAD_ITEMS[kind]
    loaded, _, read = outcome
    if what == DROPPED:
        assert loaded.dropped[expected] == 1
        return
    same = [pl.col(name).eq_missing(pl.lit(row[name], dtype=pl.String)) for name in ("item_id", "title")]
    assert read["quarantine items"].filter(same)["reason"].to_list() == [expected]
    assert read["validated items"].filter(same).is_empty()


def test_event_given_twice_is_dropped_by_name(outcome):
    loaded, _, read = outcome
    assert loaded.dropped["events: exact duplicate of another row"] == 1
    assert len(read["validated"].filter(pl.col("user_id") == "twice")) == 1


def test_every_row_is_accounted_for(outcome):
    loaded, report, read = outcome
    for table, suffix in (("items", " items"), ("events", "")):
        dropped = sum(rows for rule, rows in loaded.dropped.items() if rule.startswith(table))
        quarantined = sum(rows for rule, rows in report["quarantined"].items() if rule.startswith(table))
        assert loaded.rows_in[table] == report["rows_out"][table] + quarantined + dropped
        assert len(read["quarantine" + suffix]) == quarantined
        assert len(read["validated" + suffix]) == report["rows_out"][table]
    assert report["rows_in"]["events"] == GOOD + len(EVENTS) + 1


def table_folder(folder: Path, items: pl.DataFrame | None = None, events: pl.DataFrame | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    default = pl.DataFrame({"user_id": ["u"], "item_id": ["a"], "timestamp": [1_600_000_000]})
    (pl.DataFrame({"item_id": ["a"], "title": ["A"]}) if items is None else items).write_parquet(
        folder / "items.parquet"
    )
    (default if events is None else events).write_parquet(folder / "events.parquet")
    return folder


def file_with(folder: Path, name: str, content: bytes) -> Path:
    table_folder(folder)
    (folder / Path(name).with_suffix(".parquet")).unlink(missing_ok=True)
    (folder / name).write_bytes(content)
    return folder


EVENT = b"user_id,item_id,timestamp\n"
NO_ITEMS = pl.DataFrame(schema={"item_id": pl.String, "title": pl.String})


def csv(content: bytes) -> Any:
    return lambda folder: file_with(folder, "events.csv", content)


def columns(**values: list[Any]) -> Any:
    return lambda folder: table_folder(folder, events=pl.DataFrame(values))


def cut_short(folder: Path) -> Path:
    return file_with(folder, "events.parquet", (table_folder(folder) / "events.parquet").read_bytes()[:-30])


def in_both_formats(folder: Path) -> Path:
    file_with(folder, "items.csv", b"item_id,title\na,A\n")
    return table_folder(folder)


FAULTS: dict[str, tuple[Any, str]] = {
    "absent folder": (lambda folder: folder / "nowhere", "is not a folder"),
    "empty folder": (lambda folder: folder, r"neither items\.parquet nor items\.csv"),
    "empty file": (csv(b""), r"events\.csv is empty"),
    "white space alone": (csv(b"\n \n"), r"events\.csv is empty"),
    "header alone": (csv(EVENT), "gives no events"),
    "no item": (lambda folder: table_folder(folder, items=NO_ITEMS), "gives no items"),
    "broken UTF-8": (csv(EVENT + b"u,a,1600000000\nu\xff,a,1\n"), r"line 3, is not UTF-8"),
    "UTF-16": (csv((EVENT + b"u,a,1600000000\n").decode().encode("utf-16")), "line 1, is not UTF-8.*iconv -f utf-16"),
    "quote that does not close": (csv(EVENT + b'u,"a,1600000000\nu,a,1600000000\n'), "do not fit its header.*quote"),
    "raw quote inside a field": (csv(EVENT + b'u,24" screen,1600000000\n'), "do not fit its header.*written twice"),
    "no readable time at all": (
        csv(EVENT + b"u,a,31/01/2024\nu,a,\n"),
        "1 of 2 values are no time, such as '31/01/2024'",
    ),
    "more fields than the header": (csv(EVENT + b"u,a,1,2,3\n"), "do not fit its header"),
    "fewer fields than the header": (csv(EVENT + b"u,a,1600000000\nu,a\n"), "Row #3: Expected 3 columns, got 2"),
    "two columns of one name": (csv(b"user_id,item_id,timestamp, timestamp\nu,a,1,2\n"), "has two columns 'timestamp'"),
    "missing column": (
        columns(user_id=["u"], item_id=["a"]),
        r"no column timestamp; it has user_id, item_id.*\{events\.timestamp: YOURS\}",
    ),
    "fractional ids": (columns(user_id=[1.5], item_id=["a"], timestamp=[1]), "column 'user_id' is Float64"),
    "lists for ids": (columns(user_id=[["u"]], item_id=["a"], timestamp=[1]), "column 'user_id' is List"),
    "truth values for times": (
        columns(user_id=["u"], item_id=["a"], timestamp=[True]),
        "column 'timestamp' is Boolean, which is no time",
    ),
    "truncated Parquet": (cut_short, "not readable as Parquet"),
    "text called Parquet": (
        lambda folder: file_with(folder, "events.parquet", b"user_id\nu\n"),
        "not readable as Parquet",
    ),
    "both formats": (in_both_formats, r"both items\.parquet and items\.csv"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_file(tmp_path, kind):
    make, message = FAULTS[kind]
    with pytest.raises(GemstError, match=message):
        sources.load(Data(source="table", path=make(tmp_path)))


REVIEW = b'{"reviewerID": "u", "asin": "a", "unixReviewTime": 1529193600}\n'
META = gzip.compress(b'{"asin": "a", "title": "A", "category": ["Toys", "Games"]}\n')


@pytest.mark.parametrize(
    ("reviews", "message"),
    [
        (gzip.compress(REVIEW * 500)[:-40], "damaged or truncated gzip"),
        (REVIEW, "damaged or truncated gzip"),
        (gzip.compress(b""), "is empty"),
        (gzip.compress(REVIEW + b"not json\n"), "not one JSON object a line"),
        (gzip.compress(REVIEW + b'{"reviewerID": "u", "asi'), "not one JSON object a line"),
        (gzip.compress(REVIEW.replace(b'"u"', b'"\xff"')), "line 1, is not UTF-8"),
    ],
    ids=["cut short", "not compressed", "empty", "text", "line cut short", "broken UTF-8"],
)
def test_compressed_file(tmp_path, reviews, message):
    (tmp_path / "Toys_5.json.gz").write_bytes(reviews)
    (tmp_path / "meta_Toys.json.gz").write_bytes(META)
    with pytest.raises(GemstError, match=message):
        sources.load(Data(source="amazon", path=tmp_path))


def test_a_table_that_is_mostly_bad_stops_the_run(tmp_path):
    events = [good_event(f"u{n}", n) for n in range(50)] + [
        {**good_event(f"v{n}"), "timestamp": "soon"} for n in range(50)
    ]
    config = write_raw(tmp_path / "raw", [{"item_id": f"i{n}", "title": "T"} for n in range(50)], events)
    told = r"events: timestamp is given \(50 rows do not\). Look at .*index\.html; the rows .* are in .*quarantine$"
    with pytest.raises(GemstError, match=told):
        run(config, tmp_path)
    assert len(pl.read_parquet(tmp_path / "quarantine" / "events.parquet")) == 50
    assert (tmp_path / "validation" / "docs" / "index.html").exists()
    assert not (tmp_path / "validated").exists()


def test_blank_lines_at_the_end_are_no_rows(tmp_path):
    folder = csv(EVENT + b"u,a,1600000000\n\n\r\n")(tmp_path)
    assert sources.load(Data(source="table", path=folder)).rows_in["events"] == 1


def test_a_column_may_turn_into_text_late(tmp_path, monkeypatch):
    """Types are not guessed from the first chunk: nothing but the number of fields is checked."""
    monkeypatch.setattr(text, "_CHUNK", 64)
    rows = [f"{n},1,,16000000{n:02}" for n in range(10)] + ["ann,B00,green soap,1600000099.5"]
    path = file_with(tmp_path, "events.csv", "\n".join(["user_id,item_id,query,timestamp", *rows, ""]).encode())
    found = text.read_separated(path / "events.csv", ",")
    assert found.rows()[-1] == ("ann", "B00", "green soap", "1600000099.5")
    assert found["query"].null_count() == 10
    (path / "events.csv").write_bytes((path / "events.csv").read_bytes() + b"bob,1\n")
    with pytest.raises(GemstError, match="Row #13: Expected 4 columns, got 2"):
        text.read_separated(path / "events.csv", ",")


def test_utf8_is_checked_across_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "_CHUNK", 3)
    assert text.utf8("aé€😀ü\n".encode(), tmp_path).decode() == "aé€😀ü\n"
    with pytest.raises(GemstError, match="line 2, is not UTF-8"):
        text.utf8("aé\nbb".encode() + b"\xff", tmp_path)
    with pytest.raises(GemstError, match="line 1, is not UTF-8"):
        text.utf8("aé€".encode()[:-1], tmp_path)


def test_the_documentation_names_every_reason():
    text = (PROJECT / "docs" / "data.md").read_text(encoding="utf-8")
    named = [rule.reason for rule in (*rules.item_rules(), *rules.event_rules(dt.datetime.now(dt.UTC)))]
    assert [reason for reason in named if f"| {reason} |" not in text] == []

from __future__ import annotations

import datetime as dt
import json

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from gemst.data import expectations, rules, tables
from gemst.errors import GemstError
from tests.data.conftest import events_table, items_table


def log(count: int = 60, start: int = 0) -> tuple[pl.DataFrame, pl.DataFrame]:
    ids = [f"i{n}" for n in range(10)]
    rows = [(f"u{n % 7}", ids[n % 10], start + n, "red thing" if n % 2 else None) for n in range(count)]
    return items_table(*ids, text=["A thing."] * 10), events_table(*rows)


def validate(work, items: pl.DataFrame, events: pl.DataFrame) -> dict:
    tables.write_items(items, work / "tables" / "items.parquet")
    tables.write_events(events, work / "tables" / "events.parquet")
    return expectations.validate(work / "tables", work / "validated", work / "quarantine", work / "validation")


@pytest.fixture
def small_slices(monkeypatch):
    monkeypatch.setattr(expectations, "_SLICE", 25)


@pytest.mark.usefixtures("small_slices")
def test_good_tables_pass_unchanged_and_leave_a_report(tmp_path):
    items, events = log()
    report = validate(tmp_path, items, events)
    assert report["rows_in"] == report["rows_out"] == {"items": 10, "events": 60}
    assert report["quarantined"] == {}
    assert report["failed"] == []
    assert report["expectations"] >= 30
    assert json.loads((tmp_path / "validation" / "report.json").read_text()) == report
    assert_frame_equal(tables.read_events(tmp_path / "validated" / "events.parquet"), events)
    assert_frame_equal(tables.read_items(tmp_path / "validated" / "items.parquet"), items)
    assert pl.read_parquet(tmp_path / "quarantine" / "events.parquet").columns == [*events.columns, "reason"]
    pages = list((tmp_path / "validation" / "docs" / "validations").rglob("*.html"))
    assert sum("events-" in page.name for page in pages) == 3  # 60 rows in slices of 25
    assert "item_is_listed" in next(page for page in pages if "events-0" in page.name).read_text()


def test_the_report_shows_nobody_s_words(tmp_path):
    items, events = log()
    words = "<script>alert(1)</script>" + "x" * rules.LONGEST_QUERY
    odd = events.with_columns(query=pl.when(pl.int_range(pl.len()) == 0).then(pl.lit(words)).otherwise("query"))
    odd = odd.with_columns(task=pl.when(pl.col("query").is_null()).then("task").otherwise(pl.lit("search")))
    report = validate(tmp_path, items, odd)
    assert sum(report["quarantined"].values()) == 1
    pages = [page.read_text() for page in (tmp_path / "validation" / "docs").rglob("*.html")]
    assert pages
    assert not any("alert(1)" in page for page in pages)


def test_great_expectations_counts_what_the_rules_count(tmp_path):
    """Each rule is said twice, in polars and as an expectation: both must find the same rows bad."""
    now = dt.datetime.now(dt.UTC)
    items, events = log(600)
    bad = {
        "user_id": [None, " ", "u" * 300],
        "item_id": [None, "nowhere"],
        "timestamp": [None, dt.datetime(1950, 1, 1, tzinfo=dt.UTC), dt.datetime(2999, 1, 1, tzinfo=dt.UTC)],
        "task": [None, "browse"],
        "query": ["x" * 2000],
    }
    rows = [{**events.row(1, named=True), column: value} for column, values in bad.items() for value in values]
    rows += [{**events.row(1, named=True), "query": None}, {**events.row(0, named=True), "query": "red"}]
    events = pl.concat([events, pl.DataFrame(rows, schema=tables.EVENTS)])
    marked = rules.mark_items(events, items["item_id"], items["item_id"])
    mine = {rule.reason: int(marked.select(rule.bad.fill_null(False).sum()).item()) for rule in rules.event_rules(now)}
    theirs = unexpected(marked, now, tmp_path)
    assert theirs["user_id is given"] + theirs["user_id is not blank"] == mine["user_id is missing"] == 2
    assert theirs["user_id has at most 256 characters"] == mine["user_id is longer than 256 characters"] == 1
    assert theirs["item_id is given"] == mine["item_id is missing"] == 1
    assert theirs["item is listed"] == mine["item is not in items"] == 1
    assert theirs["item is not in quarantine"] == mine["its item is in quarantine"] == 0
    assert theirs["timestamp is given"] == mine["timestamp is missing or not a time"] == 1
    late, early = mine["timestamp is in the future"], mine["timestamp is before 1990"]
    assert theirs["timestamp is between 1990 and now"] == late + early == 2
    assert theirs["task is given"] + theirs["task is known"] == mine["task is not one of recommendation, search"] == 2
    assert theirs["query is given"] + theirs["query is not blank"] == mine["search without a query"] == 1
    assert theirs["recommendation has no query"] == mine["recommendation with a query"] == 1
    assert theirs["query has at most 1000 characters"] == mine["query is longer than 1000 characters"] == 1


def test_a_row_is_counted_once_where_the_table_is_judged(tmp_path):
    """Six rows in a hundred break one rule, six another, none of them one row in ten."""
    items, events = log(600)
    more = pl.concat([items] * 10).with_columns(item_id=pl.format("{}-{}", "item_id", pl.int_range(pl.len())))
    items = pl.concat([items, more, more.head(7).with_columns(title=pl.lit("another"))])
    at = pl.int_range(pl.len())
    events = events.with_columns(
        item_id=pl.when(at < 36).then(None).when(at < 72).then(pl.lit("nowhere")).otherwise("item_id")
    )
    report = validate(tmp_path, items, events)
    assert report["failed"] == []
    assert report["quarantined"] == {
        "items: item_id is in an earlier row": 7, "events: item_id is missing": 36, "events: item is not in items": 36,
    }  # fmt: skip
    twice = pl.concat([items, more.head(20)])
    with pytest.raises(GemstError, match=r"items: item_id is in no earlier row \(27 rows do not\)"):
        validate(tmp_path, twice, events)


def unexpected(marked: pl.DataFrame, now: dt.datetime, folder) -> dict[str, int]:
    """Great Expectations' own count of unexpected values by expectation."""
    with expectations._context(folder / "docs") as (gx, context, slices):
        marked.select(expectations._CHECKED["events"]).write_parquet(slices / "events.parquet")
        source = context.data_sources.add_pandas_filesystem("tables", base_directory=slices)
        batch = source.add_parquet_asset("events").add_batch_definition_path("all", path="events.parquet").get_batch()
        result = batch.validate(gx.ExpectationSuite(name="events", expectations=expectations._event_suite(now)))
    return {one.expectation_config.notes: one.result.get("unexpected_count", 0) for one in result.results}


def test_next_version_is_compared_with_the_last_accepted_one(tmp_path):
    validate(tmp_path, *log(60))
    grown = validate(tmp_path, *log(90))
    assert grown["accepted"]["events"] == 90
    before = (tmp_path / "validated" / "events.parquet").read_bytes()
    for _ in range(2):  # a refused version does not become the measure of the next
        with pytest.raises(GemstError, match=r"events is near the last version's \(90\), but is 30.*delete"):
            validate(tmp_path, *log(30))
    assert (tmp_path / "validated" / "events.parquet").read_bytes() == before
    assert json.loads((tmp_path / "validation" / "report.json").read_text())["accepted"]["events"] == 90
    assert validate(tmp_path, *log(80, start=10))["accepted"]["events"] == 80


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda items, events: (items, events.with_columns(pl.col("timestamp").dt.offset_by("-1y"))), "newest"),
        (lambda items, events: (items, events.filter(pl.col("task") == "search")), "search_share"),
        (lambda items, events: (items, events.with_columns(item_id=pl.lit("i0"))), "top_item_share"),
        (lambda items, events: (items, events.with_columns(pl.col("query") + " and many more words")), "query_words"),
        (lambda items, events: (items.head(3), events.filter(pl.col("item_id").is_in(["i0", "i1", "i2"]))), "items"),
        (lambda items, events: (items, events.with_columns(user_id=pl.lit("u0"))), "users"),
    ],
)  # fmt: skip
def test_drift_stops_the_run(tmp_path, change, message):
    validate(tmp_path, *log())
    with pytest.raises(GemstError, match=f"versions: {message} is near the last version's"):
        validate(tmp_path, *change(*log()))


def test_no_good_event_left_is_an_error(tmp_path):
    items, events = log()
    with pytest.raises(GemstError, match=r"item is listed.*keep them in items or leave their events out"):
        validate(tmp_path, items, events.with_columns(item_id=pl.lit("nowhere")))


def test_a_refused_table_leaves_its_bad_rows_with_reasons_and_the_good_ones_of_before(tmp_path):
    items, events = log()
    validate(tmp_path, items, events)
    before = (tmp_path / "validated" / "events.parquet").read_bytes()
    with pytest.raises(GemstError, match=r"timestamp is given.*are in .*quarantine"):
        validate(tmp_path, items, events.with_columns(timestamp=pl.lit(None, events.schema["timestamp"])))
    bad = pl.read_parquet(tmp_path / "quarantine" / "events.parquet")
    assert len(bad) == len(events)
    assert bad["reason"].unique().to_list() == ["timestamp is missing or not a time"]
    assert (tmp_path / "validated" / "events.parquet").read_bytes() == before


@pytest.mark.usefixtures("small_slices")
def test_bad_rows_that_lie_together_are_judged_in_the_whole_table(tmp_path):
    """Rows come sorted by user, nulls first: a slice of its own may be bad throughout."""
    items, events = log(300)
    users = [None] * 20 + events["user_id"].to_list()[20:]
    report = validate(tmp_path, items, events.with_columns(user_id=pl.Series(users)))
    assert report["quarantined"] == {"events: user_id is missing": 20}
    users = [None] * 31 + users[31:]
    with pytest.raises(GemstError, match=r"events: user_id is given \(31 rows do not\)"):
        validate(tmp_path, items, events.with_columns(user_id=pl.Series(users)))


def test_a_time_beyond_the_calendar_goes_to_quarantine(tmp_path):
    items, events = log(60)
    far = [*events["timestamp"].cast(pl.Int64).to_list()[:-1], 1_600_000_000_000_000]
    events = events.with_columns(timestamp=pl.Series(far).cast(events.schema["timestamp"]))
    assert validate(tmp_path, items, events)["quarantined"] == {"events: timestamp is in the future": 1}


def test_a_row_without_a_title_does_not_take_the_place_of_one_that_has_it():
    items = items_table("a", "a", "b", "a").with_columns(title=pl.Series(["", "Soap", "Brush", "Soaps"]))
    assert rules.judge(items, rules.item_rules()).to_list() == [
        "title is missing", None, None, "item_id is in an earlier row",
    ]  # fmt: skip


def test_a_task_that_is_gone_stops_the_run(tmp_path):
    items, events = log(100)
    few = events.with_columns(query=pl.when(pl.int_range(pl.len()) % 10 == 0).then(pl.lit("red thing")))
    few = few.with_columns(
        task=pl.when(pl.col("query").is_null()).then(pl.lit("recommendation")).otherwise(pl.lit("search"))
    )
    validate(tmp_path, items, few)
    none = few.with_columns(query=pl.lit(None, dtype=pl.String), task=pl.lit("recommendation"))
    with pytest.raises(GemstError, match=r"query_words is known; versions: search_share is near .* but is 0\.0"):
        validate(tmp_path, items, none)

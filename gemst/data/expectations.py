"""Validation with Great Expectations: bad rows go to quarantine with their reason, a bad table stops the run.

Row rules hold for every row that is let through; as an expectation over a table as it came, each must hold for nine
rows in ten, or the table itself is broken. Volume, freshness and distributions are compared with the last accepted
version. Great Expectations reads Parquet slices of bounded size, so its memory stays flat as logs grow; what it counts
in them is judged for the table as a whole.
"""

from __future__ import annotations

import datetime as dt
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl

from gemst.data import rules
from gemst.data.tables import TASKS, read_events, read_items, write_events, write_items
from gemst.errors import GemstError
from gemst.files import atomic_folder, read_json, write_json

MOSTLY = 0.9  # the share of rows that must satisfy a row rule for the table to be worth cleaning
_LISTED = "item is listed"
_SLICE = 1_000_000  # rows that Great Expectations holds at once
_ROUNDING = 1e-6  # rows
_PYTHON_TIMES = (dt.datetime(1, 1, 1, tzinfo=dt.UTC), dt.datetime(9999, 12, 31, tzinfo=dt.UTC))  # all it can write down
_CHECKED = {
    "items": ["item_id", "title", "text", "item_id_is_first"],
    "events": ["user_id", "item_id", "timestamp", "task", "query", "item_is_listed", "item_is_good"],
}


def validate(tables: Path, validated: Path, quarantine: Path, validation: Path) -> dict[str, Any]:
    """Check `tables`: good rows go to `validated`, bad ones to `quarantine`, report and Data Docs to `validation`.

    The report (also `validation`/report.json) has rows_in and rows_out per table, quarantined by "table: reason",
    expectations (how many hold), failed (names), profile, and accepted: the profile the next version is compared with.
    Raises GemstError when an expectation fails for a table; the report, the Data Docs and the quarantine, which holds
    the rows to mend, are written first, and `validated` is left as it was.
    """
    items, events = read_items(tables / "items.parquet"), read_events(tables / "events.parquet")
    now = dt.datetime.now(dt.UTC)
    why_items, why_events = rules.judge_tables(items, events, now)
    good_items, good_events = items.filter(why_items.is_null()), events.filter(why_events.is_null())
    marked = rules.mark_items(events, items["item_id"], good_items["item_id"])
    firsts = items.with_columns(item_id_is_first=(why_items != rules.REPEATED).fill_null(True))
    profile = rules.profile(good_items, good_events)
    previous = _accepted(validation)
    with atomic_folder(validation) as folder:
        outcome = _great_expectations(firsts, marked, profile, previous, now, folder / "docs")
        failed = sorted(_failure(name, bad, profile) for name, (holds, bad) in outcome.items() if not holds)
        report = {
            "rows_in": {"items": len(items), "events": len(events)},
            "rows_out": {"items": len(good_items), "events": len(good_events)},
            "quarantined": rules.count("items", why_items) | rules.count("events", why_events),
            "expectations": sum(holds for holds, _ in outcome.values()),
            "failed": failed,
            "profile": profile,
            "accepted": previous if failed else profile,
        }
        write_json(folder / "report.json", report)
    with atomic_folder(quarantine) as folder:
        items.with_columns(why_items).filter(why_items.is_not_null()).write_parquet(folder / "items.parquet")
        events.with_columns(why_events).filter(why_events.is_not_null()).write_parquet(folder / "events.parquet")
    if failed:
        fix = f"Look at {validation / 'docs' / 'index.html'}"
        if report["quarantined"]:
            fix += f"; the rows and what is wrong with each are in {quarantine}"
        if any(_LISTED in name for name in failed):
            fix += "; where items have left the catalogue, keep them in items or leave their events out"
        if all(name.startswith("versions: ") for name in failed):
            fix += f"; to accept a real change of the data, delete {validation}"
        raise GemstError(f"{len(failed)} expectations fail: {'; '.join(failed)}", fix)
    with atomic_folder(validated) as folder:
        write_items(good_items, folder / "items.parquet")
        write_events(good_events, folder / "events.parquet")
    return report


def _failure(name: str, bad: int, profile: dict[str, Any]) -> str:
    """An expectation that fails, and by how much."""
    suite, _, said = name.partition(": ")
    if suite == "versions":
        return f"{name}, but is {profile[said.split()[0]]}" if "last version" in said else name
    return f"{name} ({bad:,} rows do not)" if bad else name


def _accepted(validation: Path) -> dict[str, Any] | None:
    path = validation / "report.json"
    return read_json(path).get("accepted") if path.exists() else None


def _great_expectations(
    items: pl.DataFrame,
    events: pl.DataFrame,
    profile: dict[str, Any],
    previous: dict[str, Any] | None,
    now: dt.datetime,
    docs: Path,
) -> dict[str, tuple[bool, int]]:
    """Run the suites and build the Data Docs; returns, by readable name, whether each expectation holds and for how
    many rows it does not."""
    suites = {"items": _item_suite(), "events": _event_suite(now), "versions": _version_suite(profile, previous)}
    versions = pl.DataFrame([profile]).with_columns(pl.col("^newest$").str.to_datetime(time_zone="UTC"))
    frames = {
        "items": items.select(_CHECKED["items"]),
        "events": events.select(_CHECKED["events"]).with_columns(pl.col("timestamp").clip(*_PYTHON_TIMES)),
        "versions": versions,
    }
    counts: dict[str, tuple[bool, int, float]] = {}  # by name: whether all else holds, bad rows, rows that may be bad
    with _context(docs) as (gx, context, folder):
        source = context.data_sources.add_pandas_filesystem("tables", base_directory=folder)
        definitions = []
        for table, frame in frames.items():
            suite = context.suites.add(gx.ExpectationSuite(name=table, expectations=suites[table]))
            slices = -(-len(frame) // _SLICE) or 1
            for number in range(slices):
                name, start = f"{table}-{number}", number * len(frame) // slices
                length = (number + 1) * len(frame) // slices - start
                frame.slice(start, length).write_parquet(folder / f"{name}.parquet", compression="lz4")
                batch = source.add_parquet_asset(name).add_batch_definition_path("all", path=f"{name}.parquet")
                definitions.append(
                    context.validation_definitions.add(gx.ValidationDefinition(name=name, data=batch, suite=suite))
                )
        # No example values: the pages show them unescaped, and they are people's words. Quarantine has the rows.
        shown = {"result_format": "BASIC", "partial_unexpected_count": 0}
        checkpoint = context.checkpoints.add(
            gx.Checkpoint(name="gemst", validation_definitions=definitions, result_format=shown)
        )
        result = checkpoint.run()
        context.build_data_docs(site_names=["docs"])
        for validated in result.run_results.values():
            for one in validated.results:
                name = f"{validated.suite_name}: {one.expectation_config.notes}"
                holds, bad, allowed = counts.get(name, (True, 0, 0.0))
                if "unexpected_count" in one.result:
                    judged = one.result["element_count"] - one.result.get("missing_count", 0)
                    bad += one.result["unexpected_count"]
                    allowed += judged * (1 - one.expectation_config.kwargs.get("mostly", 1))
                else:
                    holds = holds and bool(one.success)
                counts[name] = holds, bad, allowed
    return {name: (holds and bad <= allowed + _ROUNDING, bad) for name, (holds, bad, allowed) in counts.items()}


@contextmanager
def _context(docs: Path) -> Iterator[tuple[Any, Any, Path]]:
    """Great Expectations without telemetry, progress bars or a project folder; a temporary folder for the slices."""
    from tempfile import TemporaryDirectory

    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
    import great_expectations as gx

    logging.getLogger("great_expectations").setLevel(logging.ERROR)
    context: Any = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False, "metric_calculations": False}
    site = {
        "class_name": "SiteBuilder",
        "show_how_to_buttons": False,
        "store_backend": {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(docs.resolve())},
        "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
    }
    context.add_data_docs_site("docs", site)
    with TemporaryDirectory(prefix="gemst-validate-") as folder:
        yield gx, context, Path(folder)


def _item_suite() -> list[Any]:
    import great_expectations.expectations as gxe

    return [
        gxe.ExpectTableColumnsToMatchSet(column_set=_CHECKED["items"], notes="columns"),
        gxe.ExpectTableRowCountToBeBetween(min_value=1, notes="has rows"),
        *_text("item_id", rules.LONGEST_ID),
        *_text("title", rules.LONGEST_TITLE),
        gxe.ExpectColumnValueLengthsToBeBetween(
            column="text",
            max_value=rules.LONGEST_TEXT,
            mostly=MOSTLY,
            notes=f"text has at most {rules.LONGEST_TEXT} characters",
        ),
        gxe.ExpectColumnValuesToBeInSet(
            column="item_id_is_first", value_set=[True], mostly=MOSTLY, notes="item_id is in no earlier row"
        ),
    ]


def _event_suite(now: dt.datetime) -> list[Any]:
    import great_expectations.expectations as gxe
    from great_expectations.expectations.row_conditions import Column

    search, recommendation = Column("task") == TASKS[1], Column("task") == TASKS[0]
    return [
        gxe.ExpectTableColumnsToMatchSet(column_set=_CHECKED["events"], notes="columns"),
        gxe.ExpectTableRowCountToBeBetween(min_value=1, notes="has rows"),
        *_text("user_id", rules.LONGEST_ID),
        *_text("item_id", rules.LONGEST_ID),
        gxe.ExpectColumnValuesToBeInSet(
            column="item_is_listed", value_set=[True], mostly=MOSTLY, notes=_LISTED
        ),
        gxe.ExpectColumnValuesToBeInSet(
            column="item_is_good", value_set=[True], mostly=MOSTLY, notes="item is not in quarantine"
        ),
        gxe.ExpectColumnValuesToBeOfType(column="timestamp", type_="Timestamp", notes="timestamp is a time"),
        gxe.ExpectColumnValuesToNotBeNull(column="timestamp", mostly=MOSTLY, notes="timestamp is given"),
        gxe.ExpectColumnValuesToBeBetween(
            column="timestamp", min_value=rules.EARLIEST, max_value=now + rules.CLOCK_SKEW, mostly=MOSTLY,
            notes=f"timestamp is between {rules.EARLIEST:%Y} and now",
        ),
        gxe.ExpectColumnValuesToNotBeNull(column="task", mostly=MOSTLY, notes="task is given"),
        gxe.ExpectColumnValuesToBeInSet(column="task", value_set=list(TASKS), mostly=MOSTLY, notes="task is known"),
        gxe.ExpectColumnValuesToNotBeNull(column="query", row_condition=search, mostly=MOSTLY, notes="query is given"),
        gxe.ExpectColumnValuesToMatchRegex(
            column="query", regex=rules.VISIBLE, mostly=MOSTLY, notes="query is not blank"
        ),
        gxe.ExpectColumnValuesToBeNull(
            column="query", row_condition=recommendation, mostly=MOSTLY, notes="recommendation has no query"
        ),
        gxe.ExpectColumnValueLengthsToBeBetween(
            column="query", max_value=rules.LONGEST_QUERY, mostly=MOSTLY,
            notes=f"query has at most {rules.LONGEST_QUERY} characters",
        ),
    ]  # fmt: skip


def _version_suite(profile: dict[str, Any], previous: dict[str, Any] | None) -> list[Any]:
    """Over the one-row table of the profile: something is left, and it resembles the last accepted version."""
    import great_expectations.expectations as gxe

    suite: list[Any] = [gxe.ExpectColumnValuesToBeBetween(column="events", min_value=1, notes="some events are good")]
    if previous is None or not profile["events"]:
        return suite
    for column, (least, most) in rules.bounds(previous).items():
        notes = f"{column} is near the last version's ({previous[column]})"
        suite.append(gxe.ExpectColumnValuesToBeBetween(column=column, min_value=least, max_value=most, notes=notes))
        suite.append(gxe.ExpectColumnValuesToNotBeNull(column=column, notes=f"{column} is known"))
    return suite


def _text(column: str, longest: int) -> list[Any]:
    import great_expectations.expectations as gxe

    return [
        gxe.ExpectColumnValuesToNotBeNull(column=column, mostly=MOSTLY, notes=f"{column} is given"),
        gxe.ExpectColumnValuesToMatchRegex(
            column=column, regex=rules.VISIBLE, mostly=MOSTLY, notes=f"{column} is not blank"
        ),
        gxe.ExpectColumnValueLengthsToBeBetween(
            column=column, max_value=longest, mostly=MOSTLY, notes=f"{column} has at most {longest} characters"
        ),
    ]

"""Qilin, the search and recommendation log of a note-sharing app, in its two public layouts.

CSV (`search_train.csv`, ... with arrays in their printed form) and Parquet (`search_train.parquet` or
`search_train/*.parquet` with nested columns): notes, search_train, search_test, recommendation_train,
recommendation_test.

A row of the log files is one request: its clicked notes are events of one `request_id`, its other notes are their
`shown`; all happen when the page was first shown. Each request also lists the user's recent clicks, newest first,
without times or task. They become recommendation events just before the earliest request that lists them, in their
order (a proxy: the task is not known), unless the log itself has the click at or before that time.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from gemst.config import Data
from gemst.data.sources.base import Loaded
from gemst.data.sources.text import numeric_time, read_separated
from gemst.data.tables import RECOMMENDATION, SEARCH
from gemst.errors import GemstError

_FILES = {SEARCH: ("search_train", "search_test"), RECOMMENDATION: ("recommendation_train", "recommendation_test")}
_FIELDS = {
    SEARCH: ("search_result_details_with_idx", "search_idx"),
    RECOMMENDATION: ("rec_result_details_with_idx", "request_idx"),
}
_TITLE_FROM_TEXT = 80  # characters of the text that stand for an empty title


def load(config: Data) -> Loaded:
    """Read notes and logs in `config.path`. Raises GemstError naming the file or column at fault."""
    requests = pl.concat([_requests(config.path, task, name) for task, names in _FILES.items() for name in names])
    requests = requests.with_row_index("request")
    entries = (
        requests.filter(pl.col("results").list.len() > 0)
        .select("request", "results")
        .explode("results", empty_as_null=True)
        .unnest("results")
    )
    results = entries.filter(pl.col("item_id").is_not_null())
    times = results.group_by("request").agg(pl.col("timestamp").min())
    requests = requests.drop("results").join(times, on="request", how="left", maintain_order="left")
    missed = results.filter(~pl.col("clicked")).group_by("request", maintain_order=True).agg(shown="item_id")
    clicks = (
        results.filter("clicked")
        .select("request", "item_id")
        .join(requests.drop("recent"), on="request", maintain_order="left")
        .join(missed, on="request", how="left", maintain_order="left")
    )
    recent, blank, again, logged = _recent(requests, clicks)
    events = pl.concat([clicks.drop("request"), recent], how="diagonal")
    items, rows = _items(config.path, events)
    return Loaded(
        items,
        events,
        dropped={
            "events: result without a note": entries.height - results.height,
            "events: shown and not clicked (kept in `shown` of the clicks)": results.height - clicks.height,
            "events: recent click without a note": blank,
            "events: recent click that an earlier request lists": again,
            "events: recent click that the log has at or before that time": logged,
        },
        rows_in={
            **rows,
            "events": entries.height,
            "events: recent clicks": recent.height + blank + again + logged,
        },
        mapping={
            "items.item_id": "note_idx",
            "items.title": f"note_title, else the first {_TITLE_FROM_TEXT} characters of note_content",
            "items.text": "note_content",
            "items.categories": "absent (taxonomy ids are no words)",
            "events.user_id": "user_idx",
            "events.item_id": "note_idx of clicked results, and recent_clicked_note_idxs",
            "events.timestamp": "when the page was first shown; recent clicks: just before it",
            "events.task": "the file; recent clicks: recommendation (proxy)",
            "events.query": "query",
            "events.request_id": "search_idx, request_idx",
            "events.shown": "results that were not clicked",
        },
    )


def _requests(folder: Path, task: str, name: str) -> pl.DataFrame:
    """Columns user_id, query, task, request_id, recent list[str], results list[struct item_id, clicked, timestamp].

    Ids that are no whole numbers are null.
    """
    details, idx = _FIELDS[task]
    table = _read(
        folder, name, "user_idx", "recent_clicked_note_idxs", details, idx, *(["query"] if task == SEARCH else [])
    )
    if table.schema[details] == pl.String:
        recent = pl.col("recent_clicked_note_idxs").str.extract_all(r"[^\s,'\"\[\]]+")
        entry = pl.element()
        number = r"': '?(-?[\d.]+(?:e[+-]?\d+)?)"
        results = (
            pl.col(details)
            .str.extract_all(r"\{[^}]*\}")
            .list.eval(
                pl.struct(
                    item_id=_id(entry.str.extract("'note_idx" + number)),
                    clicked=_positive(entry.str.extract("'click" + number)),
                    timestamp=numeric_time(entry.str.extract("'(?:search|request)_timestamp" + number)),
                )
            )
        )
    else:
        recent = pl.col("recent_clicked_note_idxs").cast(pl.List(pl.String))
        field = "search_timestamp" if task == SEARCH else "request_timestamp"
        fields = pl.element().struct
        results = pl.col(details).list.eval(
            pl.struct(
                item_id=_id(fields.field("note_idx")),
                clicked=_positive(fields.field("click")),
                timestamp=numeric_time(fields.field(field).cast(pl.Float64, strict=False).cast(pl.String)),
            )
        )
    prefix = "s" if task == SEARCH else "r"
    return table.select(
        user_id=_id(pl.col("user_idx")),
        query=pl.col("query").str.strip_chars() if task == SEARCH else pl.lit(None, dtype=pl.String),
        task=pl.lit(task),
        request_id=pl.lit(prefix) + _id(pl.col(idx)),
        recent=recent.list.eval(_id(pl.element())).fill_null([]),
        results=results,
    )


def _id(values: pl.Expr) -> pl.Expr:
    """Whole numbers as text, also when written 7.0 (as pandas does beside missing ones); null for anything else."""
    text = values.cast(pl.String).str.strip_chars()
    number = text.cast(pl.Float64, strict=False)
    whole = pl.when(number == number.floor()).then(number.cast(pl.Int64, strict=False))
    # Integers first: a float does not hold every digit of a large one.
    return pl.coalesce(text.cast(pl.Int64, strict=False), whole).cast(pl.String)


def _positive(values: pl.Expr) -> pl.Expr:
    """Whether a number is above zero; false where there is none."""
    return (values.cast(pl.Float64, strict=False).fill_nan(None) > 0).fill_null(False)


def _recent(requests: pl.DataFrame, clicks: pl.DataFrame) -> tuple[pl.DataFrame, int, int, int]:
    """Events of recent clicks.

    Also how many have no note, how many an earlier request lists, how many the log has at or before their time.
    """
    every = (
        requests.select("user_id", "request_id", "timestamp", "recent")
        .filter(pl.col("recent").list.len() > 0)
        .with_columns(place=pl.int_ranges(1, pl.col("recent").list.len() + 1))
        .explode("recent", "place", empty_as_null=True)
        .rename({"recent": "item_id"})
        .sort("user_id", "timestamp", "request_id", "place", nulls_last=True)  # no time is not the earliest one
    )
    listed = every.filter(pl.col("item_id").is_not_null())
    # Users that are not known go to quarantine row by row: they are not one user.
    first = listed.filter(pl.struct("user_id", "item_id").is_first_distinct() | pl.col("user_id").is_null())
    logged = clicks.group_by("user_id", "item_id").agg(logged=pl.col("timestamp").min())
    fresh = first.join(logged, on=["user_id", "item_id"], how="left", maintain_order="left").filter(
        pl.col("logged").is_null() | (pl.col("logged") > pl.col("timestamp"))
    )
    events = fresh.select(
        "user_id",
        "item_id",
        timestamp=pl.col("timestamp") - pl.duration(milliseconds=pl.col("place"), time_unit="ms"),
        task=pl.lit(RECOMMENDATION),
    )
    return events, every.height - listed.height, listed.height - first.height, first.height - fresh.height


def _items(folder: Path, events: pl.DataFrame) -> tuple[pl.DataFrame, dict[str, int]]:
    """The notes, and a stand-in titled by its number for every clicked note that the notes file lacks."""
    notes = _read(folder, "notes", "note_idx", "note_title", "note_content")
    text = pl.col("note_content").cast(pl.String).str.strip_chars()
    title = pl.col("note_title").cast(pl.String).str.strip_chars().replace(["", "nan"], None)
    listed = notes.select(
        item_id=_id(pl.col("note_idx")),
        title=pl.coalesce(title, text.str.slice(0, _TITLE_FROM_TEXT)),
        text=text,
    )
    absent = events.select("item_id").unique().join(listed, on="item_id", how="anti")
    stand_ins = absent.with_columns(title=pl.format("note {}", "item_id"), text=pl.lit(None, dtype=pl.String))
    items = pl.concat([listed, stand_ins]).with_columns(categories=pl.lit([], dtype=pl.List(pl.String)))
    return items, {"items": len(listed), "items: clicked note without an entry in notes": len(stand_ins)}


def _read(folder: Path, name: str, *columns: str) -> pl.DataFrame:
    """One table in either layout, with the named columns."""
    parquet = sorted(folder.glob(f"{name}/*.parquet")) or sorted(folder.glob(f"{name}.parquet"))
    if parquet:
        try:
            table = pl.concat([pl.read_parquet(path) for path in parquet], how="vertical_relaxed")
        except (pl.exceptions.PolarsError, OSError) as error:
            raise GemstError(f"{parquet[0].parent} is not readable as Parquet ({error})", "Download it again") from None
    else:
        table = read_separated(folder / f"{name}.csv", ",", quoted=True)
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise GemstError(f"{name} in {folder} lacks the column {missing[0]}", f"It has {', '.join(table.columns)}")
    return table.select(columns)

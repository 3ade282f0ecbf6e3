"""HetRec 2011 Last.fm-2k and MovieLens-2k: tags that users applied, as the queries they would search by.

Every tag assignment is a search event: the tag is the query, the tagged item the click; items given one tag at one
time by a user are one request. A recommendation event is added at the user's FIRST event with an item, so that every
tag the user ever put on the item lies at or after it, and by the strict time rule in none of its histories. Most
dates are known to the month alone: such events tie, and tied events are in nobody's history. Dates older than the web
are kept for `validate` to quarantine, but start no recommendation event.

Items have no categories here: they could only come from tags, and would hand the query to the model.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from gemst.config import Data
from gemst.data.rules import EARLIEST
from gemst.data.sources.base import Loaded
from gemst.data.sources.text import numeric_time, read_separated
from gemst.data.tables import RECOMMENDATION, SEARCH
from gemst.errors import GemstError

# catalogue file -> (its title columns, tag assignments, column of the item)
_LAYOUTS = {
    "artists.dat": ("name", "user_taggedartists", "artistID"),
    "movies.dat": ("title", "user_taggedmovies", "movieID"),
}


def load(config: Data) -> Loaded:
    """Read the Last.fm or MovieLens files in `config.path`. Raises GemstError naming the file or column at fault."""
    names = [name for name in _LAYOUTS if (config.path / name).exists()]
    if len(names) != 1:
        raise GemstError(
            f"{config.path} holds neither artists.dat nor movies.dat", "Unpack one HetRec 2011 data set there"
        )
    title, stem, item = _LAYOUTS[names[0]]
    catalogue = _read(config.path / names[0], "id", title)
    years = pl.format(" ({})", "year") if "year" in catalogue.columns else pl.lit("")
    items = catalogue.select(
        item_id="id",
        title=pl.concat_str(pl.col(title).str.strip_chars(), years.fill_null("")),
        text=pl.lit(None, dtype=pl.String),
        categories=pl.lit([], dtype=pl.List(pl.String)),
    )
    assignments, source = _assignments(config.path, stem, item)
    searches = (
        assignments.join(_tags(config.path), on="tagID", how="left")
        .with_columns(
            task=pl.lit(SEARCH),
            request_id=pl.format("{}:{}:{}", "user_id", "tagID", pl.col("timestamp").dt.epoch("ms")),
        )
        .drop("tagID")
    )
    first = (
        assignments.filter(pl.col("timestamp") >= EARLIEST)
        .group_by("user_id", "item_id")
        .agg(pl.col("timestamp").min())
        .with_columns(task=pl.lit(RECOMMENDATION))
    )
    return Loaded(
        items,
        pl.concat([searches, first], how="diagonal"),
        rows_in={"items": len(items), "events": len(assignments), "events: first tag of an item by a user": len(first)},
        mapping={
            "items.item_id": "id",
            "items.title": title,
            "items.text": "absent",
            "items.categories": "absent (tags would hand over the query)",
            "events.user_id": "userID",
            "events.item_id": item,
            "events.timestamp": source,
            "events.task": "search for each tag, recommendation for the user's first event with an item",
            "events.query": "proxy: the tag",
            "events.request_id": "user, tag and time",
        },
    )


def _assignments(folder: Path, stem: str, item: str) -> tuple[pl.DataFrame, str]:
    """Columns user_id, item_id, tagID, timestamp, and what the timestamp is made of."""
    exact = folder / f"{stem}-timestamps.dat"
    if exact.exists():
        table = _read(exact, "userID", item, "tagID", "timestamp")
        time, source = numeric_time(pl.col("timestamp")), "timestamp"
    else:
        table = _read(folder / f"{stem}.dat", "userID", item, "tagID")
        prefix = "date_" if "date_year" in table.columns else ""
        parts = [pl.col(f"{prefix}{part}") for part in ("year", "month", "day")]
        date = pl.concat_str(parts[0].str.zfill(4), parts[1].str.zfill(2), parts[2].str.zfill(2), separator="-")
        time = date.str.to_datetime("%Y-%m-%d", strict=False, time_unit="ms", time_zone="UTC")
        source = "day, month and year (mostly the month alone)"
    return table.select("tagID", user_id="userID", item_id=item, timestamp=time), source


def _tags(folder: Path) -> pl.DataFrame:
    """Columns tagID, query."""
    table = read_separated(folder / "tags.dat", "\t", latin1=True)
    if len(table.columns) != 2:
        raise GemstError(f"{folder / 'tags.dat'} has {len(table.columns)} columns, need id and tag")
    tags = table.rename(dict(zip(table.columns, ("tagID", "query"), strict=True)))
    # A tagID given twice has the tag that sorts first, whatever the order of the file.
    return tags.select("tagID", pl.col("query").str.strip_chars()).sort("tagID", "query").unique("tagID", keep="first")


def _read(path: Path, *needed: str) -> pl.DataFrame:
    table = read_separated(path, "\t", latin1=True)
    missing = [name for name in needed if name not in table.columns]
    if missing:
        raise GemstError(f"{path} lacks the column {missing[0]}", f"It has {', '.join(table.columns)}")
    return table.with_columns(pl.col(pl.String).replace("\\N", None))

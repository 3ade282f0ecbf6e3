"""Amazon reviews, 2018 (`NAME.json.gz` and `meta_NAME.json.gz`) and 2023 (`NAME.jsonl.gz` and `meta_NAME.jsonl.gz`).

Queries are a proxy, built as in Ai et al. (Learning a Hierarchical Embedding Model for Personalized Product Search,
SIGIR 2017): the words of the item's category path, when it has at least two levels, in lower case, without
punctuation, stop words and repeated words. A fixed hash gives half of the reviews to search (see proxy.py); a review
of an item without such a path is a recommendation.
"""

from __future__ import annotations

from html import unescape
from html.entities import html5
from pathlib import Path

import polars as pl

from gemst.config import Data
from gemst.data.sources.base import Loaded
from gemst.data.sources.proxy import one_each, split_tasks
from gemst.data.sources.text import numeric_time, read_json_lines
from gemst.errors import GemstError

_SUFFIXES = (".json.gz", ".jsonl.gz", ".json", ".jsonl")
_STOP_WORDS = [
    "a",
    "an",
    "and",
    "are",
    "as",
    "at",
    "be",
    "by",
    "for",
    "from",
    "has",
    "in",
    "into",
    "is",
    "it",
    "its",
    "no",
    "not",
    "of",
    "on",
    "or",
    "other",
    "s",
    "such",
    "that",
    "the",
    "their",
    "these",
    "this",
    "to",
    "was",
    "will",
    "with",
]
_ENTITIES = {f"&{name}": text for name, text in html5.items() if name.endswith(";")}
_ENTITIES |= {
    written: unescape(f"&#{n};")  # what a browser makes of it: 128 to 159 are Windows' letters
    for n in range(32, 0x2100)
    for written in (f"&#{n};", f"&#0{n};", f"&#x{n:x};", f"&#x{n:X};")
}
_ENTITIES |= {written: " " for written, text in _ENTITIES.items() if text.isspace()}


def load(config: Data) -> Loaded:
    """Read the one review file and its metadata in `config.path`. Raises GemstError naming the file at fault."""
    reviews, meta = _one(config.path, is_meta=False), _one(config.path, is_meta=True)
    log = _reviews(reviews)
    catalogue = _catalogue(meta)
    events = split_tasks(log, one_each(catalogue).select("item_id", choices=_query().list.drop_nulls()))
    return Loaded(
        catalogue.select("item_id", "title", "text", "categories"),
        events,
        rows_in={"items": len(catalogue), "events": len(events)},
        mapping={
            "items.item_id": "parent_asin, else asin",
            "items.title": "title",
            "items.text": "description",
            "items.categories": "categories (2023) or category (2018)",
            "events.user_id": "user_id (2023) or reviewerID (2018)",
            "events.item_id": "parent_asin, else asin",
            "events.timestamp": "timestamp (2023) or unixReviewTime (2018)",
            "events.task": "fixed hash of the review, half to each task",
            "events.query": "proxy: words of the category path, as Ai et al. 2017",
        },
    )


def _reviews(path: Path) -> pl.DataFrame:
    """Columns user_id, item_id, timestamp."""
    names = ("user_id", "reviewerID", "parent_asin", "asin", "timestamp", "unixReviewTime")
    table = read_json_lines(path, {name: pl.String() for name in names})
    return table.select(
        user_id=pl.coalesce("user_id", "reviewerID"),
        item_id=pl.coalesce("parent_asin", "asin"),
        timestamp=numeric_time(pl.coalesce("timestamp", "unixReviewTime")),
    )


def _catalogue(path: Path) -> pl.DataFrame:
    """Columns item_id, title, text, categories; HTML left over from the pages is taken out."""
    many = pl.List(pl.String)
    kinds = {"parent_asin": pl.String(), "asin": pl.String(), "title": pl.String(), "description": many}
    table = read_json_lines(path, {**kinds, "categories": many, "category": many})
    if not table.filter(
        pl.any_horizontal(pl.col("categories", "category").list.first().str.starts_with('["'))
    ).is_empty():
        raise GemstError(
            f"{path} holds lists of category paths, as the release of 2014 did",
            "Use the 2018 or the 2023 release, or write items and events as tables (data.source: table)",
        )
    description = _plain(pl.col("description").list.join(" "))
    categories = pl.coalesce("categories", "category").list.eval(_plain(pl.element()))
    return table.select(
        item_id=pl.coalesce("parent_asin", "asin"),
        title=_plain(pl.col("title")),
        text=pl.when(description.str.len_bytes() > 0).then(description),
        categories=categories.list.eval(pl.element().filter(pl.element().str.len_bytes() > 0)),
    )


def _query() -> pl.Expr:
    """list[str] of one query, or empty for an item whose category path has fewer than two levels."""
    path = pl.col("categories")
    words = path.list.join(" ").str.to_lowercase().str.extract_all(r"[\p{L}\p{N}]+")
    kept = words.list.eval(pl.element().filter(~pl.element().is_in(_STOP_WORDS))).list.unique(maintain_order=True)
    query = pl.when(path.list.len() >= 2, kept.list.len() > 0).then(kept.list.join(" "))
    return pl.concat_list(query)


def _plain(text: pl.Expr) -> pl.Expr:
    """Text without tags, entities and runs of white space."""
    unescaped = text.str.replace_all(r"</?[A-Za-z!][^>]*>", " ").str.replace_many(
        list(_ENTITIES), list(_ENTITIES.values())
    )
    return unescaped.str.replace_all(r"\s+", " ").str.strip_chars()


def _one(folder: Path, *, is_meta: bool) -> Path:
    found = sorted(
        path
        for path in folder.iterdir()
        if path.name.endswith(_SUFFIXES) and path.name.startswith("meta_") == is_meta and path.is_file()
    )
    if len(found) != 1:
        wanted = "meta_NAME.json(l).gz" if is_meta else "NAME.json(l).gz"
        names = ", ".join(path.name for path in found) or "none"
        raise GemstError(
            f"{folder} needs exactly one {wanted}, found {names}", "Point data.path at one Amazon category"
        )
    return found[0]

"""RecBole atomic files: `NAME.inter` and `NAME.item`, tab separated, with `field:type` headers.

Any data set in that format: user, item and time fields must be there; title, year and category fields are found by
name. Queries are a proxy (see proxy.py): ONE of the item's categories in lower case, chosen by hash, with the decade
for a third of the events whose item has a year ("comedy 1990s"). Broad on purpose: many items match, and the history
decides.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from gemst.config import Data
from gemst.data.sources.base import Loaded
from gemst.data.sources.proxy import event_hash, one_each, split_tasks
from gemst.data.sources.text import numeric_time, read_separated
from gemst.errors import GemstError

_TITLES = ("movie_title", "title", "name", "item_name", "artist_name", "product_name", "book_title", "game_title")
_YEARS = ("release_year", "year")
_CATEGORIES = ("class", "genre", "genres", "categories", "category", "tags", "item_type")
_TEXTS = ("description", "text", "abstract", "summary")
_DECADE_ONE_IN = 3
_DECADE_SALT = 1


def load(config: Data) -> Loaded:
    """Read the one data set in `config.path`. Raises GemstError naming the file or field at fault."""
    inter, item = _one(config.path, "inter"), _one(config.path, "item")
    log, log_types = _read(inter)
    catalogue, types = _read(item)
    _need(log, inter, "user_id", "item_id", "timestamp")
    _need(catalogue, item, "item_id")
    title, year = _find(catalogue, _TITLES), _find(catalogue, _YEARS)
    category, text = _find(catalogue, _CATEGORIES), _find(catalogue, _TEXTS)
    if title is None:
        found = ", ".join(catalogue.columns)
        raise GemstError(f"{item} has no title field among {found}", f"Rename one to {_TITLES[0]}:token_seq")
    years = pl.col(year).str.extract(r"^(\d{4})(?:\.0*)?$") if year else pl.lit(None, dtype=pl.String)
    catalogue = catalogue.with_columns(_year=years).with_columns(
        title=pl.concat_str(pl.col(title).str.strip_chars(), pl.format(" ({})", "_year").fill_null("")),
        categories=_categories(category, types),
        text=pl.col(text) if text else pl.lit(None, dtype=pl.String),
    )
    events = log.select("user_id", "item_id", timestamp=numeric_time(pl.col("timestamp")))
    mapping = {
        "items.item_id": "item_id",
        "items.title": f"{title} ({year})" if year else title,
        "items.text": text or "absent",
        "items.categories": category or "absent",
        "events.user_id": "user_id",
        "events.item_id": "item_id",
        "events.timestamp": f"timestamp ({log_types['timestamp']})",
        "events.task": "fixed hash of the event, half to each task",
        "events.query": f"proxy: one of {category}, with the decade for a third" if category else "absent",
    }
    return Loaded(
        catalogue.select("item_id", "title", "text", "categories"),
        _with_queries(events, catalogue),
        rows_in={"items": len(catalogue), "events": len(events)},
        mapping=mapping,
    )


def _with_queries(events: pl.DataFrame, catalogue: pl.DataFrame) -> pl.DataFrame:
    described = one_each(catalogue.select("item_id", "title", "text", "categories", "_year"))
    queries = described.select("item_id", choices=pl.col("categories").list.eval(pl.element().str.to_lowercase()))
    decade = pl.format(" {}0s", pl.col("_year").str.head(3))
    decades = described.select("item_id", decade=decade)
    dated = pl.Series("dated", event_hash(events, _DECADE_SALT) % _DECADE_ONE_IN == 0)
    return (
        split_tasks(events, queries)
        .with_columns(dated)
        .join(decades, on="item_id", how="left", maintain_order="left")
        .with_columns(query=pl.col("query") + pl.when("dated").then("decade").otherwise(None).fill_null(""))
        .drop("dated", "decade")
    )


def _categories(name: str | None, types: dict[str, str]) -> pl.Expr:
    if name is None:
        return pl.lit([], dtype=pl.List(pl.String))
    words = pl.col(name).str.strip_chars()
    if not types[name].endswith("_seq"):
        return pl.concat_list(words).list.drop_nulls()
    # Sequences are separated by spaces. Others come as a printed list, 'Hair Care', "Men's", which CSV may have quoted
    # once more or which has its brackets, with bars or with commas.
    words = words.str.replace(r"""^\[\s*(['"].*['"])?\s*\]$""", "${1}")
    twice = words.str.contains(r'^".*""') & words.str.ends_with('"')
    words = (
        pl.when(twice).then(words.str.slice(1, words.str.len_chars() - 2).str.replace_all('""', '"')).otherwise(words)
    )
    printed = words.str.extract_all(r"""'[^']*'(?:,|$)|"[^"]*"(?:,|$)""")
    parts = (
        pl.when(words.str.contains(r"""^['"].*['"]$"""))
        .then(printed.list.eval(pl.element().str.replace(r"""^['"](.*)['"],?$""", "${1}")))
        .when(words.str.contains("|", literal=True))
        .then(words.str.split("|"))
        .when(words.str.contains(", ", literal=True))
        .then(words.str.split(", "))
        .otherwise(words.str.split(" "))
    )
    cleaned = parts.list.eval(pl.element().str.strip_chars().filter(pl.element().str.strip_chars() != ""))
    return cleaned.fill_null(pl.lit([], dtype=pl.List(pl.String)))


def _read(path: Path) -> tuple[pl.DataFrame, dict[str, str]]:
    """The table with bare field names, and each field's RecBole type."""
    table = read_separated(path, "\t")
    untyped = [name for name in table.columns if ":" not in name]
    if untyped:
        raise GemstError(
            f"{path}: header field {untyped[0]!r} has no type", "RecBole headers read like `user_id:token`"
        )
    types = {name.rpartition(":")[0]: name.rpartition(":")[2] for name in table.columns}
    return table.rename(lambda name: name.rpartition(":")[0]), types


def _one(folder: Path, kind: str) -> Path:
    found = sorted(folder.glob(f"*.{kind}"))
    if len(found) != 1:
        what = f"{len(found)} .{kind} files ({', '.join(path.name for path in found)})" if found else f"no .{kind} file"
        raise GemstError(f"{folder} holds {what}, need exactly one", "Point data.path at one RecBole data set")
    return found[0]


def _find(table: pl.DataFrame, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in table.columns), None)


def _need(table: pl.DataFrame, path: Path, *names: str) -> None:
    missing = [name for name in names if name not in table.columns]
    if missing:
        raise GemstError(f"{path} lacks the field {missing[0]}", f"It has {', '.join(table.columns)}")

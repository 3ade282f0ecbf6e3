"""Own logs: `items` and `events` as Parquet or CSV in one folder.

    items.parquet or items.csv     item_id, title; optional: text, categories, embedding (item_ids.embedding: column)
    events.parquet or events.csv   user_id, item_id, timestamp; optional: task, query, request_id, shown

Columns with other names are mapped in params.yaml, for both tables or for one:

    data:
      source: table
      path: data/my-shop
      columns: {user_id: customer, timestamp: clicked_at, items.item_id: sku, events.item_id: product}

Times are dates with or without a zone (without: UTC), ISO 8601 text, or epoch numbers in seconds, milliseconds or
microseconds. Without a `task` column an event with a query is a search. Lists are list columns; as text they are
separated by `|`. Values that cannot be read become null, and `validate` quarantines their rows.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from gemst.config import Data
from gemst.data.sources.base import Loaded
from gemst.data.sources.text import numeric_time, read_separated
from gemst.data.tables import EVENTS, ITEMS, RECOMMENDATION, SEARCH, TIME, VECTORS
from gemst.errors import GemstError

_NEEDED = {"items": ("item_id", "title"), "events": ("user_id", "item_id", "timestamp")}
_SCHEMAS = {"items": pl.Schema({**ITEMS, **VECTORS}), "events": EVENTS}


def load(config: Data) -> Loaded:
    """Read both tables. Raises GemstError naming the file, the column or the mapping at fault."""
    _check_mapping(config.columns)
    tables: dict[str, pl.DataFrame] = {}
    mapping: dict[str, str] = {}
    for name, schema in _SCHEMAS.items():
        raw = _read(config.path, name)
        chosen = {column: _source(config.columns, name, column) for column in schema}
        missing = [column for column in _NEEDED[name] if chosen[column] not in raw.columns]
        if missing:
            raise GemstError(
                f"{name} in {config.path} has no column {chosen[missing[0]]!r} for {missing[0]}",
                f"It has {', '.join(raw.columns)}; map one with data.columns: {{{name}.{missing[0]}: YOURS}}",
            )
        present = {column: own for column, own in chosen.items() if own in raw.columns}
        tables[name] = raw.select(_typed(raw, own, schema[column]).alias(column) for column, own in present.items())
        mapping |= {f"{name}.{column}": present.get(column, "absent") for column in schema}
    events = tables["events"]
    query = pl.col("query") if "query" in events.columns else pl.lit(None, dtype=pl.String)
    if "task" not in events.columns:
        searched = pl.when(query.is_null()).then(pl.lit(RECOMMENDATION)).otherwise(pl.lit(SEARCH))
        events = events.with_columns(task=searched)
        mapping["events.task"] = "search where there is a query"
    rows = {"items": len(tables["items"]), "events": len(events)}
    return Loaded(tables["items"], events, rows_in=rows, mapping=mapping)


def _read(folder: Path, name: str) -> pl.DataFrame:
    parquet, text = folder / f"{name}.parquet", folder / f"{name}.csv"
    if parquet.exists() and text.exists():
        raise GemstError(f"{folder} holds both {parquet.name} and {text.name}", "Remove one of them")
    if text.exists():
        return read_separated(text, ",", quoted=True)
    if not parquet.exists():
        raise GemstError(
            f"{folder} holds neither {parquet.name} nor {text.name}", "See the template in the documentation"
        )
    try:
        return pl.read_parquet(parquet)
    except (pl.exceptions.PolarsError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise GemstError(f"{parquet} is not readable as Parquet ({reason})", "Export it again") from None


def _source(columns: dict[str, str], table: str, column: str) -> str:
    return columns.get(f"{table}.{column}", columns.get(column, column))


def _check_mapping(columns: dict[str, str]) -> None:
    known = {name for table, schema in _SCHEMAS.items() for column in schema for name in (column, f"{table}.{column}")}
    for name in columns:
        if name not in known:
            raise GemstError(f"data.columns maps {name!r}, which is no column", f"Known: {', '.join(sorted(known))}")


def _typed(raw: pl.DataFrame, name: str, wanted: pl.DataType) -> pl.Expr:
    """The column `name` as type `wanted`. Raises GemstError for a type that has no reading at all."""
    column, kind = pl.col(name), raw.schema[name]
    if wanted == TIME:
        return _time(column, kind, name)
    if isinstance(wanted, pl.List):
        if isinstance(kind, pl.List | pl.Array):
            return column.cast(wanted, strict=False)
        if kind in (pl.String, pl.Null):
            parts = column.cast(pl.String).str.split("|").list.eval(pl.element().str.strip_chars())
            return parts.list.eval(pl.element().filter(pl.element() != "")).cast(wanted, strict=False)
    elif kind == pl.String or kind.is_integer() or kind in (pl.Null, pl.Categorical, pl.Enum):
        return column.cast(pl.String)
    raise GemstError(f"column {name!r} is {kind}, which is no {wanted}", "Convert it before `gemst ingest`")


def _time(column: pl.Expr, kind: pl.DataType, name: str) -> pl.Expr:
    if isinstance(kind, pl.Datetime):
        zoned = column.dt.convert_time_zone("UTC") if kind.time_zone else column.dt.replace_time_zone("UTC")
        return zoned.cast(TIME)
    if kind == pl.Date:
        return column.cast(pl.Datetime("ms")).dt.replace_time_zone("UTC")
    if kind == pl.String:
        # One column may mix zones: text with an offset is shifted, text without is UTC.
        iso = column.str.strip_chars().str.replace(" ", "T", literal=True).str.replace(r"Z$", "+00:00")
        iso = iso.str.replace(r"^(\d{4}-\d\d-\d\d)$", "${1}T00:00:00")
        moment = r"T\d\d:\d\d(:\d\d(\.\d+)?)?"
        whole = iso.str.replace(r"(T\d\d:\d\d)($|[+-])", "${1}:00${2}")
        zoned = whole.str.replace(rf"({moment})$", "${1}+00:00")
        parsed = zoned.str.to_datetime("%Y-%m-%dT%H:%M:%S%.f%:z", strict=False, time_unit="ms", time_zone="UTC")
        return pl.coalesce(parsed, numeric_time(column))
    if kind.is_numeric():
        return numeric_time(column.cast(pl.String))
    raise GemstError(f"column {name!r} is {kind}, which is no time", "Use dates, ISO text or epoch numbers")

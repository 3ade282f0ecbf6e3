"""Own logs: `items` and `events` as Parquet or CSV in one folder (docs/data.md has a template).

    items.parquet or items.csv     item_id, title; optional: text, categories, embedding (item_ids.embedding: column)
    events.parquet or events.csv   user_id, item_id, timestamp; optional: task, query, request_id, shown

Columns with other names are mapped in params.yaml, for both tables or for one:

    data:
      source: table
      path: data/my-shop
      columns: {user_id: customer, timestamp: clicked_at, items.item_id: sku, events.item_id: product}

Times are dates with or without a zone (without: UTC), ISO 8601 text, or epoch numbers in seconds, milli-, micro- or
nanoseconds. Without a `task` column an event with a query is a search; a blank query, request_id or text is none.
Lists are list columns; as text they are separated by `|`. Values that cannot be read become null, and `validate`
quarantines their rows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path

import polars as pl

from gemst.config import Data
from gemst.data.rules import VISIBLE
from gemst.data.sources.base import Loaded
from gemst.data.sources.text import numeric_time, read_separated
from gemst.data.tables import EVENTS, ITEMS, RECOMMENDATION, SEARCH, TIME, VECTORS
from gemst.errors import GemstError

_SUFFIXES = (".parquet", ".csv", ".csv.gz", ".tsv", ".tsv.gz")
_NEEDED = {"items": ("item_id", "title"), "events": ("user_id", "item_id", "timestamp")}
_MAY_BE_BLANK = {"text", "query", "request_id"}  # the others' blanks are for `validate` to quarantine
_SCHEMAS = {"items": pl.Schema({**ITEMS, **VECTORS}), "events": EVENTS}

# Names that other platforms use, to guess a mapping from.
_OTHER_NAMES = {
    "user_id": ("user", "customer", "visitor", "member"),
    "item_id": ("item", "sku", "product", "article", "asin"),
    "title": ("name", "productname"),
    "timestamp": ("time", "date", "datetime", "clickedat", "createdat", "ts"),
}
_TIME_FIX = "Write times as 2024-05-31T18:30:00+02:00 (without a zone: UTC) or as epoch numbers"


def load(config: Data) -> Loaded:
    """Read both tables. Raises GemstError naming the file, the column or the mapping at fault."""
    _check_mapping(config.columns)
    raw = {name: _read(config.path, name) for name in _SCHEMAS}
    chosen = {name: {column: _source(config.columns, name, column) for column in _SCHEMAS[name]} for name in raw}
    _need_columns(config, raw, chosen)
    tables: dict[str, pl.DataFrame] = {}
    mapping: dict[str, str] = {}
    for name, schema in _SCHEMAS.items():
        present = {column: own for column, own in chosen[name].items() if own in raw[name].columns}
        table = raw[name].select(
            _typed(raw[name], own, schema[column]).alias(column) for column, own in present.items()
        )
        tables[name] = table.with_columns(
            pl.when(pl.col(column).str.contains(VISIBLE)).then(column)
            for column in table.columns
            if column in _MAY_BE_BLANK
        )
        mapping |= {f"{name}.{column}": present.get(column, "absent") for column in schema}
        if unused := [own for own in raw[name].columns if own not in present.values()]:
            mapping[f"nothing in {name}"] = ", ".join(unused)
    events = tables["events"]
    mapping["events.timestamp"] += _unread(
        config.path, raw["events"][chosen["events"]["timestamp"]], events["timestamp"]
    )
    if "task" not in events.columns:
        query = pl.col("query") if "query" in events.columns else pl.lit(None, dtype=pl.String)
        searched = pl.when(query.is_null()).then(pl.lit(RECOMMENDATION)).otherwise(pl.lit(SEARCH))
        events = events.with_columns(task=searched)
        mapping["events.task"] = "search where there is a query"
    rows = {name: len(table) for name, table in raw.items()}
    return Loaded(tables["items"], events, rows_in=rows, mapping=mapping)


def _read(folder: Path, name: str) -> pl.DataFrame:
    """The table `name`: one file, or all files of a folder of that name, in the order of their names."""
    found = [folder / f"{name}{suffix}" for suffix in _SUFFIXES if (folder / f"{name}{suffix}").exists()]
    parts = sorted(path for path in (folder / name).glob("*") if path.name.endswith(_SUFFIXES))
    ways = [path.name for path in found] + ([f"{name}/"] if parts else [])
    if len(ways) > 1:
        raise GemstError(f"{folder} holds both {ways[0]} and {ways[1]}", "Remove one of them")
    if not ways:
        has = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
        raise GemstError(
            f"{folder} holds neither {name}.parquet nor {name}.csv, but {has}",
            f"Name the file {name}.csv or {name}.parquet, or put its parts into {name}/; docs/data.md has a template",
        )
    frames = [_read_file(path) for path in found + parts]
    kinds: dict[str, pl.DataType | None] = dict(frames[0].schema)
    for path, frame in zip(parts[1:], frames[1:], strict=False):
        common = {column: _common(kinds.get(column), kind) for column, kind in frame.schema.items()}
        if frame.columns != frames[0].columns or None in common.values():
            raise GemstError(
                f"{path} has the columns {_columns(frame.schema)}, but those before it have {_columns(kinds)}",
                f"Give all files of {name}/ the same columns and types",
            )
        kinds = common
    return pl.concat(frame.cast(kinds) for frame in frames)  # type: ignore[arg-type]


def _common(one: pl.DataType | None, other: pl.DataType) -> pl.DataType | None:
    """The type of a column that has these in two files; None where there is none. An empty column has no type."""
    if other in (one, pl.Null()):
        return one
    if one == pl.Null():
        return other
    if isinstance(one, pl.Datetime) and isinstance(other, pl.Datetime) and one.time_zone == other.time_zone:
        return pl.Datetime("ms", one.time_zone)
    if isinstance(one, pl.List) and isinstance(other, pl.List):
        inner = _common(one.inner, other.inner)  # type: ignore[arg-type]
        return None if inner is None else pl.List(inner)
    return None


def _read_file(path: Path) -> pl.DataFrame:
    if path.suffix != ".parquet":
        table = read_separated(path, None, quoted=True)
        names = [column.strip() for column in table.columns]
        if twice := [name for at, name in enumerate(names) if name in names[:at]]:
            raise GemstError(f"{path} has two columns {twice[0]!r}", "Rename one of them")
        return table.rename(dict(zip(table.columns, names, strict=True)))
    try:
        return pl.read_parquet(path)
    except (pl.exceptions.PolarsError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise GemstError(f"{path} is not readable as Parquet ({reason})", "Export it again") from None


def _columns(kinds: Mapping[str, pl.DataType | None]) -> str:
    return ", ".join(f"{name} ({kind})" if kind != pl.String else name for name, kind in kinds.items())


def _need_columns(config: Data, raw: dict[str, pl.DataFrame], chosen: dict[str, dict[str, str]]) -> None:
    """Raise one GemstError that names every missing column, asked for or needed, and writes the mapping to fill in."""
    faults, fixes, folder = [], [], config.path
    for name, table in raw.items():
        asked = {column for column in chosen[name] if {column, f"{name}.{column}"} & {*config.columns}}
        needed = [column for column in chosen[name] if column in _NEEDED[name] or column in asked]
        missing = [column for column in needed if chosen[name][column] not in table.columns]
        if missing:
            wanted = ", ".join(
                column if chosen[name][column] == column else f"{chosen[name][column]} (for {column})"
                for column in missing
            )
            faults.append(f"{name} in {folder} has no column {wanted}; it has {', '.join(table.columns)}")
            fixes += [f"{name}.{column}: {_guess(column, table.columns)}" for column in missing]
    if faults:
        raise GemstError(". ".join(faults), f"Map them in params.yaml, data.columns: {{{', '.join(fixes)}}}")


def _guess(column: str, names: list[str]) -> str:
    """The most similar name, to be put into the mapping, or a place to fill in."""
    plain = {re.sub(r"[^a-z]", "", name.lower()): name for name in names}
    words = [column.replace("_", ""), *_OTHER_NAMES.get(column, ())]
    return next(
        (plain[close[0]] for word in words if (close := get_close_matches(word, plain, n=1, cutoff=0.85))), "YOURS"
    )


def _unread(folder: Path, raw: pl.Series, read: pl.Series) -> str:
    """What to say of times that could not be read; raises GemstError when none could."""
    bad = raw.filter(read.is_null() & raw.is_not_null())
    if bad.is_empty():
        return ""
    example = f"{len(bad):,} of {len(raw):,} values are no time, such as {str(bad[0])[:40]!r}"
    if read.null_count() == len(read):
        raise GemstError(f"events in {folder}: column {raw.name!r}: {example}", _TIME_FIX)
    return f" ({example})"


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
            _refuse_printed(raw[name].cast(pl.String))
            parts = column.cast(pl.String).str.split("|").list.eval(pl.element().str.strip_chars())
            return parts.list.eval(pl.element().filter(pl.element() != "")).cast(wanted, strict=False)
    elif kind == pl.String or kind.is_integer() or kind in (pl.Null, pl.Categorical, pl.Enum):
        return column.cast(pl.String)
    raise GemstError(f"column {name!r} is {kind}, which is no {wanted}", "Convert it before `gemst ingest`")


def _refuse_printed(texts: pl.Series) -> None:
    """Raise GemstError where lists were written as Python prints them: as text they would be one long word."""
    printed = texts.filter(texts.str.contains(r"""^\s*\[\s*(['"\d.+-].*)?\]\s*$""").fill_null(False))
    if len(printed):
        raise GemstError(
            f"column {texts.name!r} holds printed lists, such as {printed[0][:40]!r}",
            "Separate its values by |, or write the table as Parquet",
        )


def _time(column: pl.Expr, kind: pl.DataType, name: str) -> pl.Expr:
    if isinstance(kind, pl.Datetime):
        zoned = column.dt.convert_time_zone("UTC") if kind.time_zone else column.dt.replace_time_zone("UTC")
        return zoned.cast(TIME)
    if kind == pl.Date:
        return column.cast(pl.Datetime("ms")).dt.replace_time_zone("UTC")
    if kind == pl.String:
        # One column may mix zones: text with an offset is shifted, text without is UTC.
        iso = column.str.strip_chars().str.replace(" ", "T", literal=True).str.replace(r"(Z| UTC)$", "+00:00")
        iso = iso.str.replace(r"^(\d{4}-\d\d-\d\d)$", "${1}T00:00:00").str.replace(r"(T.*[+-]\d\d)$", "${1}:00")
        moment = r"T\d\d:\d\d(:\d\d(\.\d+)?)?"
        whole = iso.str.replace(r"(T\d\d:\d\d)($|[+-])", "${1}:00${2}")
        zoned = whole.str.replace(rf"({moment})$", "${1}+00:00")
        parsed = zoned.str.to_datetime("%Y-%m-%dT%H:%M:%S%.f%:z", strict=False, time_unit="ms", time_zone="UTC")
        return pl.coalesce(parsed, numeric_time(column.str.strip_chars()))
    if kind.is_numeric():
        return numeric_time(column.cast(pl.String))
    raise GemstError(f"column {name!r} is {kind}, which is no time", _TIME_FIX)

"""The canonical tables (docs/data.md): their schemas, their one order, reading and writing.

Order of events, everywhere: user_id, timestamp, task, then a fixed hash of the other columns. The hash
settles ties: ids often follow popularity or age, so the id itself would bias which event counts as a user's last.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from gemst.data.hashing import mix, stable_hash
from gemst.errors import GemstError
from gemst.files import atomic_file

RECOMMENDATION, SEARCH = "recommendation", "search"
TASKS = (RECOMMENDATION, SEARCH)
TIME = pl.Datetime("ms", "UTC")

ITEMS = pl.Schema({"item_id": pl.String(), "title": pl.String(), "text": pl.String(), "categories": pl.List(pl.String)})
VECTORS = pl.Schema({"embedding": pl.List(pl.Float32)})  # an items table has this column where the user brings vectors
EVENTS = pl.Schema(
    {
        "user_id": pl.String(), "item_id": pl.String(), "timestamp": TIME, "task": pl.String(), "query": pl.String(),
        "request_id": pl.String(), "shown": pl.List(pl.String),
    }
)  # fmt: skip
EXAMPLES = pl.Schema(
    {
        "user_id": pl.String(), "task": pl.String(), "query": pl.String(), "history": pl.List(pl.String),
        "targets": pl.List(pl.String), "negatives": pl.List(pl.String), "timestamp": TIME,
    }
)  # fmt: skip
TRAIN_EXAMPLES = pl.Schema({**EXAMPLES, "clicked": TIME})  # the target's own time: `timestamp` is its page's


def in_order(events: pl.DataFrame) -> pl.DataFrame:
    """Events in the canonical order, whatever order they came in. Equal rows end up side by side."""
    keys = events.select(codes(events["user_id"])[0], "timestamp", codes(events["task"])[0], tie_break(events))
    # Codes sort several times faster than strings; their order is that of the strings.
    order = keys.with_row_index("_row").sort("user_id", "timestamp", "task", "_tie")["_row"]
    return events[order]


def tie_break(events: pl.DataFrame) -> pl.Series:
    """UInt64 series `_tie`: the fixed hash that orders events of one user, time and task."""
    keys = mix(mix(stable_hash(events["item_id"]), stable_hash(events["query"])), stable_hash(events["request_id"]))
    pages = events["shown"].is_not_null()
    if pages.any():  # alone in the events that have it: the others' order must not depend on them
        keys[pages.to_numpy()] = mix(keys, stable_hash(events["shown"].list.join("\x1f")))[pages.to_numpy()]
    return pl.Series("_tie", keys)


def codes(values: pl.Series) -> tuple[pl.Series, pl.Series]:
    """Strings as UInt32 codes in the strings' order (null stays null), and the sorted strings they stand for."""
    distinct = values.drop_nulls().unique().sort()
    return values.cast(pl.Enum(distinct)).to_physical().cast(pl.UInt32), distinct


def conform(table: pl.DataFrame, schema: pl.Schema, name: str) -> pl.DataFrame:
    """Columns of `schema` in its order; absent optional ones become null. Items keep their own vectors.

    Raises GemstError when a column is absent that must be there, or has another type.
    """
    optional = {"text", "categories", "query", "request_id", "shown"}
    if schema is ITEMS and VECTORS.keys() <= set(table.columns):
        schema = pl.Schema({**ITEMS, **VECTORS})
    missing = [column for column in schema if column not in table.columns and column not in optional]
    if missing:
        found = ", ".join(table.columns)
        raise GemstError(f"{name} lacks {', '.join(missing)}", f"It has {found}; map them in data.columns")
    given = {column for column, kind in table.schema.items() if kind != pl.Null}
    full = table.select(
        pl.col(column) if column in given else pl.lit(None, dtype=kind).alias(column) for column, kind in schema.items()
    )
    types = [(column, full.schema[column], kind) for column, kind in schema.items()]
    wrong = [f"{column} is {found}, not {kind}" for column, found, kind in types if found != kind]
    if wrong:
        raise GemstError(f"{name}: {'; '.join(wrong)}", "Run `gemst ingest` again, or convert the columns")
    return full


def read_items(path: Path) -> pl.DataFrame:
    """The items table; raises GemstError when the file is damaged or has another schema."""
    return _read(path, ITEMS)


def read_events(path: Path) -> pl.DataFrame:
    """The events table; raises GemstError when the file is damaged or has another schema."""
    return _read(path, EVENTS)


def write_items(items: pl.DataFrame, path: Path) -> None:
    """Write the items table, schema checked, never half a file."""
    _write(items, ITEMS, path)


def write_events(events: pl.DataFrame, path: Path) -> None:
    """Write the events table, schema checked, never half a file."""
    _write(events, EVENTS, path)


def _read(path: Path, schema: pl.Schema) -> pl.DataFrame:
    try:
        table = pl.read_parquet(path)
    except FileNotFoundError:
        raise GemstError(f"{path} does not exist", "Run `gemst ingest` first") from None
    except (pl.exceptions.PolarsError, OSError) as error:
        raise GemstError(
            f"{path} is not readable as Parquet ({_first_line(error)})", "Run `gemst ingest` again"
        ) from None
    return conform(table, schema, str(path))


def _write(table: pl.DataFrame, schema: pl.Schema, path: Path) -> None:
    checked = conform(table, schema, path.stem)
    with atomic_file(path) as temporary:
        # A fixed codec, level and row-group size: equal tables give equal bytes.
        checked.write_parquet(temporary, compression="zstd", compression_level=1, row_group_size=500_000)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

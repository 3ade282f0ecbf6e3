"""What several stages read, from where gemst/layout.py says. What is not there is an error that names its command."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gemst import layout
from gemst.files import require

if TYPE_CHECKING:
    import polars as pl


def items() -> pl.DataFrame:
    """The validated items (tables.ITEMS)."""
    from gemst.data import tables

    return tables.read_items(require(layout.VALIDATED / "items.parquet", made_by="gemst validate"))


def events() -> pl.DataFrame:
    """The validated events (tables.EVENTS)."""
    from gemst.data import tables

    return tables.read_events(require(layout.VALIDATED / "events.parquet", made_by="gemst validate"))


def examples(part: str) -> pl.DataFrame:
    """The examples of `train` (tables.TRAIN_EXAMPLES), `valid` or `test` (tables.EXAMPLES)."""
    import polars as pl

    return pl.read_parquet(require(layout.EXAMPLES / f"{part}.parquet", made_by="gemst split"))

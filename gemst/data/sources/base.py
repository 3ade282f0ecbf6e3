"""What a source adapter returns, and what is done to every adapter's tables alike."""

from __future__ import annotations

from dataclasses import dataclass, field

import polars as pl

from gemst.data import account
from gemst.data.tables import EVENTS, ITEMS, conform, in_order
from gemst.errors import GemstError

DUPLICATE = "exact duplicate of another row"
_LISTS = ("categories", "embedding")


@dataclass(frozen=True)
class Loaded:
    """Canonical tables and the account of every raw row.

    `rows_in` counts raw rows per table ("items", "events") and rows the source derives ("events: first tag of an
    artist"). `dropped` counts rows by "table: rule". For each table, rows in = rows of the table + rows dropped.
    `mapping` says where each canonical column comes from; query proxies are named there as proxies.
    """

    items: pl.DataFrame
    events: pl.DataFrame
    dropped: dict[str, int] = field(default_factory=dict)
    rows_in: dict[str, int] = field(default_factory=dict)
    mapping: dict[str, str] = field(default_factory=dict)

    @property
    def rows_out(self) -> dict[str, int]:
        """Rows of each canonical table."""
        return {"items": self.items.height, "events": self.events.height}


def item_order(items: pl.DataFrame) -> list[pl.Expr]:
    """What items are sorted by, nulls last: among rows of one item_id, the first good one is kept."""
    lists = [pl.col(name).cast(pl.List(pl.String)).list.join("\x1f") for name in items.columns if name in _LISTS]
    return [*(pl.col(name) for name in ("item_id", "title", "text")), *lists]


def settle(loaded: Loaded) -> Loaded:
    """Check the schemas, drop exact duplicates by name, and put rows in canonical order.

    The result depends on which rows there are, not on the order they came in. Raises GemstError for an empty table and
    for rows that the adapter lost without a name.
    """
    no_list = pl.lit([], dtype=pl.List(pl.String))
    items = conform(loaded.items, ITEMS, "items").with_columns(pl.col("categories").fill_null(no_list))
    events = conform(loaded.events, EVENTS, "events")
    for name, table in (("items", items), ("events", events)):
        if table.is_empty():
            raise GemstError(f"the source gives no {name}", "Look at it with `gemst ingest --dry-run`")
    dropped = {rule: rows for rule, rows in loaded.dropped.items() if rows}
    items = items.sort(*item_order(items), nulls_last=True)
    items, dropped["items: " + DUPLICATE] = _distinct(items)
    # Times that could not be read are all null: rows with one are not known to be equal, and go to quarantine.
    events, dropped["events: " + DUPLICATE] = _distinct(in_order(events), pl.col("timestamp").is_not_null())
    settled = Loaded(
        items,
        events,
        {rule: rows for rule, rows in dropped.items() if rows},
        loaded.rows_in,
        loaded.mapping,
    )
    account.lines(settled.rows_in, settled.rows_out, settled.dropped)
    return settled


def _distinct(table: pl.DataFrame, known: pl.Expr | None = None) -> tuple[pl.DataFrame, int]:
    """The table without repeats of the row before (equal rows are side by side), and how many those were.

    Only rows where `known` holds can be repeats.
    """
    again = pl.all_horizontal(pl.all().eq_missing(pl.all().shift()))
    again = again if known is None else again & known
    distinct = table.filter(~again | (pl.int_range(pl.len()) == 0))
    return distinct, table.height - distinct.height

"""What a source adapter returns, and what is done to every adapter's tables alike."""

from __future__ import annotations

from dataclasses import dataclass, field

import polars as pl

from gemst.data.tables import EVENTS, ITEMS, conform, in_order
from gemst.errors import GemstError

DUPLICATE = "exact duplicate of another row"


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

    def unaccounted(self) -> dict[str, int]:
        """Rows in minus rows out minus rows dropped, for each table where that is not 0."""
        left = {"items": -self.items.height, "events": -self.events.height}
        for sign, counts in ((1, self.rows_in), (-1, self.dropped)):
            for name, rows in counts.items():
                left[name.partition(":")[0]] += sign * rows
        return {table: rows for table, rows in left.items() if rows}


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
    items = items.sort("item_id", "title", "text", pl.col("categories").list.join("\x1f"), nulls_last=True)
    items, dropped["items: " + DUPLICATE] = _distinct(items)
    events, dropped["events: " + DUPLICATE] = _distinct(in_order(events))
    settled = Loaded(
        items,
        events,
        {rule: rows for rule, rows in dropped.items() if rows},
        loaded.rows_in,
        loaded.mapping,
    )
    if lost := settled.unaccounted():
        raise GemstError(
            f"the source lost rows without naming a rule: {lost}", "This is a fault of the adapter: report it"
        )
    return settled


def _distinct(table: pl.DataFrame) -> tuple[pl.DataFrame, int]:
    """The table without repeats of the row before (equal rows are side by side), and how many those were."""
    again = pl.all_horizontal(pl.all().eq_missing(pl.all().shift()))
    distinct = table.filter(~again | (pl.int_range(pl.len()) == 0))
    return distinct, table.height - distinct.height

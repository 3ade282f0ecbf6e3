"""What the command line prints beside a stage's summary: tables of results, and a look at raw logs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import polars as pl

    from gemst.config import Config


def preview(config: Config) -> None:
    """The mapping, ten rows of each table and the counts of an ingest that was not made."""
    import polars as pl

    from gemst.data import account
    from gemst.data.preview import preview as look

    shown = look(config.data)
    width = max(len(column) for column in shown.mapping)
    for column, origin in shown.mapping.items():
        print(f"{column:<{width}} <- {origin}")
    for name, rows in (("items", shown.items), ("events", shown.events)):
        with pl.Config(tbl_rows=10, tbl_cols=-1, tbl_hide_dataframe_shape=True, tbl_width_chars=160):
            print(f"\nthe first {name} as gemst reads them\n{rows}")
    print()
    for verb, counts in (("dropped", shown.dropped), ("in quarantine", shown.quarantined)):
        for rule, count in counts.items():
            print(f"{count:,} {verb}: {rule}")
    print("\n".join(account.lines(shown.rows_in, shown.rows_out, shown.dropped, shown.quarantined)))
    print(f"what is left: {', '.join(f'{name} {value}' for name, value in shown.profile.items() if value is not None)}")
    if not shown.profile.get("search_share"):
        print("No event is a search: if the logs have queries, map their column with data.columns: {query: YOURS}")
    print("Nothing was written. Next: gemst ingest, gemst validate")


def table(frame: pl.DataFrame, title: str) -> None:
    """A frame as a table on a terminal, as tab-separated lines in a pipe."""
    if not sys.stdout.isatty():
        print(frame.write_csv(separator="\t"), end="")
        return
    from rich.console import Console
    from rich.markup import escape  # titles and queries hold brackets of their own
    from rich.table import Table

    shown = Table(title=escape(title), title_justify="left")
    for name, kind in frame.schema.items():
        shown.add_column(name, justify="right" if kind.is_numeric() else "left")
    for row in frame.rows():
        shown.add_row(*(f"{value:.4f}" if isinstance(value, float) else escape(str(value)) for value in row))
    Console().print(shown)

"""The account of every row: what came in is what came out, what is in quarantine and what a named rule dropped."""

from __future__ import annotations

from typing import Any

from gemst.errors import GemstError


def line(table: str, rows_in: int, ends: dict[str, int]) -> str:
    """One line that says where the rows of a table went; raises GemstError when they do not add up.

    >>> line("events", 5000, {"out": 4899, "dropped": 101})
    'events: 5,000 rows in = 4,899 out + 101 dropped'
    """
    if lost := rows_in - sum(ends.values()):
        raise GemstError(f"{table}: {lost:,} rows are unaccounted for", "This is a fault of gemst: report it")
    return f"{table}: {rows_in:,} rows in = " + " + ".join(f"{rows:,} {end}" for end, rows in ends.items())


def lines(
    rows_in: dict[str, int],
    rows_out: dict[str, int],
    dropped: dict[str, int],
    quarantined: dict[str, int] | None = None,
) -> list[str]:
    """The line of each table of `rows_out`; the keys of the other arguments are "table" or "table: rule"."""
    found = []
    for table, out in rows_out.items():
        ends = {"out": out}
        if quarantined is not None:
            ends["in quarantine"] = _sum(table, quarantined)
        found.append(line(table, _sum(table, rows_in), ends | {"dropped": _sum(table, dropped)}))
    return found


def belongs(report: dict[str, Any], ingested: dict[str, Any]) -> bool:
    """Whether a validation report judged the tables that the present ingest.json is about, and not earlier ones."""
    made = (ingested["rows_in"], ingested["dropped"])
    return all(rows == _sum(table, made[0]) - _sum(table, made[1]) for table, rows in report["rows_in"].items())


def _sum(table: str, counts: dict[str, int]) -> int:
    return sum(rows for name, rows in counts.items() if name.partition(":")[0] == table)

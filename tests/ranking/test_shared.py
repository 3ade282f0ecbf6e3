"""Shares of a ranking, put together, are the ranking."""

from __future__ import annotations

import polars as pl
import pytest

from gemst.ranking.shared import shared

EXAMPLES = pl.DataFrame({"history": [[f"i{n}"] for n in range(7)]})


def frame(rows: list[tuple[int, str, int, float]]) -> pl.DataFrame:
    kinds = {"row": pl.UInt32, "item_id": pl.String, "rank": pl.UInt16, "score": pl.Float32}
    return pl.DataFrame(rows, schema=kinds, orient="row")


def last_item(examples: pl.DataFrame, seen: pl.DataFrame | pl.Series | None) -> pl.DataFrame:
    """Ranks each history's item first and then what is beside the example."""
    rows = []
    for row, (history,) in enumerate(examples.iter_rows()):
        if isinstance(seen, pl.DataFrame):
            extra = seen.filter(row=row)["item_id"].to_list()
        else:
            extra = [] if seen is None else seen[row].to_list()
        rows += [(row, item, rank, -float(rank)) for rank, item in enumerate([*history, *extra], 1)]
    return frame(rows)


@pytest.mark.parametrize("count", [1, 2, 3, 9])
@pytest.mark.parametrize("kind", ["seen", "candidates", "nothing"])
def test_shares_put_together_are_the_whole(count: int, kind: str) -> None:
    beside = {
        "seen": pl.DataFrame({"row": [0, 3, 3, 6], "item_id": list("abcd")}, schema_overrides={"row": pl.UInt32}),
        "candidates": pl.Series([[f"c{n}"] for n in range(7)]),
        "nothing": None,
    }[kind]
    parts: list[pl.DataFrame] = []
    for number in range(count):
        shared(last_item, EXAMPLES, beside, number, count, lambda mine: [parts.append(mine), mine][1:])
    whole = shared(last_item, EXAMPLES, beside, 0, count, lambda mine: parts)
    assert whole.equals(last_item(EXAMPLES, beside))
    assert whole.schema == frame([]).schema

"""Candidates that a memory brings up, and rankings of them beside those of the beams."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import polars as pl

from gemst.ranking.ranker import rank
from gemst.ranking.scorer import score

if TYPE_CHECKING:
    from scipy import sparse

    from gemst.backbone import Tuned
    from gemst.config import Ranking
    from gemst.memory import Memory


def rank_beside(
    tuned: Tuned, memory: Memory, examples: pl.DataFrame, k: int, ranking: Ranking, seen: pl.DataFrame | None
) -> pl.DataFrame:
    """As `rank`, for semantic IDs: the best items of the beams and as many of the memory, each scored exactly."""
    width = max(k, ranking.beams)
    beams = rank(replace(tuned, memory=None), examples, width, ranking, seen)
    brought = best(tuned, memory.mixture(tuned.ids, examples).added, width, seen)
    ordered = score(tuned, examples, listed(len(examples), beams, brought), ranking)
    return ordered.filter(pl.col("score").is_finite() & (pl.col("rank") <= k))


def best(tuned: Tuned, evidence: sparse.csr_array, count: int, seen: pl.DataFrame | None) -> pl.DataFrame:
    """The `count` items of each example with the highest `evidence` (examples, items): row UInt32, item_id.

    Only active items with a cell of their own are meant, and none of `seen` (row, item_id).
    """
    cells = evidence.tocoo()
    found = pl.DataFrame(
        {"row": cells.row, "item": cells.col, "value": cells.data},
        schema={"row": pl.UInt32, "item": pl.Int64, "value": pl.Float32},
        strict=False,
    )
    found = found.filter(pl.Series(tuned.ids.active[cells.col]))
    found = found.select("row", "value", item_id=tuned.ids.names.gather(found["item"]))
    if seen is not None:
        found = found.join(seen.select(pl.col("row").cast(pl.UInt32), "item_id"), on=["row", "item_id"], how="anti")
    ordered = found.sort("row", "value", "item_id", descending=[False, True, False])
    return ordered.filter(pl.int_range(pl.len()).over("row") < count).select("row", "item_id")


def listed(rows: int, *parts: pl.DataFrame) -> pl.Series:
    """The items of all parts (row, item_id), a list[str] for each of `rows` examples, no item twice."""
    every = pl.concat([part.select(pl.col("row").cast(pl.UInt32), "item_id") for part in parts])
    by_row = every.unique(maintain_order=True).group_by("row").agg("item_id")
    whole = pl.DataFrame({"row": range(rows)}, schema={"row": pl.UInt32})
    lists = whole.join(by_row, on="row", how="left", maintain_order="left")["item_id"]
    return lists.fill_null(pl.Series([[]], dtype=pl.List(pl.String)))

"""Rankings of what a memory brings up beside what the beams found."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import polars as pl

from gemst.memory.choices import best
from gemst.ranking.ranker import rank
from gemst.ranking.scorer import score

if TYPE_CHECKING:
    from gemst.backbone import Tuned
    from gemst.config import Ranking
    from gemst.memory import Memory


def rank_beside(
    tuned: Tuned, memory: Memory, examples: pl.DataFrame, k: int, ranking: Ranking, seen: pl.DataFrame | None
) -> pl.DataFrame:
    """As `rank`, for semantic IDs: the best items of the beams and as many of the memory, each scored exactly."""
    width = max(k, ranking.beams)
    beams = rank(replace(tuned, memory=None), examples, width, ranking, seen)
    added = memory.mixture(tuned.ids, examples).added
    brought = best(tuned.ids.names, added, width, seen, tuned.ids.active)
    ordered = score(tuned, examples, listed(len(examples), beams, brought), ranking)
    return ordered.filter(pl.col("score").is_finite() & (pl.col("rank") <= k))


def listed(rows: int, *parts: pl.DataFrame) -> pl.Series:
    """The items of all parts (row, item_id), a list[str] for each of `rows` examples, no item twice."""
    every = pl.concat([part.select(pl.col("row").cast(pl.UInt32), "item_id") for part in parts])
    by_row = every.unique(maintain_order=True).group_by("row").agg("item_id")
    whole = pl.DataFrame({"row": range(rows)}, schema={"row": pl.UInt32})
    lists = whole.join(by_row, on="row", how="left", maintain_order="left")["item_id"]
    return lists.fill_null(pl.Series([[]], dtype=pl.List(pl.String)))

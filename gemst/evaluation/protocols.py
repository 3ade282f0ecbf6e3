"""What a ranker has to rank: the items a user has seen, and the candidate sets of the sampled protocols.

`full` ranks the whole catalogue and is the headline. `uniform99` (the paper's) ranks the targets among 99 items drawn
uniformly from those the user has not seen; `bm25-99`, for search, among the 99 unseen items that BM25 likes best;
`shown` among the items that the result page really showed. Where a target itself was seen, so may be the others.
Sampled numbers are not comparable with full ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from gemst.prompts import SEARCH

if TYPE_CHECKING:
    from gemst.evaluation.references.base import Reference

FULL, UNIFORM, BM25, SHOWN = "full", "uniform99", "bm25-99", "shown"
NEGATIVES = 99
_BLOCK_CELLS = 8_000_000  # cells of a dense (queries, items) block


def seen_items(examples: pl.DataFrame, past: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """Items to leave out of each example's ranking: what its user met in `past` and in its own history.

    `past` are example tables (train; train and valid when testing). An example with a target that its user had met
    before is ranked with nothing left out: among the unseen items that target would be the one known item, and naming
    what was met before the whole answer. Returns columns row (position in `examples`, UInt32), item_id: unique, sorted.
    """
    return left_out(examples, met_items(examples, past))


def met_items(examples: pl.DataFrame, past: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """All that each example's user met in `past` and in its own history: row, item_id, unique, sorted."""
    rows = examples.select("user_id", "history").with_row_index("row")
    met = [
        table.select("user_id", item_id=column).explode("item_id", empty_as_null=False).unique()
        for table in past
        for column in ("history", "targets")
    ]
    parts = [rows.select("row", item_id="history").explode("item_id", empty_as_null=False)]
    if met:
        parts.append(rows.select("row", "user_id").join(pl.concat(met).unique(), on="user_id").select("row", "item_id"))
    return pl.concat(parts).drop_nulls().unique().sort("row", "item_id")


def left_out(examples: pl.DataFrame, met: pl.DataFrame) -> pl.DataFrame:
    """`seen_items` of what was `met`."""
    again = _targets(examples).join(met, on=["row", "item_id"], how="semi")
    return met.join(again, on="row", how="anti", maintain_order="left")


def candidates(
    protocol: str,
    examples: pl.DataFrame,
    items: pl.DataFrame,
    seen: pl.DataFrame | None,
    seed: int,
    bm25: Reference | None = None,
) -> pl.Series:
    """Candidate item ids per example: its targets and the protocol's negatives, in an order that tells nothing.

    Returns a list[str] series as long as `examples`; an empty list says that the protocol does not apply to that
    example (no query, nothing shown). `bm25` is the fitted reference that `bm25-99` asks. Raises ValueError for an
    unknown protocol.
    """
    if protocol == UNIFORM:
        negatives = _uniform(examples, items, seen, seed)
    elif protocol == BM25:
        if bm25 is None:
            raise ValueError("protocol bm25-99 needs a fitted BM25 reference")
        negatives = _hard(examples, seen, bm25)
    elif protocol == SHOWN:
        negatives = (
            examples.select(item_id="negatives")
            .with_row_index("row")
            .explode("item_id", empty_as_null=False)
            .drop_nulls()
        )
    else:
        raise ValueError(f"no candidates for protocol {protocol!r}")
    targets = (
        examples.select(item_id="targets")
        .with_row_index("row")
        .join(negatives.select("row").unique(), on="row", how="semi")
        .explode("item_id", empty_as_null=False)
        .drop_nulls()
    )
    pool = pl.concat([targets, negatives.select("row", "item_id")]).unique()
    # Random order: a ranker that gives equal scores must not find the target in first place.
    keys = pl.Series("key", np.random.default_rng(seed).random(len(pool)))
    shuffled = pool.sort("row", "item_id").with_columns(keys).sort("row", "key")
    lists = shuffled.group_by("row", maintain_order=True).agg("item_id")
    every = pl.DataFrame({"row": np.arange(len(examples), dtype=np.uint32)})
    joined = every.join(lists, on="row", how="left", maintain_order="left")
    return joined["item_id"].fill_null([]).alias("candidates")


def _uniform(examples: pl.DataFrame, items: pl.DataFrame, seen: pl.DataFrame | None, seed: int) -> pl.DataFrame:
    """NEGATIVES items per row, without replacement, uniform over what is neither seen nor a target."""
    rng = np.random.default_rng(seed)
    catalogue = items.select("item_id").unique().sort("item_id").with_row_index("column")
    barred = [_targets(examples)] + ([] if seen is None else [seen.select("row", "item_id")])
    cells = pl.concat(barred).join(catalogue, on="item_id").select("row", "column").sort("row")
    at, columns = cells["row"].to_numpy(), cells["column"].to_numpy()
    parts, step = [], max(1, _BLOCK_CELLS // max(1, len(catalogue)))
    wanted = min(NEGATIVES, len(catalogue))
    for start in range(0, len(examples), step):
        keys = rng.random((min(step, len(examples) - start), len(catalogue)), dtype=np.float32)
        first, last = np.searchsorted(at, [start, start + len(keys)])
        keys[at[first:last] - start, columns[first:last]] = np.inf
        chosen = np.argpartition(keys, wanted - 1, axis=1)[:, :wanted]
        kept = np.isfinite(np.take_along_axis(keys, chosen, 1))
        rows = np.broadcast_to(np.arange(start, start + len(keys), dtype=np.uint32)[:, None], chosen.shape)
        parts.append(pl.DataFrame({"row": rows[kept], "column": chosen[kept].astype(np.uint32)}))
    return (
        pl.concat(parts).join(catalogue, on="column").select("row", "item_id") if parts else _targets(examples).clear()
    )


def _hard(examples: pl.DataFrame, seen: pl.DataFrame | None, bm25: Reference) -> pl.DataFrame:
    """The NEGATIVES unseen items that BM25 ranks highest, for the examples with a query."""
    barred = pl.concat([_targets(examples)] + ([] if seen is None else [seen.select("row", "item_id")]))
    ranked = bm25.rank(examples, NEGATIVES, barred)
    searches = examples.select("task").with_row_index("row").filter(pl.col("task") == SEARCH).select("row")
    return ranked.join(searches, on="row", how="semi").select("row", "item_id")


def _targets(examples: pl.DataFrame) -> pl.DataFrame:
    return examples.select(item_id="targets").with_row_index("row").explode("item_id", empty_as_null=False).drop_nulls()

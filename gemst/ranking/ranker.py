"""The k best items of the whole catalogue for each example."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from gemst.backbone import item_logits
from gemst.errors import GemstError
from gemst.progress import track
from gemst.ranking.beams import BeamSearch
from gemst.ranking.context import encode

if TYPE_CHECKING:
    from gemst.backbone import Tuned
    from gemst.config import Ranking
    from gemst.memory.evidence import Mixture

Longs = NDArray[np.int64]


def rank(
    tuned: Tuned, examples: pl.DataFrame, k: int, ranking: Ranking, seen: pl.DataFrame | None = None
) -> pl.DataFrame:
    """Rank the catalogue's active items for `examples` (columns history, query).

    `seen` (row, item_id) are left out; `row` is the position in `examples`. Returns row UInt32, item_id, rank UInt16
    (from 1), score Float32 (log probability of the ID, or of what the model's memory makes of it), sorted by row and
    rank: fewer than k lines only where fewer items are left. Atomic IDs take one step and one product with the item
    rows; semantic IDs a beam search of `ranking.beams` (at least k) beams, to which a memory adds as many items.
    """
    memory = tuned.memory if ranking.memory else None
    if memory is not None and len(tuned.ids.level_sizes) > 1:
        from gemst.ranking.remembered import rank_beside

        return rank_beside(tuned, memory, examples, k, ranking, seen)
    prompts = tuned.prompter.encode(examples) if tuned.ids.active.any() else []
    seen_rows, seen_items = _seen(tuned, seen)
    beams = None if len(tuned.ids.level_sizes) == 1 else BeamSearch(tuned, max(ranking.beams, k))
    rows, items, scores = [], [], []
    with torch.inference_mode():
        for batch in track(batches(prompts, ranking.batch_size), "ranking", -(-len(prompts) // ranking.batch_size)):
            local, left_out = of_batch(batch, seen_rows, seen_items)
            chosen = [prompts[i] for i in batch]
            if beams is None:
                mixture = None if memory is None else memory.mixture(tuned.ids, examples[batch])
                found, value = _one_step(tuned, chosen, k, local, left_out, mixture)
            else:
                found, value = beams(chosen, k, local, left_out)
            rows.append(np.repeat(batch, found.shape[1]))
            items.append(found.ravel())
            scores.append(value.ravel())
    return to_frame(tuned, *(np.concatenate(parts) if parts else np.empty(0) for parts in (rows, items, scores)))


def batches(prompts: list[list[int]], size: int) -> Iterator[Longs]:
    """Positions of prompts in batches of about equal length: little padding."""
    order = np.argsort([len(prompt) for prompt in prompts], kind="stable")
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _one_step(
    tuned: Tuned, prompts: list[list[int]], k: int, local: Longs, left_out: Longs, mixture: Mixture | None
) -> tuple[Longs, NDArray[np.float32]]:
    """Items and scores (batch, k) of atomic IDs, best first; -inf where none is left."""
    ids, device = tuned.ids, tuned.model.device
    scores = level_scores(tuned, encode(tuned.model, prompts, branches=False).states, 0)
    scores = scores[:, torch.from_numpy(ids.codes[:, 0]).to(device)]  # by item row
    if mixture is not None:
        cells = mixture.added.tocoo()
        at = tuple(torch.from_numpy(axis.astype(np.int64)).to(device) for axis in (cells.row, cells.col))
        model, popular, prior, added = (
            torch.from_numpy(values).to(device)
            for values in (mixture.model, mixture.popular, mixture.prior, cells.data)
        )
        scores *= model[:, None]
        scores += popular[:, None] * prior
        scores.index_put_(at, added, accumulate=True)
    scores[:, torch.from_numpy(~ids.active).to(device)] = -torch.inf
    scores[torch.from_numpy(local).to(device), torch.from_numpy(left_out).to(device)] = -torch.inf
    best = scores.topk(min(k, scores.shape[1]), dim=1)
    return best.indices.cpu().numpy(), best.values.cpu().numpy()


def level_scores(tuned: Tuned, states: Tensor, level: int) -> Tensor:
    """Log softmax (..., codes) float32 over the tokens of one level."""
    start, stop = tuned.ids.level_starts[level : level + 2]
    return item_logits(tuned.model, states, tuned.first + start, tuned.first + stop).float().log_softmax(-1)


def to_frame(
    tuned: Tuned, rows: NDArray[np.generic], items: NDArray[np.generic], scores: NDArray[np.generic]
) -> pl.DataFrame:
    """The ranking as a table; lines of one row come best first, lines with a score of -inf are dropped.

    Raises GemstError when a score is not a number.
    """
    checked(scores)
    frame = pl.DataFrame(
        {"row": rows, "item": items, "score": scores},
        schema={"row": pl.UInt32, "item": pl.Int64, "score": pl.Float32},
        strict=False,
    )
    frame = frame.filter(pl.col("score").is_finite()).sort("row", maintain_order=True)
    return frame.select(
        "row",
        item_id=tuned.ids.names.gather(frame["item"]),
        rank=pl.int_range(1, pl.len() + 1, dtype=pl.UInt16).over("row"),
        score="score",
    )


def checked(scores: NDArray[np.generic]) -> None:
    """Raise GemstError when a score is NaN: a ranking by it would be empty, or any."""
    if np.isnan(scores.astype(np.float32, copy=False)).any():
        raise GemstError(
            "the model's scores are not numbers",
            "Its weights hold NaN or infinite values: tune again with a smaller tuning.lr, or take an earlier version",
        )


def _seen(tuned: Tuned, seen: pl.DataFrame | None) -> tuple[Longs, Longs]:
    """Example row and item row of every known pair, sorted by example, each once."""
    if seen is None or seen.is_empty():
        return np.empty(0, np.int64), np.empty(0, np.int64)
    pairs = np.stack([seen["row"].cast(pl.Int64).to_numpy(), tuned.ids.rows_of(seen["item_id"])], axis=1)
    pairs = np.unique(pairs[pairs[:, 1] >= 0], axis=0)
    return pairs[:, 0], pairs[:, 1]


def of_batch(batch: Longs, rows: Longs, items: Longs) -> tuple[Longs, Longs]:
    """The pairs of a batch's examples: position in the batch, item. `rows`, the examples of `items`, are sorted."""
    first, last = np.searchsorted(rows, batch), np.searchsorted(rows, batch, side="right")
    counts = last - first
    at = np.repeat(first - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
    return np.repeat(np.arange(len(batch)), counts), items[at]

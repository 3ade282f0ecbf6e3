"""Scores of given candidates: every prompt is encoded once, all its candidates hang on it in one batched pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from gemst.config import Ranking
from gemst.errors import GemstError
from gemst.ranking.context import encode
from gemst.ranking.ranker import batches, checked, level_scores, of_batch

if TYPE_CHECKING:
    from gemst.backbone import Tuned

Longs = NDArray[np.int64]


def score(tuned: Tuned, examples: pl.DataFrame, candidates: pl.Series, ranking: Ranking | None = None) -> pl.DataFrame:
    """Order the candidates of each example: a list[str] series beside `examples` (columns history, query).

    Returns the columns of `rank`, sorted by row and rank: row UInt32, item_id, rank UInt16, score Float32 (as there).
    Candidates outside the catalogue, or retired, come last with a score of -inf; equal scores keep their order, and a
    candidate named twice is ranked once. Raises GemstError when there is not one list for each example, or a score is
    not a number.
    """
    if len(candidates) != len(examples):
        raise GemstError(
            f"{len(candidates):,} lists of candidates for {len(examples):,} examples", "Give one list for each example"
        )
    pairs = pl.DataFrame({"item_id": candidates.cast(pl.List(pl.String))}).with_row_index("row")
    pairs = pairs.explode("item_id", empty_as_null=False).drop_nulls().unique(keep="first", maintain_order=True)
    rows, items = pairs["row"].to_numpy().astype(np.int64), tuned.ids.rows_of(pairs["item_id"])
    paths = tuned.ids.trie.paths(items)
    values = np.full(len(pairs), -np.inf, np.float32)
    prompts = tuned.prompter.encode(examples)
    known = np.flatnonzero(paths[:, 0] >= 0)
    owners = rows[known]
    ranking = ranking or Ranking()
    memory = tuned.memory if ranking.memory else None
    with torch.inference_mode():
        for batch in batches(prompts, ranking.batch_size):
            at, mine = of_batch(batch, owners, known)
            if len(mine):
                values[mine] = _score_batch(tuned, [prompts[i] for i in batch], at, paths[mine])
                if memory is not None:
                    values[mine] = memory.mixture(tuned.ids, examples[batch]).cells(at, items[mine], values[mine])
    checked(values)
    ordered = pairs.with_columns(score=pl.Series(values)).sort(
        "row", "score", descending=[False, True], maintain_order=True
    )
    return ordered.select(
        "row", "item_id", rank=pl.int_range(1, pl.len() + 1, dtype=pl.UInt16).over("row"), score="score"
    )


def _score_batch(tuned: Tuned, prompts: list[list[int]], at: Longs, paths: Longs) -> NDArray[np.float32]:
    """Scores (pairs,) of the items at the end of `paths` (pairs, levels) for the prompts `at` (pairs,)."""
    trie, device = tuned.ids.trie, tuned.model.device
    depth = paths.shape[1]
    codes = torch.from_numpy(trie.codes[paths]).long().to(device)
    row = torch.from_numpy(at).to(device)
    context = encode(tuned.model, prompts, branches=depth > 1)
    total = level_scores(tuned, context.states, 0)[row, codes[:, 0]]
    if depth > 1:
        tokens, level, ancestors, slots = _tree(tuned, len(prompts), at, paths)
        states = context.extend(tokens.to(device), level.to(device), ancestors.to(device))
        for step in range(1, depth):
            slot = slots[:, step - 1]
            distinct, back = np.unique(at * tokens.shape[1] + slot, return_inverse=True)
            scores = level_scores(tuned, states.flatten(0, 1)[torch.from_numpy(distinct).to(device)], step)
            total = total + scores[torch.from_numpy(back).to(device), codes[:, step]]
    return total.cpu().numpy()


def _tree(tuned: Tuned, rows: int, at: Longs, paths: Longs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Longs]:
    """The distinct prefixes of each row's candidates as branch tokens: what `Context.extend` takes, and the slot
    (pairs, levels - 1) of each candidate's prefixes among its row's tokens."""
    trie, ids = tuned.ids.trie, tuned.ids
    inner = paths[:, :-1]
    keys, back = np.unique(at[:, None] * len(trie.codes) + inner, return_inverse=True)
    row, edge = np.divmod(keys, len(trie.codes))
    slot = np.arange(len(keys)) - np.searchsorted(row, row)
    slots = slot[back.reshape(inner.shape)]
    width = int(slot.max()) + 1
    level = np.searchsorted(trie.levels, edge, side="right") - 1
    tokens = np.zeros((rows, width), np.int64)
    levels = np.zeros((rows, width), np.int64)
    tokens[row, slot] = trie.codes[edge] + np.asarray(ids.level_starts)[level] + tuned.first
    levels[row, slot] = level
    ancestors = np.broadcast_to(np.eye(width, dtype=bool), (rows, width, width)).copy()
    for low in range(inner.shape[1]):
        for high in range(low):
            ancestors[at, slots[:, low], slots[:, high]] = True
    return torch.from_numpy(tokens), torch.from_numpy(levels), torch.from_numpy(ancestors), slots

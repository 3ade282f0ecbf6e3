"""Item-to-item co-visits: users who took these items also took those."""

from __future__ import annotations

import numpy as np
import polars as pl
from scipy import sparse

from gemst.evaluation.references.base import BLOCK_CELLS, Floats, Reference

_NEIGHBOURS = 200
_DECAY = 0.7


class CoVisits(Reference):
    """Scores an item by its similarity to the history, newest events first.

    The similarity of two items is the cosine of their columns in the binary (users, items) matrix of train events,
    cut to each item's nearest `_NEIGHBOURS`. A history item that is n events old weighs `_DECAY`**n. It sees no query.
    """

    name = "co-visits"

    def _fit(self, events: pl.DataFrame, items: pl.DataFrame) -> None:
        pairs = events.select(user=pl.col("user_id").rank("dense") - 1, column="column").unique().sort("user", "column")
        users = int(pairs["user"].max() or 0) + 1  # type: ignore[arg-type]
        cells = (pairs["user"].to_numpy(), pairs["column"].to_numpy())
        visits = sparse.coo_array((np.ones(len(pairs), np.float32), cells), shape=(users, len(items))).tocsc()
        lengths = np.sqrt(np.maximum(visits.sum(axis=0), 1)).astype(np.float32)
        unit = (visits @ sparse.diags_array(1 / lengths)).tocsc()
        rows = [
            _nearest((unit[:, start : start + step].T @ unit).toarray(), start)
            for step in [max(1, BLOCK_CELLS // max(1, len(items)))]
            for start in range(0, len(items), step)
        ]
        self._similar = sparse.vstack(rows).tocsr() if rows else sparse.csr_array((0, 0), dtype=np.float32)

    def scores(self, examples: pl.DataFrame) -> Floats:
        scores: Floats = (self.histories(examples, _DECAY) @ self._similar).toarray()
        return scores


def _nearest(similar: Floats, start: int) -> sparse.csr_array:
    """Keep the largest `_NEIGHBOURS` of each row; an item is not its own neighbour. `start` is the first row's item."""
    at = np.arange(len(similar))
    similar[at, at + start] = 0
    if similar.shape[1] > _NEIGHBOURS:
        bound = np.partition(similar, -_NEIGHBOURS, axis=1)[:, -_NEIGHBOURS, None]
        similar[similar < bound] = 0
    return sparse.csr_array(similar)

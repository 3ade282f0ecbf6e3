"""Item-to-item co-visits: users who took these items also took those."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import polars as pl
from scipy import sparse

from gemst.evaluation.references.base import BLOCK_CELLS, Floats, Reference

_NEIGHBOURS = 200
DECAY = 0.7


class CoVisits(Reference):
    """Scores an item by its similarity to the history, newest events first.

    The similarity of two items is the cosine of their columns in the binary (users, items) matrix of train events,
    cut to each item's nearest `_NEIGHBOURS`. A history item that is n events old weighs `DECAY`**n. It sees no query.
    """

    name = "co-visits"

    def _fit(self, events: pl.DataFrame, items: pl.DataFrame) -> None:
        pairs = events.select(user=pl.col("user_id").rank("dense") - 1, column="column").unique().sort("user", "column")
        users = int(pairs["user"].max() or 0) + 1  # type: ignore[arg-type]
        cells = (pairs["user"].to_numpy(), pairs["column"].to_numpy())
        visits = sparse.coo_array((np.ones(len(pairs), np.float32), cells), shape=(users, len(items))).tocsc()
        lengths = np.sqrt(np.maximum(visits.sum(axis=0), 1)).astype(np.float32)
        unit = (visits @ sparse.diags_array(1 / lengths)).tocsc()
        # How many pairs an item has at most: the lengths of its users' histories together, or all items.
        pairs_of = np.minimum(visits.T @ visits.sum(axis=1), len(items))
        blocks = np.cumsum(pairs_of, dtype=np.float64) // BLOCK_CELLS
        bounds = [*np.unique(blocks, return_index=True)[1].tolist(), len(items)]
        rows = [_nearest((unit[:, start:end].T @ unit).tocsr(), start) for start, end in pairwise(bounds)]
        self._similar = sparse.vstack(rows).tocsr() if rows else sparse.csr_array((0, 0), dtype=np.float32)

    def scores(self, examples: pl.DataFrame) -> Floats:
        scores: Floats = (self.histories(examples, DECAY) @ self._similar).toarray()
        return scores


def _nearest(similar: sparse.csr_array, start: int) -> sparse.csr_array:
    """Keep the largest `_NEIGHBOURS` of each row, the more popular one of equals; an item is not its own neighbour.

    `start` is the first row's item.
    """
    cells = similar.tocoo()
    others = cells.row + start != cells.col
    row, column, value = cells.row[others], cells.col[others], cells.data[others]
    order = np.lexsort((column, -value, row))
    row, column, value = row[order], column[order], value[order]
    kept = np.arange(len(row)) - np.searchsorted(row, row) < _NEIGHBOURS
    return sparse.csr_array((value[kept], (row[kept], column[kept])), shape=similar.shape)

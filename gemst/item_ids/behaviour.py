"""Item vectors from co-behaviour: what users click one after another, and for the same query."""

from __future__ import annotations

import numpy as np
import polars as pl

from gemst.item_ids.embeddings import Floats, unit

_WINDOW = 5  # events of a user after an event that count as its company


def behaviour_vectors(items: pl.DataFrame, train: pl.DataFrame, dimensions: int) -> tuple[Floats, np.ndarray]:
    """Unit vectors (len(items), dimensions) and which items have one (len(items),) bool; the others are zero.

    Positive pointwise mutual information between items and their contexts (items within `_WINDOW` events of a user, of
    both tasks, weighed by 1 / distance, and queries they were clicked for), reduced by a truncated SVD.
    """
    from scipy import sparse
    from scipy.sparse.linalg import svds

    n = len(items)
    index = items.select("item_id").with_row_index("at")
    events = train.select("user_id", "query", item_id=pl.col("targets").list.first()).join(
        index, on="item_id", maintain_order="left"
    )
    at, user = events["at"].to_numpy().astype(np.int64), events["user_id"].rle_id().to_numpy()
    rows, columns, weights = [], [], []
    for gap in range(1, _WINDOW + 1):
        same = user[gap:] == user[:-gap]
        left, right = at[:-gap][same], at[gap:][same]
        rows += [left, right]
        columns += [right, left]
        weights += [np.full(2 * len(left), 1 / gap)]
    searches = events.with_columns(kind=pl.col("query").rank("dense")).drop_nulls("query")
    rows.append(searches["at"].to_numpy().astype(np.int64))
    columns.append(n + searches["kind"].to_numpy().astype(np.int64) - 1)
    weights.append(np.ones(len(searches)))
    width = n + int(searches["kind"].max() or 0)  # type: ignore[arg-type]
    counts = sparse.coo_array(
        (np.concatenate(weights), (np.concatenate(rows), np.concatenate(columns))), shape=(n, width)
    ).tocsr()
    known = np.asarray(counts.sum(1)).ravel() > 0
    rank = min(dimensions, min(n, width) - 1)
    vectors = np.zeros((n, dimensions), np.float32)
    if rank < 1 or not known.any():
        return vectors, known
    cells = counts.tocoo()
    total = cells.data.sum()
    of_row, of_column = np.asarray(counts.sum(1)).ravel(), np.asarray(counts.sum(0)).ravel()
    pmi = np.log(cells.data * total / (of_row[cells.row] * of_column[cells.col]))
    positive = sparse.coo_array((np.maximum(pmi, 0), (cells.row, cells.col)), shape=counts.shape).tocsr()
    if positive.max() < 1e-9:  # a single item was ever clicked, say: company that tells nobody apart
        return vectors, np.zeros_like(known)
    left, values, _ = svds(positive.astype(np.float64), k=rank, v0=np.ones(min(positive.shape)))
    order = np.argsort(-values)
    vectors[:, :rank] = left[:, order] * np.sqrt(np.maximum(values[order], 0))
    known &= np.linalg.norm(vectors, axis=1) > 1e-8
    vectors[~known] = 0
    return unit(vectors), known


def from_text(text: Floats, behaviour: Floats, known: np.ndarray) -> Floats:
    """Ridge regression (d_text, d_behaviour): guesses the behaviour vector of an item nobody has met from its text."""
    x, y = text[known].astype(np.float64), behaviour[known].astype(np.float64)
    solved = np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ y)
    return solved.astype(np.float32)

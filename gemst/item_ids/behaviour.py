"""Item vectors from behaviour: what users click one after another and for the same query, and for which queries."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from gemst.item_ids.embeddings import Floats, unit

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from scipy import sparse

_WINDOW = 5  # events of a user after an event that count as its company
_PRIOR = 5  # added to an item's train events: a rare item's few clicks are not yet a rate


def behaviour_vectors(items: pl.DataFrame, train: pl.DataFrame, dimensions: int) -> tuple[Floats, np.ndarray]:
    """Unit vectors (len(items), dimensions) and which items have one (len(items),) bool; the others are zero.

    Positive pointwise mutual information between items and their contexts (items within `_WINDOW` events of a user, of
    both tasks, weighed by 1 / distance, and queries they were clicked for), reduced by a truncated SVD.
    """
    from scipy import sparse

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
    left, values = _leading(positive, rank)
    vectors[:, :rank] = left * np.sqrt(values)
    known &= np.linalg.norm(vectors, axis=1) > 1e-8
    vectors[~known] = 0
    return unit(vectors), known


def query_vectors(items: pl.DataFrame, train: pl.DataFrame, dimensions: int) -> Floats:
    """Vectors (len(items), k <= dimensions) of the queries that items are clicked for; (len(items), 0) without any.

    The truncated SVD of sqrt(clicks under the query / events of the item): the share of its clicks that an item owes
    to a query, where co-behaviour knows only which queries it shares with others. Not of unit length: what is mostly
    met without a query lies near zero.
    """
    from scipy import sparse

    index = items.select("item_id").with_row_index("at")
    events = train.select("query", item_id=pl.col("targets").list.first()).join(index, on="item_id")
    clicks = events.drop_nulls("query").with_columns(pl.col("query").rank("dense") - 1)
    width = clicks["query"].n_unique()
    rank = min(dimensions, min(len(items), width) - 1)
    if rank < 1:
        return np.zeros((len(items), 0), np.float32)
    met = np.bincount(events["at"].to_numpy(), minlength=len(items))
    rows, columns = (clicks[name].to_numpy().astype(np.int64) for name in ("at", "query"))
    counts = sparse.coo_array((np.ones(len(clicks)), (rows, columns)), shape=(len(items), width)).tocsr()
    left, values = _leading((sparse.diags_array(1 / (met + _PRIOR)) @ counts).sqrt(), rank)
    return (left * values).astype(np.float32)


def from_text(text: Floats, behaviour: Floats, known: np.ndarray) -> Floats:
    """Ridge regression (d_text, d_behaviour): guesses the behaviour vector of an item nobody has met from its text."""
    x, y = text[known].astype(np.float64), behaviour[known].astype(np.float64)
    solved = np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ y)
    return solved.astype(np.float32)


def _leading(matrix: sparse.csr_array, rank: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Left singular vectors (n, rank) and values (rank,), the largest first, the same ones in every run."""
    from scipy.sparse.linalg import svds

    left, values, _ = svds(matrix.astype(np.float64), k=rank, v0=np.ones(min(matrix.shape)))
    order = np.argsort(-values)
    return left[:, order], np.maximum(values[order], 0)

"""What a log counts: its events, the clicks under a query, and which items go together."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import sparse

BLOCK_CELLS = 8_000_000  # cells of a dense (rows, items) block: 32 MB of float32
DECAY = 0.7  # weight of a history's event against the one after it


def train_events(train: pl.DataFrame) -> pl.DataFrame:
    """The events behind train examples: every target, and once each history item that is no target of its user.

    Returns user_id, item_id, task, query; task and query are null for the events known from histories alone.
    """
    targets = (
        train.select("user_id", "task", "query", item_id="targets")
        .explode("item_id", empty_as_null=False)
        .drop_nulls("item_id")
    )
    heads = train.select("user_id", item_id="history").explode("item_id", empty_as_null=False).drop_nulls().unique()
    heads = heads.join(targets, on=["user_id", "item_id"], how="anti").sort("user_id", "item_id")
    return pl.concat([targets.select("user_id", "item_id", "task", "query"), heads], how="diagonal")


def query_key(column: str = "query") -> pl.Expr:
    """What makes two queries one: letter case and outer blanks aside, they are spelled alike."""
    return pl.col(column).cast(pl.String).str.to_lowercase().str.strip_chars()


def clicks_by_query(events: pl.DataFrame, items: int) -> tuple[pl.DataFrame, sparse.csr_array]:
    """Queries (key, at), sorted, and clicks (queries, items) float32: `at` is a query's row.

    `events` has query (null without one) and column, an event's item in [0, items).
    """
    clicks = events.drop_nulls("query").select("column", key=query_key())
    queries = clicks.select("key").unique().sort("key").with_row_index("at")
    cells = clicks.join(queries, on="key")
    counted = sparse.coo_array(
        (np.ones(len(cells), np.float32), (cells["at"].to_numpy(), cells["column"].to_numpy())),
        shape=(len(queries), items),
    )
    return queries.select("key", "at"), counted.tocsr()


def rows_of(queries: pl.DataFrame, examples: pl.DataFrame) -> pl.Series:
    """Row of each example's query in `queries`; null where there is no query, or one that is not among them."""
    return examples.select(key=query_key()).join(queries, on="key", how="left", maintain_order="left")["at"]


def history_matrix(at: NDArray[np.int64], lengths: NDArray[np.int64], items: int, decay: float) -> sparse.csr_array:
    """Matrix (histories, items): the newest event weighs 1, the one before `decay`, and so on.

    `at` holds the items of all histories, one after another, oldest first, -1 for those not in the catalogue; `lengths`
    says how many each history has.
    """
    ends = np.cumsum(lengths)
    row = np.repeat(np.arange(len(lengths)), lengths)
    age = np.repeat(ends, lengths) - 1 - np.arange(len(at))
    known = at >= 0
    weights = (decay ** age[known].astype(np.float64)).astype(np.float32)
    return sparse.coo_array((weights, (row[known], at[known])), shape=(len(lengths), items)).tocsr()


def similar_items(events: pl.DataFrame, items: int, neighbours: int) -> sparse.csr_array:
    """Similarity (items, items) float32 to each item's nearest `neighbours`, itself not among them.

    It is the cosine of two items' columns in the binary (users, items) matrix of `events` (user_id, column). Of equals
    the lower column is nearer.
    """
    pairs = events.select(user=pl.col("user_id").rank("dense") - 1, column="column").unique().sort("user", "column")
    users = int(pairs["user"].max() or 0) + 1  # type: ignore[arg-type]
    cells = (pairs["user"].to_numpy(), pairs["column"].to_numpy())
    visits = sparse.coo_array((np.ones(len(pairs), np.float32), cells), shape=(users, items)).tocsc()
    lengths = np.sqrt(np.maximum(visits.sum(axis=0), 1)).astype(np.float32)
    unit = (visits @ sparse.diags_array(1 / lengths)).tocsc()
    # How many pairs an item has at most: the lengths of its users' histories together, or all items.
    pairs_of = np.minimum(visits.T @ visits.sum(axis=1), items)
    blocks = np.cumsum(pairs_of, dtype=np.float64) // BLOCK_CELLS
    bounds = [*np.unique(blocks, return_index=True)[1].tolist(), items]
    rows = [_nearest((unit[:, start:end].T @ unit).tocsr(), start, neighbours) for start, end in pairwise(bounds)]
    return sparse.vstack(rows).tocsr() if rows else sparse.csr_array((0, 0), dtype=np.float32)


def _nearest(similar: sparse.csr_array, start: int, neighbours: int) -> sparse.csr_array:
    """Keep the largest `neighbours` of each row, the lower column of equals; an item is not its own neighbour.

    `start` is the first row's item.
    """
    cells = similar.tocoo()
    others = cells.row + start != cells.col
    row, column, value = cells.row[others], cells.col[others], cells.data[others]
    order = np.lexsort((column, -value, row))
    row, column, value = row[order], column[order], value[order]
    kept = np.arange(len(row)) - np.searchsorted(row, row) < neighbours
    return sparse.csr_array((value[kept], (row[kept], column[kept])), shape=similar.shape)

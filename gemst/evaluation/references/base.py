"""What all reference rankers share: a catalogue in order of popularity, scores by block, a fixed rule for ties."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Self

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import sparse

from gemst.memory.counts import BLOCK_CELLS, history_matrix, train_events

Floats = NDArray[np.float32]


class Reference(ABC):
    """A ranker made of counts or of text. Equal scores are ordered by popularity, then by item_id."""

    name: ClassVar[str]
    item_ids: pl.Series  # the catalogue, most popular first; a column of every score block is a position in it
    counts: NDArray[np.int64]  # train events per item, same order

    def fit(self, train: pl.DataFrame, items: pl.DataFrame) -> Self:
        """Learn from train examples (columns: gemst.data.tables) and from the items' text."""
        events = train_events(train)
        catalogue = (
            items.join(events.group_by("item_id").len("count"), on="item_id", how="left")
            .with_columns(pl.col("count").fill_null(0))
            .sort(["count", "item_id"], descending=[True, False])
        )
        self.item_ids, self.counts = catalogue["item_id"], catalogue["count"].cast(pl.Int64).to_numpy()
        self._columns = pl.DataFrame({"item_id": self.item_ids}).with_row_index("column")
        known = events.join(self._columns, on="item_id", maintain_order="left")
        self._fit(known, catalogue)
        return self

    @abstractmethod
    def _fit(self, events: pl.DataFrame, items: pl.DataFrame) -> None:
        """Learn from `events` (user_id, item_id, task, query, column) and `items` in catalogue order."""

    @abstractmethod
    def scores(self, examples: pl.DataFrame) -> Floats:
        """Scores (len(examples), items), float32, higher is better, of one block of examples."""

    def rank(self, examples: pl.DataFrame, k: int, seen: pl.DataFrame | None = None) -> pl.DataFrame:
        """The k best items of the whole catalogue per example.

        `seen` (row, item_id) are left out; `row` is the position in `examples`. Returns row UInt32, item_id, rank
        UInt16 (from 1), score Float32, sorted by row and rank: fewer than k lines where fewer items are left.
        """
        at, columns = self._cells(seen)
        parts = [_EMPTY]
        for start, block in self._blocks(examples):
            scores = self.scores(block)
            first, last = np.searchsorted(at, [start, start + len(block)])
            scores[at[first:last] - start, columns[first:last]] = -np.inf
            best = top(scores, k)
            values = np.take_along_axis(scores, best, 1)
            kept = np.isfinite(values)
            rows = np.arange(start, start + len(block), dtype=np.uint32)
            ranks = np.arange(1, best.shape[1] + 1, dtype=np.uint16)
            parts.append(
                pl.DataFrame(
                    {
                        "row": np.broadcast_to(rows[:, None], best.shape)[kept],
                        "item_id": self.item_ids.gather(best[kept]),
                        "rank": np.broadcast_to(ranks, best.shape)[kept],
                        "score": values[kept],
                    }
                )
            )
        return pl.concat(parts)

    def rerank(self, examples: pl.DataFrame, candidates: pl.Series) -> pl.DataFrame:
        """Order given candidates: a list[str] series beside `examples`, ids outside the catalogue come last.

        Returns the same columns as `rank`, sorted by row and rank.
        """
        pairs = candidate_pairs(candidates)
        columns = pairs.join(self._columns, on="item_id", how="left", maintain_order="left")["column"]
        at, known = pairs["row"].to_numpy(), columns.is_not_null().to_numpy()
        column = columns.fill_null(len(self.item_ids)).to_numpy()
        values = np.full(len(pairs), -np.inf, np.float32)
        for start, block in self._blocks(examples):
            first, last = np.searchsorted(at, [start, start + len(block)])
            inside = np.arange(first, last)[known[first:last]]
            values[inside] = self.scores(block)[at[inside] - start, column[inside]]
        scored = pairs.with_columns(score=pl.Series(values), column=pl.Series(column))
        ordered = scored.sort("row", "score", "column", descending=[False, True, False])
        return ordered.select(
            "row", "item_id", rank=pl.int_range(1, pl.len() + 1, dtype=pl.UInt16).over("row"), score="score"
        )

    def histories(self, examples: pl.DataFrame, decay: float = 1.0) -> sparse.csr_array:
        """History matrix (examples, items): the newest event weighs 1, the one before `decay`, and so on."""
        flat = examples.select(item_id="history").explode("item_id", empty_as_null=False)
        columns = flat.join(self._columns, on="item_id", how="left", maintain_order="left")["column"]
        lengths = examples["history"].list.len().cast(pl.Int64).to_numpy()
        return history_matrix(columns.cast(pl.Int64).fill_null(-1).to_numpy(), lengths, len(self.item_ids), decay)

    def _cells(self, seen: pl.DataFrame | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        if seen is None:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        cells = seen.select("row", "item_id").join(self._columns, on="item_id").sort("row")
        return cells["row"].cast(pl.Int64).to_numpy(), cells["column"].cast(pl.Int64).to_numpy()

    def _blocks(self, examples: pl.DataFrame) -> list[tuple[int, pl.DataFrame]]:
        step = max(1, BLOCK_CELLS // max(1, len(self.item_ids)))
        return [(start, examples.slice(start, step)) for start in range(0, len(examples), step)]


def candidate_pairs(candidates: pl.Series) -> pl.DataFrame:
    """A list[str] series as lines of row UInt32 (position), item_id, in order."""
    frame = pl.DataFrame({"item_id": candidates}).with_row_index("row")
    return frame.explode("item_id", empty_as_null=False).drop_nulls()


def top(scores: Floats, k: int) -> NDArray[np.int64]:
    """Columns (rows, min(k, columns)) of the k highest scores, best first, the lower column first among equals.

    >>> top(np.array([[1, 3, 3, 0]], np.float32), 2).tolist()
    [[1, 2]]
    """
    k = min(k, scores.shape[1])
    if k == 0:
        return np.empty((len(scores), 0), np.int64)
    worst = np.partition(scores, -k, axis=1)[:, -k, None]
    above, equal = scores > worst, scores == worst
    room = k - above.sum(axis=1, keepdims=True)  # the first of the equals fill it; a plain argpartition takes any
    kept = above | (equal & (np.cumsum(equal, axis=1, dtype=np.int32) <= room))
    best = kept.nonzero()[1].reshape(-1, k)
    order = np.argsort(-np.take_along_axis(scores, best, 1), axis=1, kind="stable")
    chosen: NDArray[np.int64] = np.take_along_axis(best, order, 1)
    return chosen


_EMPTY = pl.DataFrame(schema={"row": pl.UInt32, "item_id": pl.String, "rank": pl.UInt16, "score": pl.Float32})

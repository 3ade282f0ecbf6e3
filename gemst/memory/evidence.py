"""The log's own counts beside the model: clicks under the query, and items that go together with the history.

A model tuned for a fraction of an epoch, or on many rare queries, has not seen what a table of counts has. Its scores
and what the counts say are mixed log-linearly: with the model's log probability l of an item,

    score = model * l + clicked * [c > 0] + rate * log(1 + 1000 c / (n + 5)) + similar * log(1 + 100 s)
            + popular * log(1 + n)

where c are the item's clicks under the very query, n its events, and s its similarity to the history (the item itself,
where it stands there, counts as similar). The weights are fitted on validation examples, for each case on its own
(`gemst.memory.fit`). Interpolating a language model with what a store remembers is kNN-LM's idea (Khandelwal et al.
2020); log-linear weights are those of reranking by maximum likelihood.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import sparse

from gemst.errors import GemstError
from gemst.files import read_json, require, write_json
from gemst.item_ids.ids import rows_by
from gemst.memory.counts import DECAY, clicks_by_query, history_matrix, query_key, similar_items

if TYPE_CHECKING:
    from gemst.item_ids import ItemIds

Floats = NDArray[np.float32]

CASES = ("recommendation", "search", "new query")  # the last: nobody had asked that in train
FEATURES = ("model", "clicked", "rate", "similar", "popular")
ALONE = (1.0, 0.0, 0.0, 0.0, 0.0)  # the model by itself
_NEIGHBOURS = 50  # of an item
_NEWEST = 20  # events of a history: an older one weighs less than a thousandth
_PRIOR, _RATE, _SIMILAR = 5, 1000, 100


class Catalogue(Protocol):
    """Whatever knows a memory's items by their ids, such as `ItemIds`."""

    def rows_of(self, item_ids: pl.Series) -> NDArray[np.int64]:
        """Row of each item_id, -1 for those it does not hold."""


@dataclass(frozen=True)
class Fit:
    """A case's weights, and the NDCG@10 of its validation examples without the memory and with it."""

    case: str
    examples: int
    before: float
    after: float
    weights: tuple[float, ...]  # of FEATURES


@dataclass(frozen=True)
class Mixture:
    """What is made of a batch's scores: model * scores + popular * prior + added."""

    model: Floats  # (batch,)
    popular: Floats  # (batch,)
    prior: Floats  # (items,): log(1 + train events)
    added: sparse.csr_array  # (batch, items), with sorted columns

    def cells(self, row: NDArray[np.integer], item: NDArray[np.integer], scores: Floats) -> Floats:
        """The mixture of the model's `scores` (cells,) of items for rows of the batch."""
        mixed: Floats = self.model[row] * scores + self.popular[row] * self.prior[item]
        return mixed + at_cells(self.added, row, item)


@dataclass(frozen=True)
class Memory:
    """Counts of the train events over a catalogue's items, in the catalogue's order."""

    queries: pl.DataFrame  # key, at: a query's row in `clicks`
    clicks: sparse.csr_array  # (queries, items) float32
    events: NDArray[np.int64]  # (items,)
    similar: sparse.csr_array  # (items, items) float32
    fits: tuple[Fit, ...] = ()  # a case without one is left to the model

    def fitted(self, fits: Sequence[Fit]) -> Memory:
        """The same counts with other weights."""
        return replace(self, fits=tuple(fits))

    def counts_as(self, other: Memory) -> bool:
        """Whether both counted the same, whatever their weights."""
        if len(self.events) != len(other.events) or not self.queries.equals(other.queries):
            return False
        pairs = ((self.clicks, other.clicks), (self.similar, other.similar))
        return np.array_equal(self.events, other.events) and all((a != b).nnz == 0 for a, b in pairs)

    @cached_property
    def prior(self) -> Floats:
        """log(1 + train events) of every item, (items,)."""
        return np.log1p(self.events).astype(np.float32)

    @cached_property
    def _index(self) -> dict[str, int]:
        return dict(zip(self.queries["key"].to_list(), self.queries["at"].to_list(), strict=True))

    def _rows(self, examples: pl.DataFrame) -> NDArray[np.int64]:
        """Row of each example's query in `clicks`, -1 for what nobody asked. Costs what is asked, not the log."""
        return rows_by(self._index, examples.select(query_key()).to_series())

    def cases(self, examples: pl.DataFrame) -> NDArray[np.int64]:
        """Position in `CASES` of each example, (examples,)."""
        asked = examples["query"].is_not_null().to_numpy()
        return np.where(asked, np.where(self._rows(examples) >= 0, 1, 2), 0)

    def evidence(self, catalogue: Catalogue, examples: pl.DataFrame) -> tuple[sparse.csr_array, ...]:
        """What is known of the items for each example (columns history, query): clicked, rate and similar.

        Each is (examples, items) float32 with sorted columns, zero where nothing is known.
        """
        at = self._rows(examples)
        row = np.flatnonzero(at >= 0)
        found = self.clicks[at[row]].tocoo()
        shape = (len(examples), len(self.events))
        cells = (row[found.row], found.col)
        per_event = found.data / (self.events[found.col] + _PRIOR)
        clicked = sparse.csr_array((np.ones(found.nnz, np.float32), cells), shape=shape)
        rate = sparse.csr_array((np.log1p(_RATE * per_event).astype(np.float32), cells), shape=shape)
        newest = examples["history"].list.tail(_NEWEST)
        lengths = newest.list.len().cast(pl.Int64).to_numpy()
        past = history_matrix(catalogue.rows_of(newest.explode(empty_as_null=False)), lengths, shape[1], DECAY)
        near = (past @ self.similar + past).tocsr()
        near.data = np.log1p(_SIMILAR * near.data).astype(np.float32)
        for part in (clicked, rate, near):
            part.sort_indices()
        return clicked, rate, near

    def mixture(self, catalogue: Catalogue, examples: pl.DataFrame) -> Mixture:
        """How each example's scores are mixed with its evidence."""
        weights = {fit.case: fit.weights for fit in self.fits}
        table = np.asarray([weights.get(case, ALONE) for case in CASES], np.float32)
        model, *others, popular = table[self.cases(examples)].T
        evidence = zip(others, self.evidence(catalogue, examples), strict=True)
        clicked, rate, similar = (sparse.diags_array(weight) @ part for weight, part in evidence)
        added = (clicked + rate + similar).tocsr()
        added.sort_indices()
        return Mixture(model, popular, self.prior, added)

    def save(self, folder: Path, ids: ItemIds) -> None:
        """Write clicks, events and similar (Parquet, by item_id) and fits.json to `folder`, which is made."""
        folder.mkdir(parents=True)
        clicks, similar = self.clicks.tocoo(), self.similar.tocoo()
        tables = {
            "clicks": {
                "query": self.queries.sort("at")["key"].gather(clicks.row),
                "item_id": ids.names.gather(clicks.col),
                "clicks": clicks.data,
            },
            "events": {"item_id": ids.names, "events": self.events},
            "similar": {
                "item_id": ids.names.gather(similar.row),
                "other": ids.names.gather(similar.col),
                "similarity": similar.data,
            },
        }
        for name, columns in tables.items():
            pl.DataFrame(columns).write_parquet(folder / f"{name}.parquet")
        write_json(
            folder / "fits.json",
            [asdict(fit) | {"weights": dict(zip(FEATURES, fit.weights, strict=True))} for fit in self.fits],
        )


def build(ids: ItemIds, events: pl.DataFrame) -> Memory:
    """Count events (user_id, item_id, query); those of other items than `ids` are left out.

    The weights leave the model alone: `gemst.memory.fit` finds better ones.
    """
    index = pl.DataFrame({"item_id": ids.names}).with_row_index("column")
    return of_events(events.join(index, on="item_id", maintain_order="left"), len(ids.item_id))


def of_events(events: pl.DataFrame, items: int) -> Memory:
    """Count events (user_id, query, and column: the item in [0, items)), as `build` does."""
    queries, clicks = clicks_by_query(events, items)
    counts = np.bincount(events["column"].to_numpy(), minlength=items)
    return Memory(queries, clicks, counts, similar_items(events, items, _NEIGHBOURS))


def load(folder: Path, ids: ItemIds) -> Memory:
    """Read what `Memory.save` wrote. Items that `ids` has got since then have no counts.

    Raises GemstError when a file is missing or damaged, or holds items that `ids` does not.
    """
    tables = {name: _table(folder / f"{name}.parquet") for name in ("clicks", "events", "similar")}
    fits = tuple(
        Fit(**{**fit, "weights": tuple(fit["weights"][name] for name in FEATURES)})
        for fit in read_json(require(folder / "fits.json", made_by="gemst tune"))
    )
    items, at = len(ids.item_id), {name: ids.rows_of(table["item_id"]) for name, table in tables.items()}
    if (at["events"] < 0).any():
        raise GemstError(f"{folder} is of other items than the model's item IDs", "Run `gemst tune` again")
    events = np.zeros(items, np.int64)
    events[at["events"]] = tables["events"]["events"].to_numpy()
    queries = tables["clicks"].select(key="query").unique().sort("key").with_row_index("at").select("key", "at")
    asked = tables["clicks"].select(key="query").join(queries, on="key", how="left", maintain_order="left")["at"]
    clicks = _matrix(tables["clicks"]["clicks"], asked.to_numpy(), at["clicks"], (len(queries), items))
    others = ids.rows_of(tables["similar"]["other"])
    similar = _matrix(tables["similar"]["similarity"], at["similar"], others, (items, items))
    return Memory(queries, clicks, events, similar, fits)


def _table(path: Path) -> pl.DataFrame:
    try:
        return pl.read_parquet(require(path, made_by="gemst tune"))
    except pl.exceptions.PolarsError as error:
        raise GemstError(f"{path} cannot be read: {error}", "Run `gemst tune` again") from None


def at_cells(matrix: sparse.csr_array, row: NDArray[np.integer], column: NDArray[np.integer]) -> Floats:
    """Values (cells,) of a matrix with sorted columns at `row` and `column`; zero where it has none."""
    width = matrix.shape[1]
    own = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr)) * width + matrix.indices
    wanted = row.astype(np.int64) * width + column
    place = np.searchsorted(own, wanted)
    found = np.append(own, -1)[place] == wanted
    values: Floats = np.where(found, np.append(matrix.data, 0)[place], 0).astype(np.float32)
    return values


def _matrix(
    values: pl.Series, row: NDArray[np.integer], column: NDArray[np.int64], shape: tuple[int, int]
) -> sparse.csr_array:
    return sparse.coo_array((values.to_numpy().astype(np.float32), (row, column)), shape=shape).tocsr()

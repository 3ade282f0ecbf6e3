"""Others' clicks under this query, ordered by what goes with the history: the hybrid a team builds without a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import numpy as np

from gemst.evaluation.references.base import Floats, Reference
from gemst.evaluation.references.covisits import CoVisits
from gemst.evaluation.references.lookup import Lookup
from gemst.memory.counts import DECAY

if TYPE_CHECKING:
    import polars as pl

_PRIOR = 5  # added to an item's train events: a rare item's few clicks are not yet a rate
_FLOOR = 1e-3  # similarity of what never goes with the history: the clicks alone order it


class QueryCoVisits(Reference):
    """Scores a search by sqrt(clicks under the query / events of the item) times the similarity to the history.

    An item of the history itself counts as similar to it. Recommendations, and searches for what nobody searched for in
    train, are ordered by the similarity alone. It is the one reference that reads both the query and the history, as
    the model does. The square root and the floor were chosen on MovieLens' validation.
    """

    name = "query-co-visits"

    def __init__(self) -> None:
        self.visits, self.lookup = CoVisits(), Lookup()

    def fit(self, train: pl.DataFrame, items: pl.DataFrame) -> Self:
        """Fits its two parts, `visits` and `lookup`, which are references of their own."""
        self.visits.fit(train, items)
        self.lookup.fit(train, items)
        return super().fit(train, items)

    def _fit(self, events: pl.DataFrame, items: pl.DataFrame) -> None:
        """Its parts have learned all there is."""

    def scores(self, examples: pl.DataFrame) -> Floats:
        scores = self.visits.scores(examples)
        asked = examples["query"].is_not_null()
        if asked.any():
            searches, at = examples.filter(asked), asked.to_numpy()
            rate = np.sqrt(self.lookup.scores(searches) / (self.counts + _PRIOR))
            rate[~rate.any(axis=1)] = 1
            scores[at] = rate * (scores[at] + self.histories(searches, DECAY).toarray() + _FLOOR)
        return scores

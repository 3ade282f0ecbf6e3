"""Item-to-item co-visits: users who took these items also took those."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gemst.evaluation.references.base import Floats, Reference
from gemst.memory.counts import DECAY, similar_items

if TYPE_CHECKING:
    import polars as pl

_NEIGHBOURS = 200


class CoVisits(Reference):
    """Scores an item by its similarity to the history, newest events first.

    The similarity of two items is the cosine of their columns in the binary (users, items) matrix of train events,
    cut to each item's nearest `_NEIGHBOURS`, the more popular one of equals. A history item that is n events old weighs
    `DECAY`**n. It sees no query.
    """

    name = "co-visits"

    def _fit(self, events: pl.DataFrame, items: pl.DataFrame) -> None:
        self._similar = similar_items(events, len(items), _NEIGHBOURS)

    def scores(self, examples: pl.DataFrame) -> Floats:
        scores: Floats = (self.histories(examples, DECAY) @ self._similar).toarray()
        return scores

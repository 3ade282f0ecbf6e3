"""Exact-query lookup: what did others take after this very query?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gemst.evaluation.references.base import Floats, Reference
from gemst.memory.counts import clicks_by_query, rows_of

if TYPE_CHECKING:
    import polars as pl


class Lookup(Reference):
    """Scores an item by its train clicks under the same query, letter case and outer blanks aside.

    Where the counts are equal, and for unknown queries and recommendations, popularity decides.
    """

    name = "lookup"

    def _fit(self, events: pl.DataFrame, items: pl.DataFrame) -> None:
        self._queries, self._clicks = clicks_by_query(events, len(items))

    def scores(self, examples: pl.DataFrame) -> Floats:
        at = rows_of(self._queries, examples)
        known = at.is_not_null().to_numpy()
        scores = np.zeros((len(examples), len(self.item_ids)), np.float32)
        scores[known] = self._clicks[at.drop_nulls().to_numpy()].toarray()
        return scores

"""Exact-query lookup: what did others take after this very query?"""

from __future__ import annotations

import numpy as np
import polars as pl
from scipy import sparse

from gemst.evaluation.references.base import Floats, Reference


class Lookup(Reference):
    """Scores an item by its train clicks under the same query, letter case and outer blanks aside.

    Where the counts are equal, and for unknown queries and recommendations, popularity decides.
    """

    name = "lookup"

    def _fit(self, events: pl.DataFrame, items: pl.DataFrame) -> None:
        clicks = events.drop_nulls("query").select("column", key=_key("query"))
        self._queries = clicks.select("key").unique().sort("key").with_row_index("at")
        cells = clicks.join(self._queries, on="key")
        ones = np.ones(len(cells), np.float32)
        self._clicks = sparse.coo_array(
            (ones, (cells["at"].to_numpy(), cells["column"].to_numpy())), shape=(len(self._queries), len(items))
        ).tocsr()

    def scores(self, examples: pl.DataFrame) -> Floats:
        at = examples.select(key=_key("query")).join(self._queries, on="key", how="left", maintain_order="left")["at"]
        known = at.is_not_null().to_numpy()
        scores = np.zeros((len(examples), len(self.item_ids)), np.float32)
        scores[known] = self._clicks[at.drop_nulls().to_numpy()].toarray()
        return scores


def _key(column: str) -> pl.Expr:
    return pl.col(column).cast(pl.String).str.to_lowercase().str.strip_chars()

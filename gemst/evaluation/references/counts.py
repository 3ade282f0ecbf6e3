"""The log's counts by themselves, weighed as the memory weighs them: what a model beside them has to add to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import numpy as np
import polars as pl

from gemst.evaluation.protocols import seen_items
from gemst.evaluation.references.base import Floats, Reference
from gemst.item_ids.ids import rows_by
from gemst.memory.choices import CANDIDATES, best, choices
from gemst.memory.evidence import CASES, Fit, Memory, of_events
from gemst.memory.fit import fit

if TYPE_CHECKING:
    from numpy.typing import NDArray

_EXAMPLES = 4000  # of valid that weigh the counts, at most, evenly spaced
_UNWEIGHED = (0.0, 1.0, 1.0, 1.0, 1.0)  # where there are too few of them; of the model there is nothing


class Counts(Reference):
    """Clicks under the query, co-visits and popularity, log-linear, with maximum-likelihood weights from `valid`.

    The features, cases and fit are those of `gemst.memory`, without a model among them: the difference from a model
    with a memory is what the model knows beyond the counts.
    """

    name = "counts"
    memory: Memory

    def __init__(self, valid: pl.DataFrame, exclude_seen: bool) -> None:
        self.valid, self.exclude_seen = valid, exclude_seen

    def fit(self, train: pl.DataFrame, items: pl.DataFrame) -> Self:
        super().fit(train, items)
        examples = self.valid.gather_every(max(1, -(-len(self.valid) // _EXAMPLES)))
        seen = seen_items(examples, [train]) if self.exclude_seen else None
        evidence = self.memory.evidence(self, examples)
        offered = [best(self.item_ids, kind, CANDIDATES, seen) for kind in evidence[1:]]
        popular = pl.DataFrame({"item_id": self.item_ids.head(CANDIDATES)})
        rows = pl.DataFrame({"row": range(len(examples))}, schema={"row": pl.UInt32})
        offered.append(rows.join(popular, how="cross"))
        candidates = pl.concat(offered).unique()
        if seen is not None:
            candidates = candidates.join(seen, on=["row", "item_id"], how="anti")
        chosen = choices(self.memory, self, examples, candidates.sort("row", "item_id"), evidence)
        fits = []
        for number, case in enumerate(CASES):
            mine, _ = chosen.of(number)
            weights = fit(chosen.evidence[mine], chosen.row[mine], chosen.target[mine], _UNWEIGHED[1:])
            fits.append(Fit(case, int((chosen.case == number).sum()), 0.0, 0.0, (0.0, *weights)))
        self.memory = self.memory.fitted(fits)
        return self

    def _fit(self, events: pl.DataFrame, items: pl.DataFrame) -> None:
        self.memory = of_events(events, len(items))
        self._index = {item: row for row, item in enumerate(self.item_ids)}

    def rows_of(self, item_ids: pl.Series) -> NDArray[np.int64]:
        """Column of each item_id, -1 for those the catalogue does not hold."""
        return rows_by(self._index, item_ids)

    def scores(self, examples: pl.DataFrame) -> Floats:
        mixture = self.memory.mixture(self, examples)
        scores: Floats = mixture.popular[:, None] * mixture.prior + mixture.added.toarray()
        return scores

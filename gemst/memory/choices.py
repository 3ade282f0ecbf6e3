"""What a fit of weights sees: candidates of each validation example, their evidence, and which of them were taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from numpy.typing import NDArray

from gemst.memory.evidence import at_cells

if TYPE_CHECKING:
    from scipy import sparse

    from gemst.memory.evidence import Catalogue, Memory

CANDIDATES = 100  # of the model, and of each kind of evidence


@dataclass(frozen=True)
class Choices:
    """Candidates, sorted by the example they are of."""

    row: NDArray[np.int64]  # (candidates,)
    evidence: NDArray[np.float64]  # (candidates, k): the kinds of `FEATURES` after the model
    target: NDArray[np.bool_]  # (candidates,)
    case: NDArray[np.int64]  # (examples,): position in `CASES`
    relevant: pl.DataFrame  # row, item_id: every target, candidate or not

    def of(self, case: int) -> tuple[NDArray[np.bool_], pl.DataFrame]:
        """Which candidates are of a case's examples, and the targets of these."""
        mine = pl.Series(self.case == case)
        return self.case[self.row] == case, self.relevant.filter(mine.gather(self.relevant["row"]))


def choices(
    memory: Memory,
    catalogue: Catalogue,
    examples: pl.DataFrame,
    candidates: pl.DataFrame,
    evidence: tuple[sparse.csr_array, ...],
) -> Choices:
    """What is known of `candidates` (row, item_id), which are sorted by row, a position in `examples`.

    `evidence` is the memory's of all items for these examples.
    """
    relevant = examples.with_row_index("row").select("row", item_id="targets").explode("item_id", empty_as_null=False)
    row, item = candidates["row"].to_numpy().astype(np.int64), catalogue.rows_of(candidates["item_id"])
    known = (at_cells(kind, row, item) for kind in evidence)
    taken = candidates.select("row", "item_id").join(
        relevant.with_columns(taken=True), on=["row", "item_id"], how="left", maintain_order="left"
    )
    return Choices(
        row=row,
        evidence=np.stack([*known, memory.prior[item]], 1).astype(np.float64),
        target=taken["taken"].fill_null(False).to_numpy(),
        case=memory.cases(examples),
        relevant=relevant,
    )


def best(
    names: pl.Series,
    evidence: sparse.csr_array,
    count: int,
    seen: pl.DataFrame | None,
    active: NDArray[np.bool_] | None = None,
) -> pl.DataFrame:
    """The `count` items of each example with the highest `evidence` (examples, items): row UInt32, item_id.

    `names` are the items' ids. Only items with a cell of their own are meant, none of `seen` (row, item_id) and, where
    `active` (items,) is given, none that is not.
    """
    cells = evidence.tocoo()
    found = pl.DataFrame({"row": cells.row, "value": cells.data}, schema={"row": pl.UInt32, "value": pl.Float32})
    found = found.with_columns(item_id=names.gather(cells.col))
    if active is not None:
        found = found.filter(pl.Series(active[cells.col]))
    if seen is not None:
        found = found.join(seen.select(pl.col("row").cast(pl.UInt32), "item_id"), on=["row", "item_id"], how="anti")
    ordered = found.sort("row", "value", "item_id", descending=[False, True, False])
    return ordered.filter(pl.int_range(pl.len()).over("row") < count).select("row", "item_id")

"""The memory of a tuned model: the log's counts, and the weights under which they help it on validation examples."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gemst.backbone import Tuned
    from gemst.config import Config
    from gemst.memory import Memory

_CANDIDATES = 100  # of the model, and of each kind of evidence


def remember(tuned: Tuned, train: pl.DataFrame, valid: pl.DataFrame, config: Config) -> Memory:
    """Count `train` and fit the weights for `tuned` on `valid`; a case that gains nothing is left to the model.

    The weights see what the model and the counts have not: validation targets, as those of `Validation` are, with what
    their users met in train left out of the candidates where `evaluation.exclude_seen` says so.
    """
    from gemst.evaluation.protocols import seen_items
    from gemst.memory import build
    from gemst.memory.evidence import ALONE, CASES, Fit, at_cells
    from gemst.memory.fit import fit
    from gemst.ranking import rank, score
    from gemst.ranking.remembered import best, listed

    plain, memory = replace(tuned, memory=None), build(tuned.ids, train)
    if config.tuning.tasks != "both":
        valid = valid.filter(task=config.tuning.tasks)
    users = valid["user_id"].unique().sort()
    users = users.gather_every(max(1, len(users) // config.tuning.validate_users))
    examples = valid.filter(pl.col("user_id").is_in(users.implode()))
    seen = seen_items(examples, [train]) if config.evaluation.exclude_seen else None
    count = _CANDIDATES if len(tuned.ids.level_sizes) == 1 else config.ranking.beams
    evidence = memory.evidence(tuned.ids, examples)
    _, *ordering = evidence
    offered = [best(tuned, kind, count, seen) for kind in ordering]
    offered.append(rank(plain, examples, count, config.ranking, seen))
    scored = score(plain, examples, listed(len(examples), *offered), config.ranking)
    scored = scored.filter(pl.col("score").is_finite())
    relevant = examples.with_row_index("row").select("row", item_id="targets").explode("item_id", empty_as_null=False)
    row, item = scored["row"].to_numpy().astype(np.int64), tuned.ids.rows_of(scored["item_id"])
    known = (at_cells(kind, row, item) for kind in evidence)
    features = np.stack([scored["score"].to_numpy(), *known, memory.prior[item]], 1)
    features = features.astype(np.float64)
    taken = scored.join(relevant.with_columns(taken=True), on=["row", "item_id"], how="left", maintain_order="left")
    target = taken["taken"].fill_null(False).to_numpy()
    case = memory.cases(examples)
    fits = []
    for number, name in enumerate(CASES):
        mine = case[row] == number
        if not mine.any():
            continue
        found = fit(features[mine], row[mine], target[mine])
        asked = relevant.filter(pl.Series(case == number).gather(relevant["row"]))
        before, after = (
            _ndcg(scored.filter(pl.Series(mine)), values, asked)
            for values in (features[mine, 0], features[mine] @ np.asarray(found))
        )
        if after <= before:
            found, after = ALONE, before
        fits.append(Fit(name, int((case == number).sum()), before, after, found))
    return memory.fitted(fits)


def _ndcg(candidates: pl.DataFrame, scores: NDArray[np.float64], relevant: pl.DataFrame) -> float:
    """Mean NDCG@10 of the targets `relevant` (row, item_id) with the candidates in the order of `scores`."""
    from gemst.evaluation.metrics import table_of_metrics

    ordered = candidates.with_columns(score=pl.Series(scores)).sort(
        "row", "score", descending=[False, True], maintain_order=True
    )
    ranked = ordered.with_columns(rank=pl.int_range(1, pl.len() + 1, dtype=pl.UInt16).over("row"))
    return float(table_of_metrics(ranked, relevant, (10,))["ndcg@10"].mean() or 0.0)  # type: ignore[arg-type]

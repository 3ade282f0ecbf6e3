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


def remember(tuned: Tuned, train: pl.DataFrame, valid: pl.DataFrame, config: Config) -> Memory:
    """Count `train` and fit the weights for `tuned` on `valid`; a case that gains nothing is left to the model.

    The weights see what the model and the counts have not: validation targets, as those of `Validation` are, with what
    their users met in train left out of the candidates where `evaluation.exclude_seen` says so.
    """
    from gemst.evaluation.protocols import seen_items
    from gemst.memory import build, train_events
    from gemst.memory.choices import CANDIDATES, best, choices
    from gemst.memory.evidence import ALONE, CASES, Fit
    from gemst.memory.fit import fit
    from gemst.ranking import rank, score
    from gemst.ranking.remembered import listed

    plain, memory = replace(tuned, memory=None), build(tuned.ids, train_events(train))
    if config.tuning.tasks != "both":
        valid = valid.filter(task=config.tuning.tasks)
    users = valid["user_id"].unique().sort()
    users = users.gather_every(max(1, len(users) // config.tuning.validate_users))
    examples = valid.filter(pl.col("user_id").is_in(users.implode()))
    seen = seen_items(examples, [train]) if config.evaluation.exclude_seen else None
    count = CANDIDATES if len(tuned.ids.level_sizes) == 1 else config.ranking.beams
    evidence = memory.evidence(tuned.ids, examples)
    offered = [best(tuned.ids.names, kind, count, seen) for kind in evidence[1:]]  # what was clicked has a rate
    offered.append(rank(plain, examples, count, config.ranking, seen))
    scored = score(plain, examples, listed(len(examples), *offered), config.ranking)
    scored = scored.filter(pl.col("score").is_finite())  # retired items are none to choose
    chosen = choices(memory, tuned.ids, examples, scored, evidence)
    features = np.column_stack([scored["score"].to_numpy().astype(np.float64), chosen.evidence])
    fits = []
    for number, name in enumerate(CASES):
        mine, relevant = chosen.of(number)
        if not mine.any():
            continue
        found = fit(features[mine], chosen.row[mine], chosen.target[mine], ALONE)
        before, after = (
            _ndcg(scored.filter(pl.Series(mine)), values, relevant)
            for values in (features[mine, 0], features[mine] @ np.asarray(found))
        )
        if after <= before:
            found, after = ALONE, before
        fits.append(Fit(name, int((chosen.case == number).sum()), before, after, found))
    return memory.fitted(fits)


def _ndcg(candidates: pl.DataFrame, scores: NDArray[np.float64], relevant: pl.DataFrame) -> float:
    """Mean NDCG@10 of the targets `relevant` (row, item_id) with the candidates in the order of `scores`."""
    from gemst.evaluation.metrics import table_of_metrics

    ordered = candidates.with_columns(score=pl.Series(scores)).sort(
        "row", "score", descending=[False, True], maintain_order=True
    )
    ranked = ordered.with_columns(rank=pl.int_range(1, pl.len() + 1, dtype=pl.UInt16).over("row"))
    return float(table_of_metrics(ranked, relevant, (10,))["ndcg@10"].mean() or 0.0)  # type: ignore[arg-type]

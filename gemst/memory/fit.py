"""Weights of the model and of the log's evidence: maximum likelihood on validation targets among candidates."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

FEWEST = 20  # targets to fit the weights of a case on
_RIDGE = 1.0  # pulls towards the prior

Doubles = NDArray[np.float64]


def fit(
    features: Doubles, row: NDArray[np.int64], target: NDArray[np.bool_], prior: tuple[float, ...]
) -> tuple[float, ...]:
    """Weights (k,) under which each row's targets are likeliest among its candidates; the `prior` with too few.

    `features` (candidates, k) are `gemst.memory.evidence.FEATURES` of one case, or some of them; `row` (candidates,)
    says whose candidate each is, sorted; `target` (candidates,) which of them was taken. A row whose target is no
    candidate says nothing about their order and is left out. The loss is convex: multinomial logistic regression.
    """
    wanted = np.bincount(row[target], minlength=int(row.max(initial=-1)) + 1)
    kept = wanted[row] > 0
    features, row, target = features[kept], row[kept], target[kept]
    start = np.asarray(prior)
    if target.sum() < FEWEST:
        return prior
    starts = np.flatnonzero(np.r_[True, row[1:] != row[:-1]])
    of = np.cumsum(np.r_[False, row[1:] != row[:-1]])  # each candidate's row among those kept
    times = wanted[row[starts]]
    sums = features[target].sum(0)

    def loss(weights: Doubles) -> tuple[float, Doubles]:
        scores = features @ weights
        scores -= np.maximum.reduceat(scores, starts)[of]
        likely = np.exp(scores)
        total = np.add.reduceat(likely, starts)
        away = weights - start
        value = times @ np.log(total) - scores[target].sum() + _RIDGE * away @ away
        slope = features.T @ (likely * (times / total)[of]) - sums + 2 * _RIDGE * away
        return float(value), slope

    found = minimize(loss, start, jac=True, method="L-BFGS-B")
    return tuple(np.round(found.x, 6).tolist())

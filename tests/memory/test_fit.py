"""The weights are those of maximum likelihood, and few targets leave the model alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gemst.memory.evidence import ALONE
from gemst.memory.fit import FEWEST, fit


def drawn(weights: list[float], rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Targets taken by a softmax with these weights among 3 to 12 candidates."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(3, 13, rows)
    features = rng.normal(size=(sizes.sum(), len(weights)))
    row = np.repeat(np.arange(rows), sizes)
    scores = features @ np.asarray(weights) + rng.gumbel(size=len(row))
    target = scores == np.maximum.reduceat(scores, np.cumsum(sizes) - sizes)[row]
    return features, row, target


def test_the_weights_that_made_the_choices_are_found() -> None:
    true = [0.7, 2.0, -0.3, 0.5, 0.2]
    assert fit(*drawn(true, 20_000), ALONE) == pytest.approx(true, abs=0.05)


def test_the_weights_are_the_minimum_of_the_ridged_likelihood() -> None:
    features, row, target = drawn([0.7, 2.0, -0.3, 0.5, 0.2], 200, 1)
    target[np.flatnonzero(row == 3)[:2]] = True  # several targets of one example
    target[row == 4] = False  # none among the candidates
    weights = torch.tensor(fit(features, row, target, ALONE), dtype=torch.float64, requires_grad=True)
    scores = torch.from_numpy(features) @ weights
    loss = (weights - torch.tensor(ALONE, dtype=torch.float64)).square().sum()
    for number in range(200):
        mine = torch.from_numpy(row == number)
        loss = loss - scores[mine].log_softmax(0)[torch.from_numpy(target)[mine]].sum()
    loss.backward()
    assert weights.grad is not None
    assert weights.grad.abs().max() < 1e-2


def test_few_targets_leave_the_model_alone() -> None:
    features, row, target = drawn([0.7, 2.0, -0.3, 0.5, 0.2], FEWEST + 9)
    assert fit(features, row, target, ALONE) != ALONE
    target[row >= FEWEST - 1] = False
    assert fit(features, row, target, ALONE) == ALONE
    nothing = np.zeros(0, np.int64)
    assert fit(np.zeros((0, 5)), nothing, nothing.astype(bool), ALONE) == ALONE

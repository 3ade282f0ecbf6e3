"""How much of the rec and of the src update is applied: g_rec + g_src = 1."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from gemst.config import Gates

# What the released code runs: shares of loss, gradient norm and samples.
_LOSS, _NORM, _SAMPLES = 0.4, 0.4, 0.2


@dataclass
class Signals:
    """What a gate may look at after a backward pass, each as (rec, src)."""

    losses: tuple[float, float]
    samples: tuple[int, int]
    norms: tuple[float, float] = (0.0, 0.0)  # of the coefficient gradients
    alignment: tuple[float, float] = (0.0, 0.0)  # <C_s(t+1), N_s(t)>: how the last update pays off


@dataclass
class Gate:
    """Holds g_rec as `logit`, which is what a checkpoint keeps."""

    config: Gates
    logit: float = field(init=False)

    def __post_init__(self) -> None:
        start = min(max(self.config.rec, 1e-4), 1 - 1e-4)
        self.logit = math.log(start / (1 - start))

    def update(self, signals: Signals) -> tuple[float, float]:
        """The gates of this step.

        learned: gradient descent on each task's own loss through W(t+1) = W(t) - lr * sum_s g_s N_s Q_s^T, whose
        derivative is dL_s/dg_s = -lr <C_s(t+1), N_s(t)> (the hypergradient of Baydin et al. 2018), normalised by both
        tasks' size. A step that lacks a task, or follows one that did, compares nothing and leaves the gate alone.
        """
        if self.config.kind == "fixed":
            return self.config.rec, 1 - self.config.rec
        if self.config.kind == "learned":
            rec, src = signals.alignment
            if rec and src:
                size = abs(rec) + abs(src)
                share = 1 / (1 + math.exp(-self.logit))
                self.logit += self.config.lr * 4 * share * (1 - share) * (rec - src) / size
                self.logit = min(max(self.logit, -4.0), 4.0)
            share = 1 / (1 + math.exp(-self.logit))
            return share, 1 - share
        rec = (
            _LOSS * _share(*signals.losses)
            + _NORM * _share(*signals.norms)
            + _SAMPLES * _share(*map(float, signals.samples))
        )
        return rec, 1 - rec


def _share(rec: float, src: float) -> float:
    total = rec + src
    return rec / total if total > 0 else 0.5

"""The output rows' start: a low-rank classifier on the states of the backbone as it is, before any of it is tuned.

A row of its own per item overfits at once: the catalogue has far more numbers than a few thousand targets can set. So
what is fitted is one matrix for all items, row_i = start_i + (x_i G + b_i m) A, from an item's features x_i
(co-behaviour and text) to the states, whitened by A; m is the mean state. Linear probing before fine-tuning keeps the
features of a pretrained model (Kumar et al. 2022), and the states take one pass forward, a third of a step's work.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

_LR, _BATCH, _EPOCHS, _PATIENCE = 3e-4, 512, 60, 2
_HELD = 10  # one target in so many judges the fit
_FLOOR = 1.0  # of the mean second moment, added to each: thin directions of the states are noise


@dataclass(frozen=True)
class Fit:
    """The fitted rows, and what they gained: cross-entropy of held-out targets, nats, before and after."""

    rows: Tensor
    before: float
    after: float
    epochs: int


def fit(rows: Tensor, features: Tensor, states: Tensor, labels: Tensor, white: Tensor, seed: int) -> Fit:
    """Fit `rows` (n, d) to predict `labels` (targets,) in [0, n) from `states` (targets, d).

    `features` (n, k) tell the tokens apart; `white` (d, d) is A (`whitening`). The last tenth of the targets is held
    out and ends the fit; with too few targets to hold any out, the rows stay as they are.
    """
    held = len(labels) // _HELD
    if held == 0:
        return Fit(rows, math.nan, math.nan, 0)
    train, judge = slice(0, -held), slice(-held, None)
    whitened = states @ white
    mean = whitened[train].mean(0)
    mean = mean / mean.norm().clamp(min=1e-12)
    matrix = torch.nn.Parameter(torch.zeros(features.shape[1], states.shape[1]))
    bias = torch.nn.Parameter(torch.zeros(len(rows)))
    adam = torch.optim.Adam([matrix, bias], lr=_LR, betas=(0.9, 0.99))

    def loss(at: Tensor | slice) -> Tensor:
        logits = states[at] @ rows.T + (whitened[at] @ matrix.T) @ features.T + (whitened[at] @ mean)[:, None] * bias
        return functional.cross_entropy(logits, labels[at])

    def judged() -> float:
        with torch.no_grad():
            return float(loss(judge))

    generator = torch.Generator().manual_seed(seed)
    before = best = judged()
    kept, epoch, stale = copy.deepcopy((matrix.detach(), bias.detach())), 0, 0
    while stale < _PATIENCE and epoch < _EPOCHS:
        for at in torch.randperm(len(labels) - held, generator=generator).split(_BATCH):
            adam.zero_grad()
            loss(at).backward()
            adam.step()
        epoch, stale = epoch + 1, stale + 1
        if (now := judged()) < best:
            best, stale, kept = now, 0, copy.deepcopy((matrix.detach(), bias.detach()))
    matrix_, bias_ = kept
    return Fit(rows + (features @ matrix_ + bias_[:, None] * mean) @ white, before, best, epoch)


def whitening(states: Tensor) -> Tensor:
    """A (d, d), symmetric: states (n, d) @ A have about equal power in all but the thinnest directions."""
    moment = (states.T @ states / len(states)).double()
    values, vectors = torch.linalg.eigh(moment)
    floor = _FLOOR * values[:-1].mean()  # the largest is the mean state: most of the power, and not what tells apart
    return ((vectors / (values.clamp(min=0) + floor).sqrt()) @ vectors.T).float()

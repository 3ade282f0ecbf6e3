"""A limit on forgetting: the learning rate of the backbone's weights bends before general text drifts too far.

The null space bounds what one unit of update can do to general text, not how many units a long run piles up: what is
left of the energy inside it still adds up. So the KL from the backbone is measured on general text a few times in a
run, and the backbone's learning rate is set to what the rest of the schedule can bear; item rows go on at full speed.
Adaptive step sizes on a KL target are common in policy optimisation (PPO's adaptive KL, Schulman et al. 2017).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gemst import backbone
from gemst.errors import GemstError
from gemst.evaluation.drift import predicting_states, sequences, token_stream
from gemst.tuning.precision import autocast

if TYPE_CHECKING:
    from gemst.tuning.methods import Method
    from gemst.tuning.model import ItemModel
    from gemst.tuning.parallel import Processes

_TOKENS, _LENGTH, _CHUNK = 2048, 512, 256
_FIRST, _GROWTH, _APART = 4, 1.6, 0.15  # step of the first check, growth of the gaps, largest gap as a share of the run
_POWER = 0.75  # drift in norm grows like path ** p: 1 along a straight line, 1/2 for a random walk
_AIM = 0.95  # of the limit, in norm, at the end of the run: what is measured here is a sample of general text
_FAR = 0.3  # of the limit, in norm: below, nothing is foretold, for Adam's first steps are much longer than the rest
_BACK = 0.7  # of the limit, in norm, after a pull: half the KL is left for the rest of the run


@dataclass
class Brake:
    """How the backbone's learning rate is held back; part of a run's state.

    `path` is the sum of the learning-rate factors applied so far: the length the weights can have moved.
    """

    factor: float = 1.0
    path: float = 0.0
    next_check: int = 0

    def due(self, step: int, total: int) -> bool:
        """Whether drift is to be measured after `step` of `total` steps; sets the time of the next check."""
        if self.next_check == 0:
            self.next_check = min(_FIRST, total)
        if step < self.next_check:
            return False
        self.next_check = max(step + 1, round(min(step * _GROWTH, step + _APART * total)))
        return True

    def adjust(self, kl: float, limit: float, remaining: float) -> None:
        """Set the factor so that `remaining` (the sum of the schedule's factors still to come) ends at the limit.

        With r = sqrt(kl / limit) after a path s, and r growing like s ** p, a path of s r^(-1/p) reaches r = 1. Far
        from the limit the factor is 1.
        """
        reached = math.sqrt(max(kl, 0.0) / limit) / _AIM
        if reached < _FAR or remaining <= 0:
            self.factor = 1.0
        else:
            self.factor = min(1.0, max(0.0, self.path * (reached ** (-1 / _POWER) - 1) / remaining))


class DriftLimit:
    """Keeps KL(backbone || model) on general text, over the backbone's own vocabulary, at `limit` nats per token."""

    def __init__(
        self,
        items: ItemModel,
        method: Method,
        tokenizer: Any,
        texts: list[str],
        limit: float,
        processes: Processes,
    ) -> None:
        """Keep the backbone's weights and states as they are now. Raises GemstError when `texts` hold too little."""
        self.items, self.method, self.tokenizer = items, method, tokenizer
        self.limit, self.processes = limit, processes
        self.start = {name: tensor.clone() for name, tensor in method.weights().items()}
        # Linears kept as bf16 halves give bf16, which the other modules take under autocast alone.
        self.precision = "bf16-weights" if any(name.endswith(".remainder") for name in self.start) else "fp32"
        stream = token_stream(tokenizer, texts, _TOKENS)
        if len(stream) < 2:
            raise GemstError("tuning.drift_limit needs general text", "Look at null_space.corpus in params.yaml")
        self.batches = [torch.from_numpy(batch) for batch in sequences(items.model, stream, _LENGTH)]
        with processes.unsharded(items), torch.inference_mode():  # weights gathered inside it could not be updated
            self.before = [self._states(batch) for batch in self.batches]

    def _states(self, batch: Tensor) -> Tensor:
        device = self.items.items_in.device
        with autocast(self.precision, device):
            states = predicting_states(self.items.model, batch.to(device), self.tokenizer)
        return states.flatten(0, 1).float()

    def keep(self) -> float:
        """Pull the weights back as far as the limit asks; returns the KL they end at."""
        kl = self.measure()
        while kl > _AIM**2 * self.limit:  # short of the limit itself: there the schedule would have nothing left
            self.method.pull(self.start, _BACK * math.sqrt(self.limit / kl))  # KL grows with the square of dW
            kl = self.measure()
        return kl

    def measure(self) -> float:
        """Mean KL per token, in nats, with the weights as they are."""
        total, count = 0.0, 0
        self.items.eval()
        with self.processes.unsharded(self.items), torch.inference_mode():
            for batch, before in zip(self.batches, self.before, strict=True):
                after = self._states(batch)
                for old, new in zip(before.split(_CHUNK), after.split(_CHUNK), strict=True):
                    left, right = (
                        backbone.item_logits(self.items.model, states, 0, self.items.first).float().log_softmax(1)
                        for states in (old, new)
                    )
                    total += float((left.exp() * (left - right)).sum(dtype=torch.float64))
                count += len(after)
        self.items.train()
        return self.processes.agreed(total / count)

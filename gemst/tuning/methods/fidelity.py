"""GEMS as the paper's equations have it and as the released code runs it (docs/tuning.md): to compare with our engine.

Both work on whole m x n gradients G_s of the rec, src and joint loss and take each basis from an SVD of G_s every
`refresh_every` steps. Moments stay in the coordinates of the old basis, an absent task has a gradient of zero, every
step counts in the bias correction, weight decay acts on the whole of W, and item rows alone are clipped.

    paper      C_s = G_s Q_s; Adam on C_s; the merged update is projected: W <- W - lr scale (sum_s g_s N_s Q_s^T) P
    released   G_s <- P_out G_s first, P_out from the OUTPUT's second moments; then the SVD of that, its right side
               where m >= n, else its left; Adam; no projection of what is applied

The released code trains embeddings and norms as well; here they stay frozen, as with every other method.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gemst.config import Config
from gemst.tuning import null_space
from gemst.tuning.batches import Batch
from gemst.tuning.gates import Gate, Signals
from gemst.tuning.methods import Facts
from gemst.tuning.methods.full import FullMethod
from gemst.tuning.model import ItemModel
from gemst.tuning.subspace import matching, require_rooms

_EPS = 1e-6  # of the released AdamW


class SubspaceAdamW(torch.optim.AdamW):
    """Group 0: weights, updated from `gradients` (2, m, n) of rec and src; the other groups are plain AdamW's.

    `projectors` go by weight; `transposed` are the weights that keep W^T.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        projectors: dict[nn.Parameter, null_space.Range],
        transposed: set[nn.Parameter],
        *,
        released: bool,
        rank: int,
        refresh_every: int,
        scale: float,
        betas: tuple[float, float],
    ) -> None:
        super().__init__(groups, betas=betas, eps=_EPS)
        self.projectors, self.transposed, self.released = projectors, transposed, released
        self.ranks, self.refresh_every, self.scale = (max(1, rank // 2), rank, max(1, rank // 2)), refresh_every, scale
        self.gradients: dict[nn.Parameter, Tensor] = {}
        self.targets = (1, 1)
        self.gates = (0.5, 0.5)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; `targets` weighs the tasks' gradients, which are parts of the joint one, to their own means."""
        group, total = self.param_groups[0], sum(self.targets)
        for weight, (rec, src) in self.gradients.items():
            by_task = (rec * (total / max(self.targets[0], 1)), rec + src, src * (total / max(self.targets[1], 1)))
            project = self.projectors.get(weight)
            update = torch.zeros_like(rec)
            self.state[weight].setdefault("step", torch.zeros(()))  # AdamW looks for it when a state is loaded
            for place, gradient in enumerate(by_task):
                if self.released and project is not None:
                    gradient = project(gradient)
                part = self._subspace(self.state[weight], group, place, gradient)
                update += part * (self.gates[0], 1.0, self.gates[1])[place]
            if not self.released and project is not None:
                update = project(update.t()).t()
            weight.add_(update.t() if weight in self.transposed else update, alpha=-group["lr"] * self.scale)
            weight.mul_(1 - group["lr"] * group["weight_decay"])
        self.gradients = {}
        return super().step(closure)

    def _subspace(self, state: dict[str, Tensor], group: dict[str, Any], place: int, gradient: Tensor) -> Tensor:
        """N_s Q_s^T (m, n) of one subspace, or Q_s N_s where the left side is taken."""
        name, right = ("rec", "shared", "src")[place], not self.released or gradient.shape[0] >= gradient.shape[1]
        count = state[f"count_{name}"] = state.get(f"count_{name}", torch.zeros(())) + 1
        if f"basis_{name}" not in state or int(count) % self.refresh_every == 0:
            left, _, across = torch.linalg.svd(gradient, full_matrices=False)
            rank = self.ranks[place]
            state[f"basis_{name}"] = (across[:rank].t() if right else left[:, :rank]).contiguous()
        basis, (beta1, beta2) = state[f"basis_{name}"], group["betas"]
        low = gradient @ basis if right else basis.t() @ gradient
        first = state.setdefault(f"exp_avg_{name}", torch.zeros_like(low))
        second = state.setdefault(f"exp_avg_sq_{name}", torch.zeros_like(low))
        first.lerp_(low, 1 - beta1)
        second.mul_(beta2).addcmul_(low, low, value=1 - beta2)
        correction = (1 - beta2 ** float(count)) ** 0.5 / (1 - beta1 ** float(count))
        normalised = first / (second.sqrt() + _EPS) * correction
        return normalised @ basis.t() if right else basis @ normalised


class FidelityMethod(FullMethod):
    """The losses' two backward passes, whole gradients of both tasks, SubspaceAdamW."""

    optimizer: SubspaceAdamW

    def __init__(self, config: Config, items: ItemModel, folder: Path, shard: Callable[[ItemModel], None]) -> None:
        self.spaces: dict[str, null_space.Range] = {}
        linears = matching(items.model, config.tuning.modules)
        if config.null_space.rule != "none":
            self.spaces, _ = null_space.load(folder, items.model, config.null_space)
            require_rooms(linears, self.spaces)
        self.kept_transposed = {name for name, module in linears.items() if not isinstance(module, nn.Linear)}
        self.gate = Gate(config.tuning.gates)
        super().__init__(config, items, shard)

    def _optimizer(self) -> torch.optim.Optimizer:
        tuning = self.tuning
        projectors = {self.named[name]: space for name, space in self.spaces.items() if name in self.named}
        return SubspaceAdamW(
            self._groups(), projectors, {self.named[name] for name in self.kept_transposed},
            released=tuning.fidelity == "released", rank=tuning.rank, refresh_every=tuning.refresh_every,
            scale=tuning.scale, betas=tuning.betas,
        )  # fmt: skip

    def backward(self, losses: Tensor, batch: Batch) -> None:
        rec = batch.targets[0]
        parts = {0: losses[:rec], 1: losses[rec:]}
        present = [task for task, part in parts.items() if len(part)]
        gradients = self.optimizer.gradients
        for task in present:
            parts[task].sum().backward(retain_graph=task != present[-1])
            for name, weight in self.named.items():
                if weight.grad is None:
                    continue
                gradient = weight.grad.t() if name in self.kept_transposed else weight.grad
                if weight not in gradients:
                    gradients[weight] = gradient.new_zeros(2, *gradient.shape)
                gradients[weight][task] += gradient
                weight.grad = None

    def parameters(self) -> list[nn.Parameter]:
        return self.rows

    def finite(self) -> bool:
        """The Linears' gradients are not clipped, so nothing else looks at them."""
        pairs = list(self.optimizer.gradients.values())
        return bool(torch.nn.utils.get_total_norm(pairs).isfinite())

    def skip(self) -> None:
        self.optimizer.gradients = {}
        super().skip()

    def step(self, facts: Facts) -> None:
        total = sum(facts.targets)
        pairs = list(self.optimizer.gradients.values())
        norms = [
            float(torch.stack([pair[task].norm() for pair in pairs]).norm()) * total / max(facts.targets[task], 1)
            for task in (0, 1)
        ]
        self.optimizer.targets = facts.targets
        self.optimizer.gates = self.gate.update(Signals(facts.losses, facts.targets, (norms[0], norms[1])))
        super().step(facts)

    def observations(self) -> tuple[dict[str, float], list[dict[str, float | str]]]:
        return {"gate/rec": self.optimizer.gates[0], "gate/src": self.optimizer.gates[1]}, []

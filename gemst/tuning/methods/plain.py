"""What every method without subspaces shares: one backward pass of the joint loss, one optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gemst.config import Config
from gemst.tuning.batches import Batch
from gemst.tuning.methods import Facts
from gemst.tuning.model import ItemModel
from gemst.tuning.parallel import local


class PlainMethod:
    """AdamW on `named` parameters and on the item rows."""

    needs_start = False

    def __init__(self, config: Config, items: ItemModel, named: dict[str, nn.Parameter]) -> None:
        self.tuning, self.named = config.tuning, named
        self.rows = [items.items_in, items.items_out]
        for parameter in [*named.values(), *self.rows]:
            parameter.requires_grad_(True)
        self.optimizer = self._optimizer()

    def _groups(self) -> list[dict[str, Any]]:
        tuning = self.tuning
        return [
            {"params": list(self.named.values()), "lr": tuning.lr, "weight_decay": tuning.weight_decay},
            {"params": self.rows, "lr": tuning.item_lr, "weight_decay": 0.0},
        ]

    def _optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self._groups(), betas=self.tuning.betas, fused=True)

    def prepare(self, targets: tuple[int, int], observe: bool) -> None:
        """Nothing to do."""

    def enter(self, batch: Batch) -> None:
        """Nothing to do."""

    def backward(self, losses: Tensor, batch: Batch) -> None:
        losses.sum().backward()

    def start(self) -> None:
        """Never asked for."""

    def merge(self) -> None:
        """Nothing to do: gradients are summed as they come."""

    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def finite(self) -> bool:
        return True

    def step(self, facts: Facts) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def skip(self) -> None:
        self.optimizer.zero_grad()

    def catch_up(self) -> None:
        """Nothing is put off."""

    def weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.named.items()}

    def pull(self, start: dict[str, Tensor], keep: float) -> None:
        for name, tensor in self.weights().items():
            local(tensor).lerp_(local(start[name]), 1 - keep)

    def observations(self) -> tuple[dict[str, float], list[dict[str, float | str]]]:
        return {}, []

    def finish(self) -> None:
        for parameter in self.named.values():
            parameter.requires_grad_(False)

"""Full fine-tuning of the same Linears with AdamW: the method to beat."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gemst.config import Config
from gemst.tuning.batches import Batch
from gemst.tuning.methods import Facts
from gemst.tuning.model import ItemModel
from gemst.tuning.subspace import matching


class FullMethod:
    """AdamW on every matching Linear's weight and on the item rows."""

    needs_start = False

    def __init__(self, config: Config, items: ItemModel) -> None:
        tuning = config.tuning
        self.named = {name: module.weight for name, module in matching(items.model, tuning.modules).items()}
        for weight in self.named.values():
            weight.requires_grad_(True)
        rows = [items.items_in, items.items_out]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(self.named.values()), "lr": tuning.lr, "weight_decay": tuning.weight_decay},
                {"params": rows, "lr": tuning.item_lr, "weight_decay": 0.0},
            ],
            betas=tuning.betas,
        )

    def prepare(self, targets: tuple[int, int], observe: bool) -> None:
        """Nothing to do."""

    def backward(self, losses: Tensor, batch: Batch) -> None:
        losses.sum().backward()

    def start(self) -> None:
        """Never asked for."""

    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def step(self, facts: Facts) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def weights(self) -> dict[str, Tensor]:
        return {name: weight.detach() for name, weight in self.named.items()}

    def observations(self) -> tuple[dict[str, float], list[dict[str, float | str]]]:
        return {}, []

    def finish(self) -> None:
        for weight in self.named.values():
            weight.requires_grad_(False)

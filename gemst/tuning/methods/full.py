"""Full fine-tuning of the same Linears: AdamW, GaLore's projected AdamW, and gradient surgery over two tasks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gemst.config import Config
from gemst.tuning.batches import Batch
from gemst.tuning.methods import Facts
from gemst.tuning.model import ItemModel
from gemst.tuning.subspace import matching


class FullMethod:
    """AdamW on every matching Linear's weight and on the item rows: the method to beat."""

    needs_start = False

    def __init__(self, config: Config, items: ItemModel) -> None:
        self.tuning = config.tuning
        self.named: dict[str, nn.Parameter] = {
            name: module.weight  # type: ignore[misc]
            for name, module in matching(items.model, config.tuning.modules).items()
        }
        for weight in self.named.values():
            weight.requires_grad_(True)
        self.rows = [items.items_in, items.items_out]
        self.optimizer = self._optimizer()

    def _groups(self) -> list[dict[str, Any]]:
        tuning = self.tuning
        return [
            {"params": list(self.named.values()), "lr": tuning.lr, "weight_decay": tuning.weight_decay},
            {"params": self.rows, "lr": tuning.item_lr, "weight_decay": 0.0},
        ]

    def _optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self._groups(), betas=self.tuning.betas)

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


class GaloreMethod(FullMethod):
    """GaLore (Zhao et al. 2024, the galore-torch package): AdamW on gradients projected to rank `tuning.rank`."""

    def _optimizer(self) -> torch.optim.Optimizer:
        from galore_torch import GaLoreAdamW

        tuning = self.tuning
        low, rows = self._groups()
        low |= {"rank": tuning.rank, "update_proj_gap": tuning.refresh_every, "scale": tuning.scale, "proj_type": "std"}
        optimizer: torch.optim.Optimizer = GaLoreAdamW([low, rows], betas=tuning.betas, no_deprecation_warning=True)
        return optimizer


class SurgeryMethod(FullMethod):
    """AdamW on one gradient made from both tasks' by PCGrad (Yu et al. 2020) or UPGrad (torchjd)."""

    def __init__(self, config: Config, items: ItemModel) -> None:
        from torchjd.aggregation import PCGrad, UPGrad

        super().__init__(config, items)
        self.aggregator = {"pcgrad": PCGrad, "upgrad": UPGrad}[config.tuning.method]()

    def backward(self, losses: Tensor, batch: Batch) -> None:
        from torchjd.autojac import backward

        rec = batch.targets[0]
        present = [part.sum() for part in (losses[:rec], losses[rec:]) if len(part)]
        if len(present) < 2:
            losses.sum().backward()  # one task alone has nothing to conflict with
            return
        backward(present, inputs=self.parameters(), parallel_chunk_size=1)

    def merge(self) -> None:
        """Turn the tasks' gradients, gathered over the step's batches, into one."""
        from torchjd.autojac import jac_to_grad

        waiting = [p for p in self.parameters() if getattr(p, "jac", None) is not None]
        if waiting:
            jac_to_grad(waiting, self.aggregator, optimize_gramian_computation=True)

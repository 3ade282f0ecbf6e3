"""LoRA and DoRA adapters of peft on the same Linears."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gemst.config import Config
from gemst.tuning.batches import Batch
from gemst.tuning.methods import Facts
from gemst.tuning.model import ItemModel
from gemst.tuning.subspace import matching


class LoraMethod:
    """Low-rank adapters (Hu et al. 2021; DoRA, Liu et al. 2024), merged into the weights at the end. alpha = 2 r."""

    needs_start = False

    def __init__(self, config: Config, items: ItemModel) -> None:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel

        tuning = config.tuning
        names = list(matching(items.model, tuning.modules))
        settings = LoraConfig(
            r=tuning.rank,
            lora_alpha=2 * tuning.rank,
            lora_dropout=0.0,
            target_modules=names,
            use_dora=tuning.adapter == "dora",
        )
        self.tuner = LoraModel(items.model, settings, "default")
        self.named = {n: p for n, p in items.model.named_parameters() if "lora_" in n}
        rows = [items.items_in, items.items_out]
        for parameter in [*self.named.values(), *rows]:
            parameter.requires_grad_(True)
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            [
                {"params": list(self.named.values()), "lr": tuning.lr, "weight_decay": tuning.weight_decay},
                {"params": rows, "lr": tuning.item_lr, "weight_decay": 0.0},
            ],
            betas=tuning.betas,
        )

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
        return {name: parameter.detach() for name, parameter in self.named.items()}

    def observations(self) -> tuple[dict[str, float], list[dict[str, float | str]]]:
        return {}, []

    def finish(self) -> None:
        self.tuner.merge_and_unload()

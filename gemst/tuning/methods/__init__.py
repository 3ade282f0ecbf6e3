"""Every way to tune, behind one small interface: same data, same loop, same budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from gemst.config import Config
from gemst.tuning.batches import Batch
from gemst.tuning.model import ItemModel


@dataclass(frozen=True)
class Facts:
    """What one optimizer step was made from, over all its batches: each as (rec, src)."""

    targets: tuple[int, int]
    losses: tuple[float, float]


class Method(Protocol):
    """A way to turn the losses of a step's batches into one update of the model."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """What turns gradients into updates."""

    @property
    def needs_start(self) -> bool:
        """True while a first backward pass is needed that updates nothing."""

    def prepare(self, targets: tuple[int, int], observe: bool) -> None:
        """Before a step's first forward pass; `targets` counts the step's rec and src labels."""

    def enter(self, batch: Batch) -> None:
        """Before a batch's forward pass."""

    def backward(self, losses: Tensor, batch: Batch) -> None:
        """Add one batch's gradients. `losses` (targets,), already divided by the step's number of targets."""

    def start(self) -> None:
        """Use up the backward pass that `needs_start` asked for."""

    def merge(self) -> None:
        """After a step's last backward pass, before its gradients are clipped."""

    def parameters(self) -> list[nn.Parameter]:
        """What gradient clipping looks at."""

    def finite(self) -> bool:
        """Whether the gradients that `parameters` does not show are numbers."""

    def step(self, facts: Facts) -> None:
        """One update, gradients cleared afterwards."""

    def skip(self) -> None:
        """Instead of `step` where the gradients are no numbers: they are dropped."""

    def catch_up(self) -> None:
        """Do to the weights what was put off, before they are judged or saved."""

    def weights(self) -> dict[str, Tensor]:
        """The tensors training has changed, by name: what a checkpoint must hold."""

    def pull(self, start: dict[str, Tensor], keep: float) -> None:
        """Scale the change since `start` (what `weights` returned then, cloned) by `keep`."""

    def observations(self) -> tuple[dict[str, float], list[dict[str, float | str]]]:
        """Scalars to log, and one row per layer; asked after steps that observe."""

    def finish(self) -> None:
        """Fold everything back: a plain model is left."""


def unsharded(items: ItemModel) -> None:
    """Leave every parameter as it is."""


def make(config: Config, items: ItemModel, null_space: Path, shard: Callable[[ItemModel], None] = unsharded) -> Method:
    """The method `tuning.method` names, attached to the model.

    `shard` is called once the model has all its parameters and before the optimizer takes them.
    """
    name = config.tuning.method
    if config.tuning.fidelity != "default":
        from gemst.tuning.methods.fidelity import FidelityMethod

        return FidelityMethod(config, items, null_space, shard)
    if name == "gems":
        from gemst.tuning.methods.gems import GemsMethod

        return GemsMethod(config, items, null_space, shard)
    if name == "lora":
        from gemst.tuning.methods.lora import LoraMethod

        return LoraMethod(config, items)
    from gemst.tuning.methods.full import FullMethod, GaloreMethod, SurgeryMethod

    return {"full": FullMethod, "galore": GaloreMethod}.get(name, SurgeryMethod)(config, items, shard)

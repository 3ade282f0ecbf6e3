"""Adam as it is, for the item-token rows: their state covers those rows alone, in shards as they lie."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gemst.tuning.parallel import local


def adam_(parameter: nn.Parameter, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    """One step (Kingma & Ba 2015) on `parameter`, which has a gradient, in place; the first one fills `state`."""
    beta1, beta2 = group["betas"]
    if not state:
        state.update(step=torch.zeros(()), exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
    state["step"] += 1
    count = float(state["step"])
    gradient, moment, square = local(parameter.grad), local(state["exp_avg"]), local(state["exp_avg_sq"])  # type: ignore[arg-type]
    moment.lerp_(gradient, 1 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    size = (square / (1 - beta2**count)).sqrt_().add_(group["eps"])
    local(parameter).addcdiv_(moment, size, value=-group["lr"] / (1 - beta1**count))

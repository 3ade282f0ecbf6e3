"""What the gates look at, measured on the coefficient gradients of all layers of a step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from gemst.tuning.parallel import local, over_shards
from gemst.tuning.subspace import SubspaceLinear


def gradient_norm(layers: Iterable[SubspaceLinear], subspace: str) -> float:
    """|C_s| over the layers that have a gradient."""
    found = [layer for layer in layers if layer.coefficients.grad is not None]
    parts = [local(layer.coefficients.grad)[:, layer.widths.columns(subspace)] for layer in found]  # type: ignore[arg-type]
    norm = torch.linalg.vector_norm(torch.stack(list(torch._foreach_norm(parts))))
    return float(over_shards(norm.square(), of=found[0].coefficients).sqrt())


def alignment(applied: Iterable[tuple[SubspaceLinear, Tensor]], subspace: str) -> float:
    """<C_s(t+1), N_s(t)> over layers and what was last applied to them: positive where that still points downhill."""
    parts, like = [], None
    for layer, last in applied:
        gradient = layer.coefficients.grad
        if gradient is not None:
            columns, like = layer.widths.columns(subspace), gradient
            parts.append((local(last)[:, columns] * local(gradient)[:, columns]).sum(dtype=torch.float64))
    return 0.0 if like is None else float(over_shards(torch.stack(parts).sum(), of=like))

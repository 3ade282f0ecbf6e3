"""RMSNorm with a frozen weight: half the memory traffic of the general one, forward and backward.

Norms are never trained here, so the backward pass needs the gradient of the input alone. Under
autocast the output is in the compute type at once, and the Linears behind it need no casts of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class FrozenRMSNorm(nn.Module):
    """y = x / rms(x) * w, statistics in float32, for a w that requires no gradient."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        out: Tensor = _Normalise.apply(x, self.weight, self.eps, dtype)
        return out


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale, weight)
        return (x * scale).mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        # With u = x s and v = dy w: dx = s (v - u mean(u v)).
        x, scale, weight = ctx.saved_tensors
        v, u = grads[0] * weight, x * scale
        shared = (u * v).mean(-1, keepdim=True)
        return v.sub_(u.mul_(shared)).mul_(scale).to(x.dtype), None, None, None


def freeze_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Replace every RMSNorm of `model` in place; returns the originals for `thaw_norms`."""
    originals = {name: m for name, m in model.named_modules() if _is_rms(m)}
    for name, original in originals.items():
        model.set_submodule(name, FrozenRMSNorm(original.weight, _eps(original)))
    return originals


def thaw_norms(model: nn.Module, originals: dict[str, nn.Module]) -> None:
    """Put the original norms back; their weights never moved."""
    for name, original in originals.items():
        model.set_submodule(name, original)


def _eps(module: nn.Module) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", 1e-6))


def _is_rms(module: nn.Module) -> bool:
    # Gemma's norm multiplies by 1 + w, so only the plain kinds are taken; torch's own may lack weight and eps.
    weight: Tensor | None = getattr(module, "weight", None)
    whole = weight is not None and weight.dim() == 1 and isinstance(_eps(module), float)
    return whole and type(module).__name__ in (
        "LlamaRMSNorm",
        "MistralRMSNorm",
        "Qwen2RMSNorm",
        "Qwen3RMSNorm",
        "T5LayerNorm",
        "RMSNorm",
    )

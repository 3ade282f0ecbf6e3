"""What forward passes compute in: `tuning.precision` as an autocast context."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch


def native_bf16(device: torch.device) -> bool:
    """Whether `device` multiplies bf16 in hardware, so that `precision: auto` means bf16 autocast."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type != "cpu" or bool(torch.cpu.get_capabilities().get("avx512_bf16", False))


def autocast(setting: str, device: torch.device) -> AbstractContextManager[Any]:
    """The autocast context of `tuning.precision`."""
    enabled = setting.startswith("bf16") or (setting == "auto" and native_bf16(device))
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)

"""What forward passes compute in: `tuning.precision` as an autocast context."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch


def native_bf16(device: torch.device) -> bool:
    """Whether `device` multiplies bf16 faster than fp32, so that `precision: auto` means bf16 autocast.

    Intel's AVX-512 alone does not: where AMX is missing or hidden by a hypervisor a step takes 1.7 times as long.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return True
    found = torch.cpu.get_capabilities()
    intel = "intel" in str(found.get("cpu_name", "")).lower()
    return bool(found.get("amx_bf16" if intel else "avx512_bf16", False))


def autocast(setting: str, device: torch.device) -> AbstractContextManager[Any]:
    """The autocast context of `tuning.precision`."""
    enabled = setting.startswith("bf16") or (setting == "auto" and native_bf16(device))
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)

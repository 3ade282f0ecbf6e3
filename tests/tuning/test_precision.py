"""What `tuning.precision: auto` computes in."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gemst.tuning.precision import native_bf16


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, True),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, False),  # fp32 is the faster one
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True, "amx_bf16": False}, True),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": False}, False),
        ({}, False),
    ],
)
def test_auto_is_bf16_where_that_is_faster(
    monkeypatch: pytest.MonkeyPatch, found: dict[str, Any], expected: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert native_bf16(torch.device("cpu")) is expected

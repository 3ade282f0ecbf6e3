"""What float32 rounds away step by step is taken out of the change at the end."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from gemst.tuning.methods.gems import GemsMethod
from gemst.tuning.null_space import Range
from gemst.tuning.subspace import halves, joined


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("complement", [False, True])
@pytest.mark.parametrize("narrow", [False, True])  # precision: bf16-weights
def test_a_settled_change_leaks_one_rounding_not_that_of_every_step(
    transposed: bool, complement: bool, narrow: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    space = Range(torch.linalg.qr(torch.randn(16, 6, generator=generator)).Q, complement)
    before = torch.randn(12, 16, generator=generator)
    after = before.clone()
    for _ in range(400):
        after += 1e-6 * space(torch.randn(16, 12, generator=generator)).t()
    layers = {"w": SimpleNamespace(transposed=transposed), "free": SimpleNamespace(transposed=False)}
    optimizer = SimpleNamespace(param_groups=[{"steps": 400}])
    method = SimpleNamespace(attached=SimpleNamespace(layers=layers), projectors={"w": space}, optimizer=optimizer)
    kept = [before.t().contiguous(), after.t().contiguous()] if transposed else [before, after]
    settled = {"w": kept[1].clone(), "free": after.clone()}
    if narrow:
        settled["w"], settled["w.remainder"] = halves(settled["w"])
    leaks = [GemsMethod.certificate(method, {"w": kept[0], "free": before}, {"w": kept[1], "free": after})["w"]]
    GemsMethod.settle(method, {"w": kept[0], "free": before}, settled)
    leaks += [GemsMethod.certificate(method, {"w": kept[0], "free": before}, settled)["w"]]
    if narrow:
        settled["w"] = joined(settled["w"], settled.pop("w.remainder"))
    assert leaks[1] < leaks[0] / 5
    torch.testing.assert_close(settled["w"] - kept[0], kept[1] - kept[0], atol=5e-6, rtol=0)
    assert torch.equal(settled["free"], after)


def test_halves_lose_no_bit_and_the_high_one_is_nearest() -> None:
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(20_000, generator=generator) * torch.logspace(-30, 30, 20_000)
    ties = (whole.view(torch.int32) & ~0xFFFF | 0x8000).view(torch.float32)  # as far from one bfloat16 as from the next
    whole = torch.cat([whole, ties, torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38])])
    high, low = halves(whole)
    assert (high.dtype, low.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(joined(high, low).view(torch.int32), whole.view(torch.int32))
    away, nearest = ((one.double() - whole.double()).abs() for one in (high, whole.bfloat16()))
    assert torch.equal(away.nan_to_num(posinf=0), nearest.nan_to_num(posinf=0))

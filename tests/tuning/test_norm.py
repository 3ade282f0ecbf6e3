"""The frozen norm equals the one it replaces, forward and backward."""

from __future__ import annotations

import pytest
import torch

from gemst.tuning.norm import FrozenRMSNorm, freeze_norms, thaw_norms
from tests.tuning.conftest import llama, t5


@pytest.mark.parametrize(("make", "inputs"), [(llama, {}), (t5, {"decoder_input_ids": torch.arange(3, 7)[None]})])
def test_same_outputs_and_gradients(make, inputs) -> None:
    ids = torch.arange(3, 15)[None]
    model = make().requires_grad_(False)
    kinds = [type(m) for m in model.modules()]

    def outcome() -> tuple[torch.Tensor, torch.Tensor]:
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = model(inputs_embeds=embeds, **inputs).logits
        logits.log_softmax(-1)[..., 4].sum().backward()
        return logits.detach(), embeds.grad

    before = outcome()
    originals = freeze_norms(model)
    assert originals
    assert any(isinstance(m, FrozenRMSNorm) for m in model.modules())
    for ours, theirs in zip(outcome(), before, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    thaw_norms(model, originals)
    assert [type(m) for m in model.modules()] == kinds


@pytest.mark.parametrize("settings", [{"elementwise_affine": False, "eps": 1e-5}, {"eps": None}])
def test_a_norm_without_a_weight_or_an_eps_of_its_own_stays_as_it_is(settings) -> None:
    """DiffLlama's groupnorm is the first kind."""
    model = torch.nn.Sequential(torch.nn.RMSNorm(8, **settings), torch.nn.RMSNorm(8, eps=1e-5)).requires_grad_(False)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    before = model(x)
    assert list(freeze_norms(model)) == ["1"]
    torch.testing.assert_close(model(x), before)

"""The paper's equations and the released code's order, against separate full backward passes; what each leaks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gemst.config import Config, NullSpace
from gemst.errors import GemstError
from gemst.tuning import null_space
from gemst.tuning.methods import make
from gemst.tuning.methods.fidelity import FidelityMethod
from gemst.tuning.methods.gems import GemsMethod
from gemst.tuning.subspace import matching
from tests.tuning.conftest import ITEMS, llama
from tests.tuning.test_methods import build, steps
from tests.tuning.test_null_space import TEXTS

SETTINGS = {"tokens": 400, "sequence_length": 20, "energy": 0.3}


def made(tmp_path: Path, train, prompter, tokenizer, fidelity: str, **tuning):
    """A method with a real null space of its side; what it is compared with."""
    side = "output" if fidelity == "released" else "input"
    space = {**SETTINGS, "side": side}
    model = llama(20 + ITEMS)
    modules = Config().tuning.modules
    config = Config.model_validate({"null_space": space, "tuning": {"fidelity": fidelity}})
    folder = tmp_path / side
    null_space.build(model, tokenizer, matching(model, modules), TEXTS, config.null_space, folder)
    return build(folder, train, prompter, null_space=space, fidelity=fidelity, **tuning)


def leaks(method, before: dict[str, torch.Tensor], spaces: dict[str, null_space.Range]) -> list[float]:
    """|dW K0| / (|dW| |K0|) on the input side, by layer."""
    found = []
    for name, space in spaces.items():
        change = (method.weights()[name] - before[name]).double()
        outside = change - space(change.t()).t()
        found.append(float(outside.norm() / (change.norm() * (change.shape[1] - space.dimensions) ** 0.5)))
    return found


@pytest.mark.parametrize("fidelity", ["paper", "released"])
def test_the_first_step_is_what_its_equations_say(tmp_path: Path, train, prompter, tokenizer, fidelity: str) -> None:
    """Adam's first step is C / (|C| + eps) in every coordinate; gates 0.5; gradients from one full pass per loss."""
    settings = {"lr": 1e-3, "scale": 0.5, "weight_decay": 0.1, "gates": {"kind": "fixed"}, "rank": 4}
    items, method, batch = made(tmp_path, train, prompter, tokenizer, fidelity, **settings)
    assert isinstance(method, FidelityMethod)
    weights = {name: tensor.clone() for name, tensor in method.weights().items()}
    by_loss = []
    rec = batch.targets[0]
    for part in (slice(0, rec), slice(None), slice(rec, None)):
        items.zero_grad()
        items(batch)[part].mean().backward()
        by_loss.append({name: parameter.grad.clone() for name, parameter in method.named.items()})
    items.zero_grad()
    steps(items, method, batch, 1)
    for name, old in weights.items():
        space, update = method.spaces[name], torch.zeros_like(old)
        for place, gate in enumerate((0.5, 1.0, 0.5)):
            gradient, rank = by_loss[place][name], (2, 4, 2)[place]
            right = True
            if fidelity == "released":
                gradient, right = space(gradient), gradient.shape[0] >= gradient.shape[1]
            left, _, across = torch.linalg.svd(gradient, full_matrices=False)
            projector = across[:rank].t() if right else left[:, :rank]
            low = gradient @ projector if right else projector.t() @ gradient
            step = low / (low.abs() + 1e-6 / (1 - 0.99) ** 0.5)  # eps acts before the bias correction
            update += gate * (step @ projector.t() if right else projector @ step)
        if fidelity == "paper":
            update = space(update.t()).t()
        expected = (old - 1e-3 * 0.5 * update) * (1 - 1e-3 * 0.1)
        torch.testing.assert_close(method.weights()[name], expected, rtol=0, atol=2e-5)


def test_the_released_order_leaks_where_the_paper_and_ours_do_not(tmp_path: Path, train, prompter, tokenizer) -> None:
    found = {}
    spaces: dict[str, null_space.Range] = {}
    for fidelity in ("default", "paper", "released"):
        items, method, batch = made(tmp_path, train, prompter, tokenizer, fidelity, refresh_every=5)
        spaces = spaces or null_space.load(tmp_path / "input", llama(20 + ITEMS), NullSpace(**SETTINGS))[0]
        before = {name: tensor.clone() for name, tensor in method.weights().items()}
        losses = steps(items, method, batch, 12)
        assert losses[-1] < losses[0]
        found[fidelity] = leaks(method, before, spaces)
    assert max(found["default"]) < 1e-6
    assert max(found["paper"]) < 1e-6
    assert min(found["released"]) > 1e-2


def test_a_null_space_that_lacks_a_layer_is_refused(tmp_path: Path, train, prompter, tokenizer) -> None:
    model, settings = llama(20 + ITEMS), NullSpace(**SETTINGS)
    null_space.build(model, tokenizer, matching(model, "q_proj$"), TEXTS, settings, tmp_path / "p")
    for fidelity in ("default", "paper"):
        with pytest.raises(GemstError, match=r"null space has no part for .*k_proj.*gemst null-space"):
            build(tmp_path / "p", train, prompter, null_space=SETTINGS, fidelity=fidelity)


def test_the_default_is_the_engine_and_combinations_that_mean_nothing_are_refused(tmp_path, train, prompter) -> None:
    assert isinstance(build(tmp_path, train, prompter)[1], GemsMethod)
    for tuning, said in [
        ({"fidelity": "paper", "method": "full"}, "for method gems"),
        ({"fidelity": "paper", "gates": {"kind": "learned"}}, "heuristic or fixed gate"),
        ({"fidelity": "released"}, "needs null_space.side: output"),
        ({"fidelity": "paper", "subspaces": "shared"}, "all subspaces"),
        ({"precision": "bf16-weights", "method": "lora"}, "bf16-weights is for method gems"),
    ]:
        with pytest.raises(ValueError, match=said):
            Config.model_validate({"tuning": tuning})


def test_an_adapter_that_cannot_sit_on_a_layer_is_refused(tmp_path: Path, train, prompter) -> None:
    with pytest.raises(GemstError, match=r"rank = 16 leaves .* no direction to keep.*below 16"):
        build(tmp_path, train, prompter, method="lora", adapter="osf", rank=16)
    from gemst.tuning.model import ItemModel
    from tests.tuning.conftest import gpt2

    config = Config.model_validate({"tuning": {"method": "lora", "adapter": "osf", "rank": 4}})
    with pytest.raises(GemstError, match=r"peft puts no osf adapter on .*adapter: lora"):
        make(config, ItemModel(gpt2(20 + ITEMS), 20, (ITEMS,), False), tmp_path)

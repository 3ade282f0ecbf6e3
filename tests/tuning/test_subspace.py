"""Coefficient gradients from one backward pass equal those of separate full backward passes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

from gemst.errors import GemstError
from gemst.tuning.bases import orthonormal, whole_space
from gemst.tuning.subspace import SubspaceLinear, attach, matching
from tests.tuning import conftest as models

PATTERN = r"(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|Attention\.[qkvo]|wi|wo|c_attn|c_fc|c_proj)$"
FAMILIES = {"llama": models.llama, "t5": models.t5, "gpt2": models.gpt2}


def inputs(boundary: int, rows: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 20, (rows, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    mask[-1, 2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def row_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """A scalar per row that depends on that row alone, padding left out."""
    extra = {"decoder_input_ids": batch["input_ids"][:, :3]} if model.config.is_encoder_decoder else {}
    logits = model(**batch, **extra).logits
    scores = logits.log_softmax(-1)[..., 5]
    if not extra:
        scores = scores * batch["attention_mask"]
    return scores.sum(1)


def fill_bases(layers: dict[str, SubspaceLinear]) -> None:
    generator = torch.Generator().manual_seed(2)
    for layer in layers.values():
        layer.basis.copy_(torch.linalg.qr(torch.randn(layer.basis.shape, generator=generator)).Q)


def full_gradients(family: str, boundary: int, batch: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Gradients of the rec, src and joint mean losses by separate backward passes over plain Linears, in float64."""
    found: dict[str, dict[str, Tensor]] = {}
    for task, rows in {"rec": slice(0, boundary), "src": slice(boundary, None), "shared": slice(None)}.items():
        model = FAMILIES[family]().double()
        modules = matching(model, PATTERN)
        row_losses(model, batch)[rows].mean().backward()
        for name, module in modules.items():
            gradient = module.weight.grad
            assert gradient is not None
            found.setdefault(name, {})[task] = gradient.t() if family == "gpt2" else gradient
    return found


def coefficients(
    family: str, boundary: int, batch: dict[str, Tensor], *, said: int, pieces: int = 1, checkpointing: bool = False
) -> dict[str, SubspaceLinear]:
    model = FAMILIES[family]().double()
    attached = attach(model, PATTERN, rank=8)
    fill_bases(attached.layers)
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    rows = len(batch["input_ids"])
    attached.route.weights = (rows / boundary, rows / (rows - boundary))
    if pieces == 1:
        attached.route.boundary = said
        (row_losses(model, batch).sum() / rows).backward()
    else:
        for at in range(rows):  # accumulation: one row at a time
            attached.route.boundary = int(at < said)
            (row_losses(model, {k: v[at : at + 1] for k, v in batch.items()}).sum() / rows).backward()
    return attached.layers


def worst(layers: dict[str, SubspaceLinear], expected: dict[str, dict[str, Tensor]]) -> float:
    errors = []
    for name, layer in layers.items():
        for task, gradient in expected[name].items():
            columns = layer.widths.columns(task)
            assert layer.coefficients.grad is not None
            wanted = gradient @ layer.basis[:, columns].to(gradient)
            errors.append(float((layer.coefficients.grad[:, columns] - wanted).norm() / wanted.norm().clamp(min=1e-8)))
    return max(errors)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("pieces", "checkpointing"), [(1, False), (5, False), (1, True)])
def test_one_backward_equals_three(family: str, pieces: int, checkpointing: bool) -> None:
    batch = inputs(2)
    expected = full_gradients(family, 2, batch)
    layers = coefficients(family, 2, batch, said=2, pieces=pieces, checkpointing=checkpointing)
    assert worst(layers, expected) < 1e-6
    assert all(layer.weight.grad is None for layer in layers.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrong_task_split_is_caught(family: str) -> None:
    batch = inputs(2)
    assert worst(coefficients(family, 2, batch, said=3), full_gradients(family, 2, batch)) > 1e-2


def test_coupled_rows_take_two_backward_passes() -> None:
    batch = inputs(2)
    expected = full_gradients("llama", 2, batch)
    model = models.llama().double()
    attached = attach(model, PATTERN, rank=8)
    fill_bases(attached.layers)
    attached.route.boundary, attached.route.weights = None, (5 / 2, 5 / 3)
    losses = row_losses(model, batch) / 5
    for task, rows in enumerate((slice(0, 2), slice(2, 5))):
        attached.route.backward = task
        losses[rows].sum().backward(retain_graph=task == 0)
    assert worst(attached.layers, expected) < 1e-6


def test_linears_that_see_flattened_rows_are_split_in_the_right_place() -> None:
    """OPT flattens (rows, positions) before its MLP: the boundary there counts positions."""
    batch, pattern = inputs(2), r"(fc1|fc2|q_proj)$"
    shape = tuple(batch["input_ids"].shape)
    attached = attach(opt(), pattern, rank=8)
    fill_bases(attached.layers)
    attached.announce(2, (2, 3), (shape[0], (shape[1],)))
    (row_losses(attached.model, batch).sum() / 5).backward()
    assert not attached.route.coupled
    expected: dict[str, dict[str, Tensor]] = {}
    for task, rows in {"rec": slice(0, 2), "src": slice(2, None), "shared": slice(None)}.items():
        plain = opt()
        row_losses(plain, batch)[rows].mean().backward()
        for name, module in matching(plain, pattern).items():
            expected.setdefault(name, {})[task] = module.weight.grad
    assert worst(attached.layers, expected) < 1e-6


def test_flattened_rows_that_nobody_spoke_of_are_not_split_by_guess() -> None:
    attached = attach(opt(), r"(fc1|fc2|q_proj)$", rank=8)
    fill_bases(attached.layers)
    attached.announce(2, (2, 3))
    with pytest.raises(GemstError, match=r"sees \d+ rows without positions.*Gems.begin.*`shape`"):
        row_losses(attached.model, inputs(2))


def opt() -> OPTForCausalLM:
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=20, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, dropout=0.0,
        max_position_embeddings=64, word_embed_proj_dim=32, pad_token_id=1, bos_token_id=2, eos_token_id=2,
    )  # fmt: skip
    return OPTForCausalLM(config).eval().double()


def test_a_linear_that_sees_some_positions_alone_asks_for_a_pass_per_task() -> None:
    """What cannot be split is found out by itself, and then the tasks' own passes give its coefficients."""

    class Picky(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first_proj, self.second_proj = torch.nn.Linear(8, 8), torch.nn.Linear(8, 4)

        def forward(self, x: Tensor, kept: Tensor) -> Tensor:
            some = self.second_proj(self.first_proj(x)[kept]).pow(2).sum(-1)  # (kept positions, 4)
            return torch.zeros(kept.shape).masked_scatter(kept, some).sum(1)  # by row

    def make() -> Picky:
        torch.manual_seed(0)
        return Picky()

    x, kept = torch.randn(5, 6, 8), torch.rand(5, 6) > 0.4
    model = make()
    attached = attach(model, "proj$", rank=4)
    fill_bases(attached.layers)
    attached.announce(2, (2, 3), (5, (6,)))
    losses = model(x, kept) / 5
    assert attached.route.coupled
    for task, rows in enumerate((slice(0, 2), slice(2, 5))):
        attached.route.backward = task
        losses[rows].sum().backward(retain_graph=task == 0)
    expected: dict[str, dict[str, Tensor]] = {}
    for task, rows in {"rec": slice(0, 2), "src": slice(2, None), "shared": slice(None)}.items():
        plain = make()
        plain(x, kept)[rows].mean().backward()
        for name, module in matching(plain, "proj$").items():
            expected.setdefault(name, {})[task] = module.weight.grad
    assert worst(attached.layers, expected) < 1e-5


def test_sketch_is_the_gradient_times_its_left_factor() -> None:
    from gemst.tuning.bases import first_sketch

    batch = inputs(2)
    expected = full_gradients("llama", 2, batch)
    model = models.llama().double()
    attached = attach(model, PATTERN, rank=8)
    for layer in attached.layers.values():
        layer.sketch = first_sketch(layer, whole_space, torch.Generator().manual_seed(4))
    attached.route.boundary, attached.route.weights = 2, (5 / 2, 5 / 3)
    (row_losses(model, batch).sum() / 5).backward()
    for name, layer in attached.layers.items():
        assert layer.sketch is not None
        for task, gradient in expected[name].items():
            columns = layer.widths.columns(task)
            torch.testing.assert_close(
                layer.sketch.right[:, columns],
                (gradient.t() @ layer.sketch.left[:, columns].to(gradient)).float(),
                rtol=1e-3,
                atol=1e-5,
            )
        torch.testing.assert_close(
            layer.sketch.probed, (expected[name]["shared"] @ layer.sketch.probe.double()).float(), rtol=1e-3, atol=1e-5
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_detach_leaves_a_plain_model_with_the_same_outputs(family: str) -> None:
    batch, model = inputs(2), FAMILIES[family]()
    before, names = row_losses(model, batch).detach(), [type(m).__name__ for m in model.modules()]
    attached = attach(model, PATTERN, rank=8)
    torch.testing.assert_close(row_losses(model, batch).detach(), before)
    attached.detach()
    assert [type(m).__name__ for m in model.modules()] == names
    torch.testing.assert_close(row_losses(model, batch).detach(), before)
    assert not any("coefficients" in name for name, _ in model.named_parameters())


def test_orthonormal_stays_in_range_even_for_rank_one_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    used = torch.linalg.qr(torch.randn(40, 15, generator=generator)).Q
    vectors = torch.randn(40, 1, generator=generator) @ torch.randn(1, 10, generator=generator)
    apart = orthonormal(
        torch.randn(40, 8, generator=generator), lambda v: v - used @ (used.t() @ v), used[:, :0], generator
    )
    basis = orthonormal(vectors, lambda v: v - used @ (used.t() @ v), apart, generator)
    torch.testing.assert_close(basis.t() @ basis, torch.eye(10), atol=1e-5, rtol=0)
    assert float((used.t() @ basis).abs().max()) < 1e-6
    assert float((apart.t() @ basis).abs().max()) < 1e-5


def test_wrong_use_says_what_to_do() -> None:
    with pytest.raises(GemstError, match=r"tuning.rank = 64 exceeds the width 32 .* Set tuning.rank"):
        attach(models.llama(), PATTERN, rank=64)
    with pytest.raises(GemstError, match=r"matches no Linear.*down_proj, gate_proj"):
        attach(models.llama(), "nothing_like_this", rank=4)
    with pytest.raises(GemstError, match=r"stored as torch.float16.*torch.float32 or torch.bfloat16"):
        attach(models.llama().half(), PATTERN, rank=4)


@pytest.mark.parametrize("make", [models.llama, models.t5, models.gpt2])
def test_the_head_is_none_of_the_linears(make) -> None:
    """General text does not pass through it on its way, and item tokens have rows of their own there."""
    model = make()
    found = matching(model, ".*")
    assert found
    assert all(module is not model.get_output_embeddings() for module in found.values())

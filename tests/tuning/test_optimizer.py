"""The Gems optimizer: exact null space, absent tasks, bad gradients, rotation, resume."""

from __future__ import annotations

import io
import math

import pytest
import torch
from torch import Tensor

from gemst.config import Gates
from gemst.errors import GemstError
from gemst.tuning.bases import captured_energy, warm_sketch
from gemst.tuning.gates import Gate, Signals
from gemst.tuning.null_space import Range
from gemst.tuning.optimizer import Gems
from gemst.tuning.subspace import Attached, SubspaceLinear, attach
from tests.tuning.conftest import llama
from tests.tuning.test_subspace import PATTERN, inputs, row_losses


def spaces(model: torch.nn.Module, used: int = 10) -> dict[str, Range]:
    """A null space per layer: everything but `used` random directions."""
    generator = torch.Generator().manual_seed(5)
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "proj" in name:
            found[name] = Range(
                torch.linalg.qr(torch.randn(module.in_features, used, generator=generator)).Q, complement=True
            )
    return found


def build(gates: Gates | None = None, **settings) -> tuple[torch.nn.Module, Attached, Gems, torch.nn.Parameter]:
    model = llama()
    null = spaces(model)
    attached = attach(model, PATTERN, rank=8, rooms={name: space.dimensions for name, space in null.items()})
    rows = torch.nn.Parameter(torch.zeros(3, 4))
    defaults = {"lr": 1e-2, "item_lr": 1e-2, "refresh_every": 7}
    return model, attached, Gems(attached, [rows], Gate(gates or Gates()), dict(null), **{**defaults, **settings}), rows


def step(
    model, attached: Attached, optimizer: Gems, rows: torch.nn.Parameter, seed: int, boundary: int = 2, total: int = 5
) -> None:
    batch = inputs(2, total)
    batch["input_ids"] = torch.randint(3, 20, (total, 7), generator=torch.Generator().manual_seed(seed))
    for _ in range(2 if optimizer.needs_first_bases else 1):
        first = optimizer.needs_first_bases
        attached.route.boundary = boundary
        attached.route.weights = (total / max(boundary, 1), total / max(total - boundary, 1))
        optimizer.signals = Signals((1.0, 2.0), (boundary, total - boundary))
        optimizer.prepare()
        losses = row_losses(model, batch)
        (losses.sum() / total + (rows**2).sum() + rows.sum()).backward()
        if first:
            optimizer.start()
    torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["heuristic", "learned"])
def test_no_update_leaves_the_null_space(kind: str) -> None:
    model, attached, optimizer, rows = build(Gates(kind=kind), weight_decay=0.1)
    before = {name: layer.weight.detach().clone() for name, layer in attached.layers.items()}
    for seed in range(30):
        step(model, attached, optimizer, rows, seed)
    for name, layer in attached.layers.items():
        change = (layer.weight.detach() - before[name]).double()
        used = optimizer.projectors[name].basis.double()
        assert change.norm() > 1e-2
        assert float((change @ used).norm() / (change.norm() * used.norm())) < 1e-6, name


def test_gradient_projected_before_adam_leaks() -> None:
    """The order others use, on the same layer: project the gradient, then Adam. It must fail what ours passes."""
    generator = torch.Generator().manual_seed(0)
    used = torch.linalg.qr(torch.randn(32, 10, generator=generator)).Q
    weight = torch.nn.Parameter(torch.zeros(16, 32))
    adam = torch.optim.Adam([weight], lr=1e-2)
    for _ in range(30):
        gradient = torch.randn(16, 32, generator=generator)
        weight.grad = gradient - gradient @ used @ used.t()
        adam.step()
    assert float((weight.detach() @ used).norm() / (weight.detach().norm() * used.norm())) > 1e-2


def test_the_loss_falls() -> None:
    model, attached, optimizer, _rows = build()
    batch = inputs(2)
    losses = []
    for _ in range(30):
        for _ in range(2 if optimizer.needs_first_bases else 1):
            first = optimizer.needs_first_bases
            attached.route.boundary = 2
            optimizer.signals = Signals((1.0, 1.0), (2, 3))
            optimizer.prepare()
            loss = row_losses(model, batch).sum()
            loss.backward()
            if first:
                optimizer.start()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 5


def test_an_absent_task_is_left_untouched() -> None:
    model, attached, optimizer, rows = build()
    step(model, attached, optimizer, rows, 0)
    layer = next(iter(attached.layers.values()))
    state, columns = optimizer.state[layer.coefficients], layer.widths.columns("src")
    before = (
        {k: state[k][:, columns].clone() for k in ("exp_avg", "exp_avg_sq")},
        state["counts"].clone(),
        layer.weight.detach().clone(),
    )
    step(model, attached, optimizer, rows, 1, boundary=5)
    assert torch.equal(state["exp_avg"][:, columns], before[0]["exp_avg"])
    assert torch.equal(state["exp_avg_sq"][:, columns], before[0]["exp_avg_sq"])
    assert state["counts"].tolist() == (before[1] + torch.tensor([1.0, 1.0, 0.0])).tolist()
    change = layer.weight.detach() - before[2]
    only_src = layer.basis[:, columns] - layer.basis[:, : columns.start] @ (
        torch.linalg.pinv(layer.basis[:, : columns.start]) @ layer.basis[:, columns]
    )
    assert float((change @ only_src).abs().max()) < 1e-6 < float(change.abs().max())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_gradients_are_skipped_and_counted(bad: float) -> None:
    model, attached, optimizer, rows = build()
    step(model, attached, optimizer, rows, 0)
    before = {name: layer.weight.detach().clone() for name, layer in attached.layers.items()}
    optimizer.begin(2, (2, 3))
    row_losses(model, inputs(2)).sum().backward()
    next(iter(attached.layers.values())).coefficients.grad[0, 0] = bad
    optimizer.step()
    optimizer.zero_grad()
    assert optimizer.skipped == 1
    assert all(torch.equal(layer.weight, before[name]) for name, layer in attached.layers.items())


def test_only_subspaces_and_item_rows_change() -> None:
    model, attached, optimizer, rows = build()
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if "proj" not in n}
    for seed in range(5):
        step(model, attached, optimizer, rows, seed)
    assert frozen
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    assert all(not layer.coefficients.any() for layer in attached.layers.values())


def test_moments_are_rotated_into_the_new_basis() -> None:
    """The momentum Q M^T as a matrix must survive a refresh as well as the new basis can hold it."""
    model, attached, optimizer, rows = build(refresh_every=1000)
    for seed in range(4):
        step(model, attached, optimizer, rows, seed)
    _name, layer = next(iter(attached.layers.items()))
    state, columns = optimizer.state[layer.coefficients], layer.widths.columns("shared")
    whole = state["exp_avg"][:, columns] @ layer.basis[:, columns].t()
    optimizer.refresh_every = 1
    step(model, attached, optimizer, rows, 4)
    basis = layer.basis[:, columns]
    rotated = state["exp_avg"][:, columns]
    assert rotated.shape == (whole.shape[0], 8)
    cosine = torch.nn.functional.cosine_similarity((whole @ basis).flatten(), rotated.flatten(), dim=0)
    assert float(cosine) > 0.9


@pytest.mark.parametrize("kind", ["heuristic", "learned"])
def test_resume_is_exact_and_loads_weights_only(kind: str) -> None:
    straight = build(Gates(kind=kind))
    for seed in range(20):
        step(*straight, seed)
    first = build(Gates(kind=kind))
    for seed in range(9):
        step(*first, seed)
    buffer = io.BytesIO()
    torch.save(first[2].state_dict(), buffer)
    weights = {name: layer.weight.detach().clone() for name, layer in first[1].layers.items()}
    second = build(Gates(kind=kind))
    for name, layer in second[1].layers.items():
        layer.weight.data.copy_(weights[name])
    second[3].data.copy_(first[3].data)
    buffer.seek(0)
    second[2].load_state_dict(torch.load(buffer, weights_only=True))
    for seed in range(9, 20):
        step(*second, seed)
    for name, layer in second[1].layers.items():
        assert torch.equal(layer.weight, straight[1].layers[name].weight), name


def test_learned_gate_moves_towards_the_task_whose_update_pays_off() -> None:
    gate = Gate(Gates(kind="learned"))
    for _ in range(20):
        rec, src = gate.update(Signals((1, 1), (1, 1), alignment=(2.0, -1.0)))
    assert rec > 0.6
    assert abs(rec + src - 1) < 1e-12
    for _ in range(60):
        rec, _ = gate.update(Signals((1, 1), (1, 1), alignment=(-1.0, 2.0)))
    assert rec < 0.4


def test_heuristic_gate_is_the_released_mix() -> None:
    rec, src = Gate(Gates()).update(Signals((3.0, 1.0), (10, 30), norms=(1.0, 1.0)))
    assert rec == pytest.approx(0.4 * 0.75 + 0.4 * 0.5 + 0.2 * 0.25)
    assert src == pytest.approx(1 - rec)


def test_tensor_kinds_survive(tmp_path) -> None:
    """What a checkpoint keeps is tensors and plain numbers."""
    model, attached, optimizer, rows = build()
    step(model, attached, optimizer, rows, 0)
    kinds = {type(v) for state in optimizer.state_dict()["state"].values() for v in state.values()}
    assert kinds == {Tensor}


def test_optimizer_state_is_as_large_as_the_documented_formula() -> None:
    model, attached, optimizer, rows = build()
    step(model, attached, optimizer, rows, 0)
    states = optimizer.state_dict()["state"].values()
    actual = sum(value.numel() * value.element_size() for state in states for value in state.values())
    expected = 4 * (2 * rows.numel() + 1)
    for layer in attached.layers.values():
        (m, n), width = layer.matrix.shape, layer.widths.total
        expected += 4 * (2 * m * width + n * width + 3)
    assert actual == expected


def test_the_learned_gate_gives_way_to_the_task_that_can_be_learned() -> None:
    """One task asks for the same in every step, the other for a random direction: its last update never helps."""
    shares = []
    for noisy in ("src", "rec"):
        model, _attached, optimizer, _ = build(Gates(kind="learned"), refresh_every=1000, lr=1e-3)
        generator = torch.Generator().manual_seed(0)
        batch = inputs(2)
        for _ in range(30):
            sign = torch.ones(5)
            sign[slice(2, 5) if noisy == "src" else slice(0, 2)] *= float(torch.randn((), generator=generator).sign())
            optimizer.begin(2, (2, 3))
            (row_losses(model, batch) * sign).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        shares.append(optimizer.gates[0])
    assert shares[0] > 0.55
    assert shares[1] < 0.45


def test_a_step_without_one_task_leaves_the_learned_gate_alone() -> None:
    model, attached, optimizer, rows = build(Gates(kind="learned"))
    for seed, boundary in enumerate((2, 5, 2)):  # the third step follows one without search
        step(model, attached, optimizer, rows, seed, boundary=boundary)
        assert optimizer.gate.logit == 0.0
    step(model, attached, optimizer, rows, 3)
    assert optimizer.gate.logit != 0.0


def test_a_direction_without_history_takes_no_oversized_step() -> None:
    """After a refresh to a basis orthogonal to the old one, second moments are those of the row's mean, not zero."""
    model, attached, optimizer, rows = build(betas=(0.9, 0.999), refresh_every=1000)
    for seed in range(6):
        step(model, attached, optimizer, rows, seed)
    layer = next(iter(attached.layers.values()))
    state = optimizer.state[layer.coefficients]
    columns = layer.widths.columns("rec")
    before, momentum = state["exp_avg_sq"][:, columns].mean(1), float(state["exp_avg"][:, columns].norm())
    # A sketch whose right factor is orthogonal to the old basis gives a basis without any overlap.
    fresh = torch.randn(32, layer.widths.rec, generator=torch.Generator().manual_seed(9))
    project = optimizer.projectors[next(iter(attached.layers))]
    fresh = project(fresh)
    fresh -= layer.basis @ torch.linalg.lstsq(layer.basis, fresh).solution
    optimizer.refresh_every = 1
    optimizer.signals = Signals((1.0, 1.0), (2, 3))
    optimizer.prepare()
    layer.sketch.right[:, columns] = fresh
    layer.sketch.right[:, layer.widths.columns("shared")] = layer.basis[:, layer.widths.columns("shared")]
    optimizer._refresh(next(iter(attached.layers)), layer, state)
    assert float(state["exp_avg"][:, columns].norm()) < 1e-2 * momentum
    torch.testing.assert_close(
        state["exp_avg_sq"][:, columns], before[:, None].expand(-1, layer.widths.rec), rtol=1e-3, atol=1e-12
    )


def test_a_step_whose_tasks_nobody_said_is_refused_and_one_alternating_task_a_step_gives_both_bases() -> None:
    model, attached, optimizer, _ = build()
    with pytest.raises(GemstError, match=r"nothing says how many targets.*Gems.signals before Gems.prepare"):
        optimizer.prepare()
    for number in range(6):
        rec, src = ((5, 0), (0, 5))[number % 2]
        optimizer.signals = Signals((1.0, 1.0), (rec, src))
        optimizer.prepare()
        attached.announce(rec, (rec, src))
        row_losses(model, inputs(number)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not optimizer._unborn
    attached.announce(2, (2, 3))
    row_losses(model, inputs(7)).mean().backward()
    with pytest.raises(GemstError, match="nothing says"):
        optimizer.step()


def test_captured_energy_does_not_depend_on_clipping() -> None:
    found = []
    for clip in (1e9, 1e-3):
        model, attached, optimizer, _ = build(refresh_every=1)
        for _ in range(3):
            optimizer.begin(2, (2, 3))
            row_losses(model, inputs(2)).mean().backward()
            torch.nn.utils.clip_grad_norm_([layer.coefficients for layer in attached.layers.values()], clip)
            if len(optimizer.energy):
                break
            optimizer.step()
            optimizer.zero_grad()
        found.append(list(optimizer.energy.values()))
    assert found[0] == pytest.approx(found[1], rel=0.1)
    assert all(0.05 < energy < 1 for energy in found[0])


def test_captured_energy_is_the_share_of_the_gradient_that_the_shared_basis_holds() -> None:
    """Rank-one gradients: wholly inside the basis, wholly outside, and a half each."""
    model, attached, optimizer, rows = build(refresh_every=1000)
    step(model, attached, optimizer, rows, 0)
    name, layer = next(iter(attached.layers.items()))
    project, shared = optimizer.projectors[name], layer.basis[:, layer.widths.columns("shared")]
    generator = torch.Generator().manual_seed(1)
    inside, outside = shared[:, 0], project(torch.randn(len(shared), 1, generator=generator))[:, 0]
    outside = outside - shared @ (shared.t() @ outside)
    outside /= outside.norm()
    left = torch.randn(layer.coefficients.shape[0], generator=generator)
    found = []
    for direction in (inside, outside, (inside + outside) / 2**0.5):
        shares = []
        for _ in range(200):
            sketch = warm_sketch(layer, layer.coefficients.detach(), project, generator)
            gradient = torch.outer(left, direction)
            sketch.probed, sketch.shared = gradient @ sketch.probe, gradient @ shared
            layer.sketch = sketch
            shares.append(captured_energy(layer))
        found.append(sum(shares) / len(shares))
    assert found == pytest.approx([1, 0, 0.5], abs=0.07)


def matrix_of(optimizer: Gems, layer: SubspaceLinear, subspace: str) -> Tensor:
    """A task's momentum as the matrix (m, n) it stands for."""
    columns = layer.widths.columns(subspace)
    return optimizer.state[layer.coefficients]["exp_avg"][:, columns] @ layer.basis[:, columns].t()


def test_a_refresh_without_a_task_keeps_its_basis_and_momentum() -> None:
    model, attached, optimizer, rows = build(refresh_every=1000, lr=1e-4)
    for _ in range(8):
        step(model, attached, optimizer, rows, 0)
    optimizer.refresh_every = 1
    step(model, attached, optimizer, rows, 0)
    before = {name: matrix_of(optimizer, layer, "src") for name, layer in attached.layers.items()}
    old = {name: layer.basis.clone() for name, layer in attached.layers.items()}
    step(model, attached, optimizer, rows, 0, boundary=5)
    for name, layer in attached.layers.items():
        columns = layer.widths.columns("src")
        overlap = (old[name][:, columns].t() @ layer.basis[:, columns]).pow(2).sum() / (columns.stop - columns.start)
        cosine = torch.nn.functional.cosine_similarity(
            before[name].flatten(), matrix_of(optimizer, layer, "src").flatten(), dim=0
        )
        assert float(overlap) > 0.8, name
        assert float(cosine) > 0.8, name


def test_a_task_that_the_first_step_lacks_gets_its_bases_when_it_comes() -> None:
    model, attached, optimizer, rows = build(refresh_every=1000)
    for seed in range(3):
        step(model, attached, optimizer, rows, seed, boundary=5)
    layers = list(attached.layers.values())
    src = [layer.widths.columns("src") for layer in layers]
    assert not any(bool(layer.basis[:, columns].any()) for layer, columns in zip(layers, src, strict=True))
    step(model, attached, optimizer, rows, 3)  # shows it
    step(model, attached, optimizer, rows, 4)  # uses it
    for layer, columns in zip(layers, src, strict=True):
        own = layer.basis[:, columns]
        torch.testing.assert_close(own.t() @ own, torch.eye(own.shape[1]), atol=1e-5, rtol=0)
        assert optimizer.state[layer.coefficients]["exp_avg"][:, columns].any()
        assert optimizer.state[layer.coefficients]["counts"].tolist() == [5.0, 5.0, 1.0]


def test_a_first_pass_that_is_no_number_is_skipped_and_made_again() -> None:
    model, attached, optimizer, rows = build()
    before = {name: layer.weight.detach().clone() for name, layer in attached.layers.items()}
    optimizer.begin(2, (2, 3))
    (row_losses(model, inputs(2)).sum() * float("nan")).backward()
    optimizer.start()
    assert (optimizer.skipped, optimizer.needs_first_bases) == (1, True)
    for seed in range(2):
        step(model, attached, optimizer, rows, seed)
    assert optimizer.skipped == 1
    assert all(bool((layer.weight != before[name]).any()) for name, layer in attached.layers.items())


def test_what_is_left_unsaid_or_does_not_fit_is_named() -> None:
    model, attached, optimizer, rows = build()
    with pytest.raises(GemstError, match=r"nobody said which rows.*Gems.begin"):
        row_losses(model, inputs(2)).sum().backward()
    attached.announce(2, (2, 3))
    with pytest.raises(GemstError, match=r"search rows begin at 50, the batch has 5"):
        attached.announce(50, (2, 3))
        row_losses(model, inputs(2))
    attached.announce(2, (2, 3))
    row_losses(model, inputs(2)).sum().backward()
    optimizer.signals = Signals((1.0, 1.0), (2, 3))
    with pytest.raises(GemstError, match=r"not prepared for.*Gems.begin"):
        optimizer.step()
    null = dict(optimizer.projectors)
    for fault, says, settings in (
        ({f"model.{name}": space for name, space in null.items()}, "no entry for", {}),
        ({name: Range(space.basis, complement=False) for name, space in null.items()}, "dimensions, its subspaces", {}),
        (null, "is 1 or more", {"lr": 2.0, "weight_decay": 0.5}),
    ):
        with pytest.raises(GemstError, match=says):
            Gems(attached, [rows], Gate(Gates()), fault, **settings)


def test_bases_of_another_null_space_are_refused() -> None:
    model, attached, optimizer, rows = build()
    step(model, attached, optimizer, rows, 0)
    saved = optimizer.state_dict()
    *_, other, _ = build()
    other.load_state_dict(saved)
    other.projectors = dict(spaces(llama(), used=11))
    with pytest.raises(GemstError, match="leave the null space of"):
        other.load_state_dict(saved)


def test_catching_up_decays_every_layer_for_all_its_steps() -> None:
    model, attached, optimizer, rows = build(weight_decay=0.5, refresh_every=1000, lr=1e-3)
    step(model, attached, optimizer, rows, 0)
    optimizer.catch_up()
    before = {name: layer.exact().clone() for name, layer in attached.layers.items()}
    for layer in attached.layers.values():
        for moment in ("exp_avg", "exp_avg_sq"):
            optimizer.state[layer.coefficients][moment].zero_()
    for _ in range(6):
        optimizer.begin(2, (2, 3))
        (row_losses(model, inputs(2)) * 0).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.catch_up()
    for name, layer in attached.layers.items():
        project = optimizer.projectors[name]
        inside, was = project(layer.exact().t()), project(before[name].t())
        torch.testing.assert_close(inside, was * (1 - 1e-3 * 0.5) ** 6, rtol=1e-4, atol=1e-6)


def test_weight_decay_shrinks_the_null_space_component_by_the_steps_since_the_last_time() -> None:
    """With gradients of zero only decay acts: W P goes down by (1 - lr wd)^steps, W (I - P) stays."""
    model, attached, optimizer, rows = build(weight_decay=0.5, refresh_every=4)
    step(model, attached, optimizer, rows, 0)
    before = {name: layer.exact().clone() for name, layer in attached.layers.items()}
    for layer in attached.layers.values():
        for moment in ("exp_avg", "exp_avg_sq"):
            optimizer.state[layer.coefficients][moment].zero_()
    already = list(optimizer.param_groups[0]["shrunk"])
    for _ in range(8):
        optimizer.begin(2, (2, 3))
        (row_losses(model, inputs(2)) * 0).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    left = optimizer.param_groups[0]["shrunk"]
    for place, (name, layer) in enumerate(attached.layers.items()):
        factor = (1 - 1e-2 * 0.5) ** 8 * math.exp(already[place] - left[place])
        project = optimizer.projectors[name]
        inside, was = project(layer.exact().t()), project(before[name].t())
        torch.testing.assert_close(inside, was * factor, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(layer.exact().t() - inside, before[name].t() - was, rtol=1e-4, atol=1e-6)
        assert factor < 0.99


def test_bf16_weights_stay_in_the_null_space_and_plain_rounding_would_not() -> None:
    model, attached, optimizer, rows = build(weight_decay=0.1)
    start = {name: layer.weight.detach().clone() for name, layer in attached.layers.items()}
    for name, layer in attached.layers.items():
        layer.narrow()
        assert layer.weight.dtype == torch.bfloat16
        assert torch.equal(layer.weight, start[name].bfloat16())
        torch.testing.assert_close(layer.exact(), start[name], rtol=2**-23, atol=0)
    for seed in range(30):
        with torch.autocast("cpu", torch.bfloat16):
            step(model, attached, optimizer, rows, seed)

    def leak(name: str, weight: Tensor) -> float:
        change, used = (weight - start[name]).double(), optimizer.projectors[name].basis.double()
        return float((change @ used).norm() / (change.norm() * used.norm()))

    assert max(leak(name, layer.exact()) for name, layer in attached.layers.items()) < 1e-6
    assert max(leak(name, layer.weight.float()) for name, layer in attached.layers.items()) > 1e-4
    exact = {name: layer.exact().clone() for name, layer in attached.layers.items()}
    for name, layer in attached.layers.items():
        layer.widen()
        assert torch.equal(layer.weight, exact[name])


def test_a_model_loaded_in_bf16_keeps_what_rounding_takes() -> None:
    attached = attach(llama().bfloat16(), PATTERN, rank=8)
    for layer in attached.layers.values():
        before = layer.exact().clone()
        assert torch.equal(before, layer.weight.float())
        layer.add(torch.full_like(before, 1e-7), 1.0)
        torch.testing.assert_close(layer.exact(), before + 1e-7, rtol=2**-23, atol=0)
        assert layer.coefficients.dtype == layer.basis.dtype == torch.float32

"""Every method trains through the one interface, resumes, and leaves a plain model that keeps its outputs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gemst.config import Config
from gemst.errors import GemstError
from gemst.tuning.chain import ChainBatches
from gemst.tuning.events import load_events
from gemst.tuning.methods import Facts, make
from gemst.tuning.model import ItemModel
from gemst.tuning.parallel import Processes
from gemst.tuning.subspace import matching
from tests.tuning.conftest import ITEMS, llama

METHODS = [
    {"method": "gems"}, {"method": "gems", "subspaces": "shared"}, {"method": "gems", "subspaces": "specific"},
    {"method": "full"},
    {"method": "lora"}, {"method": "lora", "adapter": "dora"}, {"method": "lora", "adapter": "osf"},
    {"fidelity": "paper"}, {"fidelity": "released"}, {"method": "galore"}, {"method": "pcgrad"},
    {"method": "upgrad"},
]  # fmt: skip


def build(tmp_path: Path, train, prompter, null_space: dict | None = None, **tuning):
    config = Config.model_validate(
        {"null_space": null_space or {"rule": "none"}, "tuning": {"rank": 8, "lr": 3e-3, "item_lr": 1e-2, **tuning}}
    )
    items = ItemModel(llama(20 + ITEMS), 20, (ITEMS,), False)
    batch = next(ChainBatches(load_events(train, prompter), prompter, chain_items=64, batch_tokens=512)(0))
    return items, make(config, items, tmp_path), batch


def steps(items, method, batch, count: int) -> list[float]:
    losses = []
    for _ in range(count):
        for _ in range(1 + method.needs_start):
            first = method.needs_start
            method.prepare(batch.targets, observe=True)
            method.enter(batch)
            each = items(batch)
            method.backward(each / len(each), batch)
            if first:
                method.start()
        method.merge()
        losses.append(float(each.mean().detach()))
        method.step(Facts(batch.targets, (1.0, 1.0)))
    return losses


@pytest.mark.parametrize("settings", METHODS, ids=lambda s: "-".join(s.values()))
def test_it_learns_and_leaves_a_plain_model(tmp_path: Path, train, prompter, settings) -> None:
    items, method, batch = build(tmp_path, train, prompter, **settings)
    kinds = [type(m).__name__ for m in llama(20 + ITEMS).modules()]
    before = {n: p.detach().clone() for n, p in items.model.named_parameters() if "norm" in n or "embed" in n}
    losses = steps(items, method, batch, 12)
    assert losses[-1] < losses[0] - 0.1
    with torch.no_grad():
        tuned = items(batch)
    method.finish()
    with torch.no_grad():
        torch.testing.assert_close(items(batch), tuned, atol=1e-4, rtol=1e-4)
    assert [type(m).__name__ for m in items.model.modules()] == kinds
    after = dict(items.model.named_parameters())
    assert before
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_surgery_changes_what_is_applied_only_under_conflict(tmp_path: Path, train, prompter) -> None:
    """With one task absent PCGrad is plain AdamW."""
    single = train.filter(task="recommendation")
    runs = []
    for name in ("full", "pcgrad"):
        items, method, batch = build(tmp_path, single, prompter, method=name)
        steps(items, method, batch, 3)
        runs.append(items.items_out.detach().clone())
    torch.testing.assert_close(*runs)


@pytest.mark.parametrize("name", ["pcgrad", "upgrad"])
def test_surgery_takes_the_conflict_out_of_a_step(tmp_path: Path, train, prompter, name: str) -> None:
    """Tasks that pull one weight in opposite directions: the step made of both is not the sum of theirs."""
    applied = []
    for method in ("full", name):
        items, surgery, batch = build(tmp_path, train, prompter, method=method)
        each = items(batch)
        rec = batch.targets[0]
        surgery.prepare(batch.targets, observe=False)
        surgery.backward(torch.cat([each[:rec], -0.5 * each[:rec]]) / len(each), batch)
        surgery.merge()
        applied.append(items.items_out.grad.detach().clone())
    assert float(applied[1].norm()) < 1e-3 * float(applied[0].norm())


def test_surgery_sees_tasks_that_come_in_batches_of_their_own(tmp_path: Path, train, prompter) -> None:
    """A step of a batch per task is the step of the batch that holds both."""
    merged = []
    for apart in (False, True):
        items, surgery, batch = build(tmp_path, train, prompter, method="pcgrad")
        rec, src = batch.targets
        assert rec
        assert src
        surgery.prepare(batch.targets, observe=False)
        for targets in [(rec, 0), (0, src)] if apart else [batch.targets]:
            each = items(batch)
            wanted = each[: targets[0]] if apart and targets[0] else each[rec:] if apart else each
            surgery.backward(wanted / len(each), replace(batch, targets=targets))
        surgery.merge()
        merged.append(torch.cat([p.grad.flatten() for p in surgery.parameters() if p.grad is not None]).clone())
    torch.testing.assert_close(*merged, atol=1e-6, rtol=1e-4)


def test_coupled_rows_take_one_process(tmp_path: Path, train, prompter, monkeypatch) -> None:
    _, method, batch = build(tmp_path, train, prompter)
    method.attached.route.coupled = True
    monkeypatch.setattr("gemst.tuning.methods.gems.world", lambda: 2)
    with pytest.raises(GemstError, match=r"a pass of its own.*without torchrun"):
        method.backward(torch.zeros(3), batch)


def test_what_left_the_null_space_is_not_settled_away_and_certified(tmp_path: Path, train, prompter, tokenizer) -> None:
    """A fault beside the optimizer, on a model whose updates are otherwise exact."""
    from gemst.tuning import null_space

    plain = llama(20 + ITEMS)
    config = Config()
    settings = config.null_space.model_copy(update={"tokens": 200, "sequence_length": 20})
    texts = ["the good old comedy , a bad new film . History : drama"] * 40
    null_space.build(plain, tokenizer, matching(plain, config.tuning.modules), texts, settings, tmp_path)
    items, method, batch = build(tmp_path, train, prompter, null_space={"tokens": 200, "sequence_length": 20})
    named = {name: layer.weight.detach().clone() for name, layer in method.attached.layers.items()}
    steps(items, method, batch, 5)
    assert max(method.certificate(named, method.weights()).values()) < 1e-5
    name, layer = next(iter(method.attached.layers.items()))
    layer.weight.data += 1e-3 * torch.randn(layer.weight.shape)
    with pytest.raises(GemstError, match=f"tuning has left the null space of {name}"):
        method.certificate(named, method.weights())


def test_the_loop_routes_every_batch_by_its_tasks(tmp_path: Path, train, prompter) -> None:
    """Rec columns must hold the gradient of rec rows alone, and src columns that of src rows."""
    from gemst.tuning.loop import _backward

    items, method, batch = build(tmp_path, train, prompter, precision="fp32")
    steps(items, method, batch, 1)
    tuning = Config.model_validate({"tuning": {"precision": "fp32"}}).tuning
    _backward(items, method, [batch], tuning, Processes(tuning), observe=False)
    joint = {name: layer.coefficients.grad.clone() for name, layer in method.attached.layers.items()}
    method.optimizer.zero_grad()
    method.enter(batch)
    each = items(batch)
    rec = batch.targets[0]
    assert 0 < rec < len(each)
    (each[:rec].sum() / rec).backward()
    for name, layer in method.attached.layers.items():
        columns, others = layer.widths.columns("rec"), layer.widths.columns("src")
        weight = method.attached.route.weights[0]
        torch.testing.assert_close(
            layer.coefficients.grad[:, columns] / weight, joint[name][:, columns], atol=1e-6, rtol=1e-4
        )
        assert joint[name][:, columns].any()
        assert joint[name][:, others].any()
        assert not layer.coefficients.grad[:, others].any()

"""The limit on forgetting: what it measures, when it looks, and that a run ends inside it."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from gemst.config import Config
from gemst.errors import GemstError
from gemst.evaluation.drift import drift
from gemst.tuning.chain import ChainBatches
from gemst.tuning.checkpoint import Checkpoints
from gemst.tuning.drift_limit import Brake, DriftLimit
from gemst.tuning.events import load_events
from gemst.tuning.loop import train as train_loop
from gemst.tuning.methods import make
from gemst.tuning.model import ItemModel
from gemst.tuning.parallel import Processes
from tests.tuning.conftest import ITEMS, gpt2, llama, make_tokenizer

TEXTS = ["the old film , a new good comedy . the bad drama , the new thriller : a film of the 1990s ."] * 6


def run(folder: Path, train, prompter, limit: float | None, method: str = "gems"):
    config = Config.model_validate({
        "null_space": {"rule": "none"},
        "tuning": {"method": method, "rank": 8, "refresh_every": 5, "epochs": 25, "precision": "fp32", "lr": 2e-2,
                   "item_lr": 1e-2, "chain_items": 6, "batch_tokens": 60, "patience": 99},
    })  # fmt: skip
    torch.manual_seed(0)
    items = ItemModel(llama(20 + ITEMS), 20, (ITEMS,), False)
    way = make(config, items, folder)
    processes = Processes(config.tuning)
    measured = DriftLimit(items, way, make_tokenizer(), TEXTS, limit or 1.0, processes)
    batches = ChainBatches(load_events(train, prompter), prompter, chain_items=6, batch_tokens=60)
    state = train_loop(
        items, way, batches, config.tuning, processes=processes, seed=0,
        validate=lambda: {"valid/joint": time.monotonic()}, log=lambda step, scalars: None,
        checkpoints=Checkpoints(folder / "c", "x"),
        drift=measured if limit else None,
    )  # fmt: skip
    return items, state, measured.measure()


def values(state, name: str) -> dict[int, float]:
    return {step: value for step, curve, value in state.curves if curve == name}


@pytest.mark.parametrize("method", ["gems", "full", "lora"])
def test_a_run_ends_inside_its_limit(tmp_path: Path, train, prompter, method: str) -> None:
    _, _, free = run(tmp_path / "a", train, prompter, None, method=method)
    limit = free / 10
    _, state, held = run(tmp_path / "b", train, prompter, limit, method=method)
    assert limit / 20 < held <= limit  # held back, not undone
    assert max(values(state, "drift/kl").values()) <= limit
    half = state.total // 2
    assert sum(value > 0 for value in values(state, "lr").values()) > 0.8 * state.total  # it never stands still
    assert values(state, "lr")[half] / 2e-2 < values(state, "lr_items")[half] / 1e-2  # item rows go on at full speed


@pytest.mark.parametrize("precision", ["fp32", "bf16-weights"])
def test_pulling_back_scales_the_change(tmp_path: Path, precision: str) -> None:
    config = Config.model_validate({"null_space": {"rule": "none"}, "tuning": {"rank": 8, "precision": precision}})
    items = ItemModel(llama(20 + ITEMS), 20, (ITEMS,), False)
    method = make(config, items, tmp_path)
    start = {name: tensor.clone() for name, tensor in method.weights().items()}
    layers = method.attached.layers.values()
    before = [layer.exact().clone() for layer in layers]
    for layer in layers:
        layer.add(torch.ones_like(layer.exact()) * 0.1, 1.0)
    method.pull(start, 0.25)
    for layer, old in zip(layers, before, strict=True):
        torch.testing.assert_close(layer.exact() - old, torch.full_like(old, 0.025), atol=1e-7, rtol=0)


@pytest.mark.parametrize(("family", "modules"), [(llama, "(gate|up)_proj$"), (llama, "q_proj$"), (gpt2, "c_attn$")])
def test_a_part_of_the_linears_may_be_bf16_halves(tmp_path: Path, family, modules: str) -> None:
    tuning = {"rank": 8, "precision": "bf16-weights", "modules": modules}
    config = Config.model_validate({"null_space": {"rule": "none"}, "tuning": tuning})
    model = family(20 + ITEMS)
    model.config.use_cache = False
    items = ItemModel(model, 20, (ITEMS,), False)
    way = make(config, items, tmp_path)
    measured = DriftLimit(items, way, make_tokenizer(), TEXTS, 1.0, Processes(config.tuning))
    assert measured.measure() == pytest.approx(0, abs=1e-9)
    for layer in way.attached.layers.values():
        layer.add(torch.randn_like(layer.exact()), 1.0)
    assert measured.measure() > 1e-6


def test_it_measures_what_the_evaluation_does(tmp_path: Path, train, prompter) -> None:
    items, _, held = run(tmp_path, train, prompter, None)
    before = llama(20 + ITEMS)
    items.fold()
    whole = drift(before, items.model, make_tokenizer(), TEXTS, 1024, 256)
    assert held == pytest.approx(whole["kl"], rel=1e-4)


def untuned(texts: list[str]) -> DriftLimit:
    config = Config.model_validate({"null_space": {"rule": "none"}, "tuning": {"rank": 8}})
    items = ItemModel(llama(20 + ITEMS), 20, (ITEMS,), False)
    return DriftLimit(items, make(config, items, Path()), make_tokenizer(), texts, 1.0, Processes(config.tuning))


def test_nothing_has_drifted_before_the_first_step() -> None:
    assert untuned(TEXTS).measure() == pytest.approx(0, abs=1e-9)


def test_text_that_holds_nothing_is_refused() -> None:
    with pytest.raises(GemstError, match="general text"):
        untuned([])


def test_checks_start_early_and_never_lie_far_apart() -> None:
    brake = Brake()
    checks = [step for step in range(1, 201) if brake.due(step, 200)]
    assert checks[0] == 4
    assert max(b - a for a, b in pairwise(checks)) <= 30
    assert len(checks) <= 12


@pytest.mark.parametrize(
    ("kl", "expected"),
    [(0.0, 1.0), (0.0007, 1.0), (0.01, 0.0), (0.02, 0.0)],
)
def test_the_factor_by_what_is_left(kl: float, expected: float) -> None:
    brake = Brake(path=10.0)
    brake.adjust(kl, 0.01, remaining=1000.0)
    assert brake.factor == pytest.approx(expected, abs=1e-6)


def test_a_run_on_course_is_left_alone_and_one_off_course_is_not() -> None:
    on, off = Brake(path=50.0), Brake(path=50.0)
    on.adjust(0.01 * 0.5**1.5 * 0.95**2, 0.01, remaining=50.0)  # r = (path / whole path) ** 0.75 exactly
    off.adjust(0.008, 0.01, remaining=50.0)
    assert on.factor == pytest.approx(1.0, abs=1e-6)
    assert 0 < off.factor < 0.3

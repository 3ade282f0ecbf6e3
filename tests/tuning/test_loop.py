"""The loop: it learns, it resumes exactly after a kill, it stops early, it keeps its time."""

from __future__ import annotations

import dataclasses
import itertools
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gemst.config import Config
from gemst.errors import GemstError
from gemst.tuning import _identity, loop
from gemst.tuning.chain import ChainBatches
from gemst.tuning.checkpoint import Checkpoints
from gemst.tuning.events import load_events
from gemst.tuning.loop import State, affordable, paced, rate, train, warming
from gemst.tuning.methods import make
from gemst.tuning.methods.fidelity import FidelityMethod
from gemst.tuning.model import ItemModel
from gemst.tuning.parallel import Processes
from tests.tuning.conftest import ITEMS, llama


class Killed(Exception):
    """Stands for kill -9: nothing after it runs."""


def run(folder: Path, train_frame, prompter, *, die_at: int | None = None, scores=None, validate=None, **tuning):
    defaults = {
        "rank": 8, "refresh_every": 5, "epochs": 8, "precision": "fp32", "lr": 1e-2, "item_lr": 1e-2,
        "checkpoint_every": 4,
        "validate_every": 6, "chain_items": 6, "batch_tokens": 60,
    }  # fmt: skip
    config = Config.model_validate({"null_space": {"rule": "none"}, "tuning": {**defaults, **tuning}})
    torch.manual_seed(0)
    items = ItemModel(llama(20 + ITEMS), 20, (ITEMS,), False)
    method = make(config, items, folder)
    batches = ChainBatches(load_events(train_frame, prompter), prompter, chain_items=6, batch_tokens=60)
    losses: list[float] = []
    queue = iter(scores or [])

    def log(step: int, scalars: dict[str, float]) -> None:
        if step > 0:  # the start is validated alone
            losses.append(scalars.get("train/loss_rec", float("nan")))
        if step == die_at:
            raise Killed

    state = train(
        items, method, batches, config.tuning, processes=Processes(config.tuning), seed=config.seed,
        validate=validate or (lambda: {"valid/joint": next(queue, time.monotonic())}), log=log,
        checkpoints=Checkpoints(folder / "c", "x"),
    )  # fmt: skip
    return items, state, losses


@pytest.mark.parametrize("method", ["gems", "full"])
def test_it_learns(tmp_path: Path, train, prompter, method: str) -> None:
    _, state, losses = run(tmp_path, train, prompter, method=method, epochs=15, scores=[i / 100 for i in range(1, 100)])
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    assert {name for _, name, _ in state.curves} >= {
        "train/loss_rec",
        "train/loss_src",
        "lr",
        "tokens_per_s",
        "valid/joint",
    }


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"accumulate": 2}, {"checkpointing": True}, {"precision": "bf16-weights"}, {"precision": "bf16-autocast"},
        {"method": "full"}, {"method": "lora"}, {"method": "galore"}, {"method": "pcgrad"}, {"method": "upgrad"},
        {"fidelity": "paper"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())) or "gems",
)  # fmt: skip
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, train, prompter, settings, monkeypatch) -> None:
    made, real = [0], ChainBatches.collate

    def collate(self: ChainBatches, rows):
        made[0] += 1
        return real(self, rows)

    monkeypatch.setattr(ChainBatches, "collate", collate)
    whole, state, losses = run(tmp_path / "a", train, prompter, **settings)
    all_of_it = made[0]
    with pytest.raises(Killed):
        run(tmp_path / "b", train, prompter, **settings, die_at=7)
    made[0] = 0
    resumed, again, told = run(tmp_path / "b", train, prompter, **settings)
    assert made[0] < all_of_it  # the steps before the kill were not made again
    assert told == losses  # but the new log has them all
    assert again.step == state.step
    assert torch.equal(resumed.items_out, whole.items_out)


def test_patience_stops_and_the_best_weights_are_kept(tmp_path: Path, train, prompter) -> None:
    items, state, _ = run(tmp_path, train, prompter, epochs=40, scores=[0.2, 0.5] + [0.1] * 50, patience=2)
    assert state.step == 18
    assert state.best == 0.5
    best, _, _ = run(tmp_path / "again", train, prompter, epochs=40, scores=[0.2, 0.5, 0.1, 0.1], patience=2)
    assert torch.equal(items.items_in, best.items_in)


def test_a_start_that_nothing_beats_is_kept(tmp_path: Path, train, prompter) -> None:
    items, state, losses = run(tmp_path, train, prompter, epochs=40, scores=[0.5] + [0.1] * 50, patience=2)
    assert (state.best_step, state.step, len(losses)) == (0, 12, 12)
    torch.manual_seed(0)
    untouched = ItemModel(llama(20 + ITEMS), 20, (ITEMS,), False)
    assert torch.equal(items.items_in, untouched.items_in)
    assert [value for step, name, value in state.curves if (step, name) == (0, "valid/joint")] == [0.5]


@pytest.mark.parametrize("method", ["gems", "full", "lora"])
def test_a_pass_that_is_no_number_is_skipped(tmp_path, train, prompter, method, monkeypatch) -> None:
    passes, real = [0], ItemModel.forward

    def forward(self: ItemModel, batch):
        losses = real(self, batch)
        passes[0] += torch.is_grad_enabled()
        return losses * float("nan") if passes[0] in (1, 6) else losses

    monkeypatch.setattr(ItemModel, "forward", forward)
    items, state, losses = run(tmp_path, train, prompter, method=method, scores=[i / 100 for i in range(1, 100)])
    assert state.skipped == 2  # of gems the pass that gives bases: the step's own takes its place
    assert state.curves[-1][0] == state.step
    assert all(parameter.isfinite().all() for parameter in items.parameters())
    assert losses[-1] < losses[1]
    assert ("steps/skipped", float(state.skipped)) in {(name, value) for _, name, value in state.curves}


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_linear_whose_gradient_is_no_number_is_skipped_though_nothing_clips_it(
    tmp_path, train, prompter, number, monkeypatch
) -> None:
    passes, real = [0], FidelityMethod.backward

    def backward(self: FidelityMethod, losses, batch) -> None:
        real(self, losses, batch)
        passes[0] += 1
        if passes[0] == 3:
            next(iter(self.optimizer.gradients.values()))[0, 1, 2] = number

    monkeypatch.setattr(FidelityMethod, "backward", backward)
    items, state, _ = run(tmp_path, train, prompter, fidelity="paper", epochs=3, scores=[i / 100 for i in range(1, 99)])
    assert state.skipped == 1
    assert all(parameter.isfinite().all() for parameter in items.parameters())


def test_a_step_of_one_task_logs_no_angle_between_two(tmp_path, train, prompter) -> None:
    for table, angle in ((train, True), (train.filter(task="search"), False)):
        folder = tmp_path / str(angle)
        _, state, _ = run(folder, table, prompter, scores=[i / 100 for i in range(1, 100)])
        assert ("cosine/rec_src" in {name for _, name, _ in state.curves}) == angle


def test_a_process_that_does_not_see_the_best_weights_says_so(tmp_path, train, prompter) -> None:
    items = ItemModel(llama(20 + ITEMS), 20, (ITEMS,), False)
    method = make(Config.model_validate({"null_space": {"rule": "none"}, "tuning": {"rank": 8}}), items, tmp_path)
    checkpoints = Checkpoints(tmp_path / "c", "x")
    checkpoints.keep_best(State(), items, method)
    checkpoints.restore_best(State(best_step=0), items, method)
    with pytest.raises(GemstError, match=r"process 0 does not see .*best-00000007.*shared project folder"):
        checkpoints.restore_best(State(best_step=7), items, method)


def test_a_run_without_usable_gradients_ends(tmp_path, train, prompter, monkeypatch) -> None:
    monkeypatch.setattr(ItemModel, "forward", lambda self, batch: self.target_losses(batch) * float("inf"))
    with pytest.raises(GemstError, match=r"last 20 steps were NaN or infinite.*Lower tuning.lr"):
        run(tmp_path, train, prompter, method="full", epochs=100, scores=[0.1] * 100)


def test_a_step_without_a_task_logs_no_loss_of_it(tmp_path, train, prompter) -> None:
    _, state, _ = run(tmp_path, train.filter(task="recommendation"), prompter, scores=[i / 100 for i in range(1, 100)])
    names = {name for _, name, _ in state.curves}
    assert "train/loss_rec" in names
    assert "train/loss_src" not in names


def test_schedule_warms_up_and_ends_near_zero() -> None:
    tuning = Config().tuning
    factors = [rate(tuning, step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.2)
    assert max(factors) == 1.0
    assert factors[-1] < 0.01
    assert factors[:5] == sorted(factors[:5])
    assert factors[5:] == sorted(factors[5:], reverse=True)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_a_schedule_that_nothing_cuts_has_its_own_factors_to_the_bit(schedule: str) -> None:
    for total, warmup in itertools.product((1, 7, 49, 60, 977, 3000), (0.0, 0.05, 0.3, 1.0)):
        tuning = Config.model_validate({"tuning": {"schedule": schedule, "warmup": warmup}}).tuning
        state = State(total=total)
        for state.step in range(total):
            state.factor = paced(tuning, state)
            assert state.factor == rate(tuning, state.step, total)


@pytest.mark.parametrize(("total", "cut"), [(1000, 300), (2000, 200), (3000, 21)])
def test_a_schedule_that_is_cut_in_its_warm_up_goes_on_warming_up(total: int, cut: int) -> None:
    tuning = Config().tuning
    state, factors = State(total=total), []
    for state.step in range(cut):
        state.total = total if state.step < 20 else cut
        state.factor = paced(tuning, state)
        factors.append(state.factor)
    steepest = 1.001 / warming(tuning, cut)
    assert all(after - before <= steepest for before, after in itertools.pairwise(factors))
    assert factors[-1] <= rate(tuning, cut - 1, cut) < 0.01 or cut == 21


def test_a_time_limit_shortens_the_schedule(tmp_path: Path, train, prompter) -> None:
    _, state, _ = run(
        tmp_path, train, prompter, epochs=4000, max_minutes=0.03, scores=[0.1 + i / 1e4 for i in range(3000)]
    )
    assert 5 < state.step < 3000
    assert state.step == state.total


def test_slow_steps_do_not_outrun_a_time_limit(tmp_path: Path, train, prompter, monkeypatch) -> None:
    """A clock by which every step takes a second: five of a limit of ten seconds are enough to see where that leads."""
    clock = itertools.count(step=0.25)  # it is read about four times a step
    monkeypatch.setattr(loop.time, "perf_counter", lambda: float(next(clock)))
    _, state, _ = run(tmp_path, train, prompter, epochs=400, max_minutes=1 / 6, scores=[0.1] * 99, patience=99)
    assert 6 < state.step < 14
    assert state.step == state.total


class Clock:
    """Stands for `perf_counter`: it goes on when told."""

    def __init__(self, patch: pytest.MonkeyPatch, step: float) -> None:
        self.now, real = 0.0, loop._backward

        def backward(*given, **named):
            self.now += step
            return real(*given, **named)

        patch.setattr(loop.time, "perf_counter", lambda: self.now)
        patch.setattr(loop, "_backward", backward)

    def validated(self, seconds: float) -> dict[str, float]:
        self.now += seconds
        return {"valid/joint": self.now}


@pytest.mark.parametrize("every", [12, 1000])
def test_a_time_limit_keeps_time_for_the_last_validation(tmp_path, train, prompter, monkeypatch, every) -> None:
    """Steps of a second, validations of thirty: three minutes are enough for both, and are not outrun."""
    clock = Clock(monkeypatch, 1.0)
    _, state, _ = run(
        tmp_path, train, prompter, epochs=400, max_minutes=3, method="full", validate_every=every, patience=99,
        validate=lambda: clock.validated(30.0),
    )  # fmt: skip
    assert state.validating == 30
    assert 180 - 31 < clock.now <= 180 if every == 1000 else state.step == 36  # one more would be 187 s


def test_a_resumed_run_looks_at_its_clock_as_early_as_a_new_one(tmp_path, train, prompter, monkeypatch) -> None:
    """Taken up at step 24, steps take ten times as long: at step 40 alone it would be late."""
    clock = Clock(monkeypatch, 1.0)
    given = {"epochs": 400, "max_minutes": 3, "method": "full", "validate_every": 1000}
    with pytest.raises(Killed):
        run(tmp_path, train, prompter, die_at=25, validate=lambda: clock.validated(1.0), **given)
    slow = Clock(monkeypatch, 10.0)
    _, state, _ = run(tmp_path, train, prompter, validate=lambda: slow.validated(1.0), **given)
    assert state.seconds <= 180


def test_a_step_of_more_batches_than_all_epochs_have_is_refused(tmp_path: Path, train, prompter) -> None:
    with pytest.raises(
        GemstError, match=r"tuning\.accumulate = 500 batches is more than all of tuning\.epochs.*Set .* to \d+ or"
    ):
        run(tmp_path, train, prompter, epochs=1, accumulate=500)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_token_budget_is_the_schedules_end(tmp_path: Path, train, prompter, accumulate: int) -> None:
    """The last step is the last one inside the budget, and the learning rate has come down to its end by then."""
    _, whole, _ = run(tmp_path / "a", train, prompter, accumulate=accumulate)
    budget = whole.tokens // 2
    _, state, _ = run(tmp_path / "b", train, prompter, accumulate=accumulate, max_tokens=budget, epochs=1000)
    per_step = whole.tokens / whole.step
    assert budget - 2 * per_step < state.tokens <= budget
    assert state.step == state.total
    rates = [value for _, name, value in state.curves if name == "lr"]
    assert rates[-1] < 0.3 * max(rates)
    _, limited, _ = run(tmp_path / "c", train, prompter, accumulate=accumulate, max_tokens=10 * whole.tokens)
    assert limited.total == whole.total
    _, one, _ = run(tmp_path / "d", train, prompter, accumulate=accumulate, max_tokens=1)
    assert one.step == 1


@pytest.mark.parametrize(
    ("step", "seconds", "per_step", "total"),
    [(20, 40.0, 2.0, 200), (20, 40.0, 4.0, 110), (100, 390.0, 4.0, 102), (150, 500.0, 4.0, 151)],
)
def test_a_schedule_is_shortened_to_what_the_limit_affords(step, seconds, per_step, total) -> None:
    """400 s and 200 steps: enough at 2 s a step, cut at 4 s; out of time, one more step ends the run."""
    assert affordable(State(step=step, seconds=seconds, total=200), 400.0, per_step, 999) == total
    assert affordable(State(step=step, seconds=seconds - 8, total=200, validating=8.0), 400.0, per_step, 999) == total
    halfway = State(
        step=100, seconds=300.0, total=200, validating=8.0
    )  # 8 s at the end, at 110 and, still to come, now
    assert affordable(halfway, 400.0, 4.0, 10) == 119


def test_a_checkpoint_of_another_run_is_not_resumed(tmp_path: Path, train, prompter) -> None:
    with pytest.raises(Killed):
        run(tmp_path, train, prompter, die_at=7)
    config = Config.model_validate({"null_space": {"rule": "none"}, "tuning": {"rank": 8}})
    items = ItemModel(llama(20 + ITEMS), 20, (ITEMS,), False)
    assert Checkpoints(tmp_path / "c", "another").resume(items, make(config, items, tmp_path)) is None


def test_a_checkpoint_of_another_gemst_is_not_resumed(tmp_path: Path, train, prompter, monkeypatch) -> None:
    """Its state has a field that this one's lacks."""
    other = dataclasses.make_dataclass("State", [("unheard_of", int, 0)], bases=(State,))
    with pytest.raises(Killed), monkeypatch.context() as patch:
        patch.setattr(loop, "State", other)
        run(tmp_path, train, prompter, die_at=7)
    _, state, losses = run(tmp_path, train, prompter, scores=[0.1] * 99)
    assert len(losses) == state.step


def test_what_a_run_is_made_of_includes_the_text_its_drift_is_limited_on(train) -> None:
    ids = SimpleNamespace(item_id=["i1"])
    one, again, other = (
        _identity(Config(), [train], ids, "backbone", ["a text", more]) for more in ("more", "more", "changed")
    )
    assert one == again != other

"""The training loop: one readable recipe for every method, model family, precision and number of processes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch

from gemst.config import Tuning
from gemst.errors import GemstError
from gemst.progress import Progress
from gemst.tuning.batches import Batch, Batches
from gemst.tuning.checkpoint import Checkpoints
from gemst.tuning.drift_limit import Brake, DriftLimit
from gemst.tuning.methods import Facts, Method
from gemst.tuning.model import ItemModel
from gemst.tuning.parallel import Processes, whole
from gemst.tuning.precision import autocast

_OBSERVE_EVERY = 20
_TIMED_STEPS = 20  # how often a time limit looks at the clock
_SLOW_STEPS = 5  # of a process, at its start: they do not count for what a step takes
_HOPELESS = 20  # steps in a row without usable gradients that end a run


@dataclass
class State:
    """Where a run stands: all of it goes into a checkpoint."""

    step: int = 0
    epoch: int = 0
    batch: int = 0  # batches of the epoch already used
    total: int = 0  # steps of the schedule
    factor: float = 0.0  # the schedule's, of the last step
    best: float = -math.inf
    best_step: int | None = None
    stale: int = 0  # validations since the best
    seconds: float = 0.0
    tokens: int = 0  # of all steps, padding left out
    stepping: float = 0.0  # seconds in steps alone: no validation, no checkpoint
    validating: float = 0.0  # seconds of the longest validation: a run ends with one
    brake: Brake = field(default_factory=Brake)
    skipped: int = 0  # steps whose gradients were NaN or infinite
    in_a_row: int = 0  # of those, the last ones without one between
    curves: list[tuple[int, str, float]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)


def warming(tuning: Tuning, total: int) -> int:
    """Steps of the warm-up."""
    return max(1, round(tuning.warmup * total))


def rate(tuning: Tuning, step: int, total: int) -> float:
    """Learning-rate factor of a step: linear warm-up, then cosine, linear or constant."""
    warm = warming(tuning, total)
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, total - warm)
    return {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[tuning.schedule]


def paced(tuning: Tuning, state: State) -> float:
    """`rate` of the next step, but no steeper than a warm-up: where a time limit cuts the schedule, `rate` jumps.

    The hair above one step of the warm-up keeps its rounding from being taken for a jump.
    """
    steepest = (1 + 1e-9) / warming(tuning, state.total)
    return min(rate(tuning, state.step, state.total), state.factor + steepest)


def schedule(batches: Batches, tuning: Tuning) -> int:
    """Steps of the run: those of `tuning.epochs`, or as many of them as fit into `tuning.max_tokens`; at least one.

    Raises GemstError when a step takes more batches than all epochs have.
    """
    wanted = tuning.epochs * batches.steps_per_epoch(tuning.accumulate)
    if wanted < 0.5 and tuning.accumulate > 1:
        raise GemstError(
            f"one step of tuning.accumulate = {tuning.accumulate} batches is more than all of tuning.epochs",
            f"Set tuning.accumulate to {max(1, int(tuning.accumulate * wanted))} or less",
        )
    steps = max(1, round(wanted))
    if tuning.max_tokens is None:
        return steps
    spent = 0
    for step, micro in enumerate(_stream(batches, State(), tuning.accumulate)):
        spent += sum(batches.tokens(rows) for rows in micro)
        if spent > tuning.max_tokens or step == steps:
            return max(step, 1)
    raise AssertionError("batches never end")


def _looks(state: State, begun: int, minutes: float, processes: Processes) -> bool:
    """Whether a time limit looks at the clock now: every so many steps, and at slow ones once half of it is gone.

    `begun` is the step that this process took the run up at: the first ones after it are slower than the rest.
    """
    if state.step <= begun + _SLOW_STEPS:
        return False
    slow = state.step < begun + _TIMED_STEPS and processes.agreed(state.seconds) > 30 * minutes
    return slow or state.step % _TIMED_STEPS == 0


def affordable(state: State, limit: float, per_step: float, every: int) -> int:
    """Steps of the schedule that fit into `limit` seconds, with a validation `every` so many and after the last.

    The schedule is only ever shortened, and never below the next step.
    """
    total, left = state.step, limit - state.seconds - state.validating
    while total < state.total:
        left -= per_step + (state.validating if total % every == 0 else 0.0)  # a validation comes before the step
        if left < 0:
            break
        total += 1
    return min(state.total, max(total, state.step + 1))


def train(
    items: ItemModel,
    method: Method,
    batches: Batches,
    tuning: Tuning,
    *,
    processes: Processes,
    seed: int,
    validate: Callable[[], dict[str, float]],
    log: Callable[[int, dict[str, float]], None],
    checkpoints: Checkpoints,
    drift: DriftLimit | None = None,
) -> State:
    """Run the schedule to its end, its time limit or its patience; the model is left at its best validation.

    Every process of a run calls it and gets the same state; `log` is called on all of them, with the same scalars.
    `drift` holds the backbone's weights (not the item rows) back where they forget too much.
    """
    model = processes.wrap(items)
    state = checkpoints.resume(items, method) or State(total=schedule(batches, tuning))
    peaks = [tuning.lr, tuning.item_lr]
    stream = _stream(batches, state, tuning.accumulate)
    began, timed = time.perf_counter() - state.seconds, 0.0
    begun = state.step
    for step, at_once in groupby(state.curves, key=lambda point: point[0]):  # of a resumed run: this log is a new one
        log(step, {name: value for _, name, value in at_once})
    if state.best_step is None:  # what tuning starts from is the first thing to beat
        started = time.perf_counter()
        scores = validate()
        _judge(state, scores["valid/joint"], checkpoints, items, method)
        state.validating = time.perf_counter() - started
        state.curves += [(0, name, value) for name, value in scores.items()]
        log(0, scores)
    items.train()
    with Progress("tuning", total=state.total, done=state.step, shown=processes.first) as progress:
        while state.step < state.total:
            # Dropout and the like depend on the step alone: a resumed run needs no generator's state for them.
            torch.manual_seed(hash((seed, state.step, processes.rank)))
            micro = [_share(batches, rows, processes) for rows in next(stream)]
            if method.needs_start:
                _backward(model, method, micro, tuning, processes, observe=False)
                method.start()
            if state.step == begun + _SLOW_STEPS:
                timed = time.perf_counter()
            started = time.perf_counter()
            observe = state.step % _OBSERVE_EVERY == 0
            factor = state.factor = paced(tuning, state)
            speeds = (factor * state.brake.factor, factor)
            for group, peak, speed in zip(method.optimizer.param_groups, peaks, speeds, strict=True):
                group["lr"] = peak * speed
            facts, tokens = _backward(model, method, micro, tuning, processes, observe)
            method.merge()
            norm = whole(torch.nn.utils.get_total_norm([p.grad for p in method.parameters() if p.grad is not None]))
            usable, born = math.isfinite(float(norm)) and method.finite(), not method.needs_start
            if usable:
                torch.nn.utils.clip_grads_with_norm_(method.parameters(), tuning.clip, norm)
                method.step(facts)
            else:
                method.skip()
            _count(state, usable and born)  # a pass that had to be taken for the start's updates nothing
            state.step += 1
            state.brake.path += speeds[0]
            state.tokens += tokens
            spent = time.perf_counter() - started
            state.stepping += spent
            state.seconds = time.perf_counter() - began
            rec, src = (loss if count else math.nan for loss, count in zip(facts.losses, facts.targets, strict=True))
            scalars = {
                "train/loss_rec": rec, "train/loss_src": src, "steps/skipped": float(state.skipped),
                "train/gradient_norm": float(norm), "lr": peaks[0] * speeds[0], "lr_items": peaks[1] * factor,
                "tokens_per_s": tokens / spent,
            }  # fmt: skip
            if observe:
                observed, rows = method.observations()
                scalars |= observed
                state.layers += [{"step": state.step, **row} for row in rows]
            if tuning.max_minutes is not None and _looks(state, begun, tuning.max_minutes, processes):
                per_step = (time.perf_counter() - timed) / (state.step - begun - _SLOW_STEPS)
                state.total = processes.agreed(
                    affordable(state, 60 * tuning.max_minutes, per_step, tuning.validate_every)
                )
                progress.total = state.total
            judged, started = state.step % tuning.validate_every == 0 or state.step == state.total, time.perf_counter()
            if judged:
                method.catch_up()
            if drift is not None and (state.brake.due(state.step, state.total) or judged):
                scalars["drift/kl"] = kl = drift.keep()
                left = sum(rate(tuning, step, state.total) for step in range(state.step, state.total))
                state.brake.adjust(kl, drift.limit, left)
            if judged:
                scalars |= (scores := validate())
                items.train()
                _judge(state, scores["valid/joint"], checkpoints, items, method)
                took = time.perf_counter() - started
                state.validating, timed = max(state.validating, took), timed + took
            scalars = {name: value for name, value in scalars.items() if math.isfinite(value)}  # no task, no loss
            state.curves += [(state.step, name, value) for name, value in scalars.items()]
            log(state.step, scalars)
            told = " ".join(f"{task} {loss:.3f}" for task, loss in (("rec", rec), ("src", src)) if math.isfinite(loss))
            progress.advance(f"loss {told}, {tokens / spent:.0f} tokens/s")
            if state.stale >= tuning.patience:
                break
            if state.step % tuning.checkpoint_every == 0 and state.step < state.total:
                checkpoints.save(state, items, method)
    checkpoints.restore_best(state, items, method)
    return state


def _count(state: State, usable: bool) -> None:
    """Count a step that was skipped. Raises GemstError when there have been only such ones for a while."""
    state.in_a_row = 0 if usable else state.in_a_row + 1
    state.skipped += not usable
    if state.in_a_row == _HOPELESS:
        raise GemstError(
            f"the gradients of the last {_HOPELESS} steps were NaN or infinite",
            "Lower tuning.lr and tuning.item_lr, or set tuning.precision: fp32",
        )


def _judge(state: State, score: float, checkpoints: Checkpoints, items: ItemModel, method: Method) -> None:
    """Keep the weights of the best validation; count those that were not better."""
    if score > state.best:
        state.best, state.best_step, state.stale = score, state.step, 0
        checkpoints.keep_best(state, items, method)
    else:
        state.stale += 1


def _backward(
    model: torch.nn.Module, method: Method, micro: list[Batch], tuning: Tuning, processes: Processes, observe: bool
) -> tuple[Facts, int]:
    """Gradients of the mean loss over all targets of the step's batches, on all processes; what the step was made of.

    `micro` holds this process's rows. Gradients are averaged over the processes, so the losses of each are divided by
    an equal part of the step's targets.
    """
    mine = [sum(b.targets[0] for b in micro), sum(b.targets[1] for b in micro), sum(b.tokens for b in micro)]
    rec, src, tokens = map(int, processes.totals(mine))
    method.prepare((rec, src), observe)
    sums = torch.zeros(2)
    for number, batch in enumerate(micro):
        method.enter(batch)
        with processes.reducing(model, last=number == len(micro) - 1):
            with autocast(tuning.precision, processes.device):
                losses = model(batch)
            method.backward(losses / ((rec + src) / processes.count), batch)
        by_row = losses.detach().float()
        sums += torch.stack([by_row[: batch.targets[0]].sum(), by_row[batch.targets[0] :].sum()]).cpu()
    both = processes.totals(sums.tolist())
    return Facts((rec, src), (both[0] / max(rec, 1), both[1] / max(src, 1))), tokens


def _share(batches: Batches, rows: Any, processes: Processes) -> Batch:
    """This process's part of a batch; without a row of its own it takes part with one that has no target."""
    share = processes.shares(rows)[processes.rank]
    batch = batches.collate(rows[:1]).silent() if share is None else batches.collate(share)
    return batch.to(processes.device)


def _stream(batches: Batches, state: State, accumulate: int) -> Iterator[list[Any]]:
    """Endless steps: the rows of each one's batches. Goes on where `state` stands, and keeps it up to date."""
    micro: list[Any] = []
    while True:
        for rows in batches.plan(state.epoch)[state.batch :]:
            micro.append(rows)
            state.batch += 1
            if len(micro) == accumulate:
                yield micro
                micro = []
        state.epoch, state.batch = state.epoch + 1, 0

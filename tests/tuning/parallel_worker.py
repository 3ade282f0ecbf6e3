"""Small tuning runs that one process or several can make; as a script, one of the several processes.

    torchrun --nproc-per-node 2 tests/tuning/parallel_worker.py FOLDER

runs every scenario and leaves FOLDER/<scenario>.pt, written by process 0; then some of them again, broken off and gone
on with (FOLDER/<scenario>-resumed.pt; FOLDER/left holds the checkpoints the broken ones left).
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from gemst.config import Config
from gemst.tuning.batches import Batches
from gemst.tuning.chain import ChainBatches
from gemst.tuning.checkpoint import Checkpoints, tensors
from gemst.tuning.events import load_events
from gemst.tuning.loop import train
from gemst.tuning.methods import make
from gemst.tuning.model import ItemModel
from gemst.tuning.parallel import Processes, on_first
from gemst.tuning.single import SingleBatches
from tests.tuning.conftest import ITEMS, gpt2, llama, make_prompter, make_tokenizer, make_train, t5

FAMILIES = {"llama": llama, "t5": t5, "gpt2": gpt2}
LEARNED = {"gates": {"kind": "learned"}, "weight_decay": 0.1}
SCENARIOS: dict[str, dict[str, Any]] = {
    "ddp-llama-chain": {"family": "llama"},
    "ddp-llama-accumulate": {"family": "llama", "accumulate": 2, "rank": 4, **LEARNED},
    "ddp-t5-single": {"family": "t5", "levels": (6, 2), "rank": 2},
    "ddp-llama-more-processes-than-rows": {"family": "llama", "batch_tokens": 30, "rows": 1},
    "fsdp-llama-chain": {"family": "llama", "distributed": "fsdp", **LEARNED},
    "fsdp-t5-single": {"family": "t5", "levels": (6, 2), "rank": 2, "distributed": "fsdp"},
    "fsdp-gpt2-single": {"family": "gpt2", "rank": 4, "distributed": "fsdp"},
    "fsdp-full": {"family": "llama", "method": "full", "lr": 1e-3, "distributed": "fsdp"},
}


RESUMED = ("ddp-llama-accumulate", "fsdp-llama-chain")


class Broken(Exception):
    """Stands for the end of all processes."""


class OneRow(Batches):
    """The batches of another layout, a row each."""

    def __init__(self, inner: Batches) -> None:
        self.inner = inner

    def plan(self, epoch: int) -> list[Any]:
        return [rows[at : at + 1] for rows in self.inner.plan(epoch) for at in range(len(rows))]

    def collate(self, rows: Any) -> Any:
        return self.inner.collate(rows)

    def tokens(self, rows: Any) -> int:
        return self.inner.tokens(rows)


def run(name: str, folder: Path, steps: int = 20, break_at: int | None = None) -> dict[str, Any]:
    """One scenario: the loss of every step, everything training changed, what the optimizer holds."""
    settings = {"rank": 8, "refresh_every": 5, "precision": "fp32", "lr": 3e-3, "item_lr": 3e-3, "batch_tokens": 240,
                "validate_every": 7, "checkpoint_every": 6, **SCENARIOS[name]}  # fmt: skip
    family, rows, levels = (settings.pop(key, None) for key in ("family", "rows", "levels"))
    levels = levels or (ITEMS,)
    config = Config.model_validate({"null_space": {"rule": "none"}, "tuning": settings})
    model = FAMILIES[family](20 + sum(levels))
    prompter, examples = make_prompter(make_tokenizer(), levels), make_train(users=8)
    batches: Batches
    if family == "llama":
        batches = ChainBatches(load_events(examples, prompter), prompter, chain_items=6,
                               batch_tokens=config.tuning.batch_tokens)  # fmt: skip
    else:
        batches = SingleBatches(examples, prompter, batch_tokens=config.tuning.batch_tokens * 8,
                                decoder_start=0 if family == "t5" else None, seed=0)  # fmt: skip
    if rows:
        batches = OneRow(batches)
    tuning = config.tuning.model_copy(update={"epochs": steps / batches.steps_per_epoch(config.tuning.accumulate)})
    losses: list[tuple[float, ...]] = []

    def log(step: int, scalars: dict[str, float]) -> None:
        if step == 0:  # the start is validated alone
            return
        names = ("train/loss_rec", "train/loss_src", "train/gradient_norm")
        losses.append(tuple(scalars.get(name, 0.0) for name in names))  # a step may lack a task
        if step == break_at:
            raise Broken

    processes = Processes(tuning)
    items = ItemModel(model, 20, levels, False)
    method = make(config, items, folder, processes.shard)
    scores = iter(range(1 if (folder / name).exists() else 0, 100))  # a resumed run has validated its start
    state = train(
        items, method, batches, tuning, processes=processes, seed=0, log=log,
        validate=lambda: {"valid/joint": float(next(scores))}, checkpoints=Checkpoints(folder / name, "x"),
    )  # fmt: skip
    held = sum(
        value.to_local().numel() if hasattr(value, "to_local") else value.numel()
        for parameter in method.parameters()
        for key, value in method.optimizer.state[parameter].items()
        if key in ("exp_avg", "exp_avg_sq")
    )
    return {"losses": losses, "weights": on_first(tensors(items, method)), "step": state.step, "moments": held,
            "curves": [point for point in state.curves if point[1] != "tokens_per_s"]}  # fmt: skip


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    first = Processes(Config().tuning).first
    for name in SCENARIOS:
        found = run(name, folder)
        if first:
            torch.save(found, folder / f"{name}.pt")
    for name in RESUMED:
        with contextlib.suppress(Broken):
            run(name, folder / "again", break_at=9)
        if first:
            shutil.copytree(folder / "again" / name, folder / "left" / name)
        found = run(name, folder / "again")
        if first:
            torch.save(found, folder / f"{name}-resumed.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Tuning: from a backbone, item IDs and examples to a plain checkpoint."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import polars as pl
    from torch import Tensor

    from gemst.backbone import Tuned
    from gemst.config import Config
    from gemst.item_ids import ItemIds
    from gemst.memory.evidence import Fit
    from gemst.tuning.methods import Method
    from gemst.tuning.parallel import Processes


@dataclass(frozen=True)
class Outcome:
    """What tuning left behind, beside the files it wrote."""

    steps: int
    epochs: float
    tokens: int
    seconds: float
    seconds_per_step: float  # validation and checkpoints left out
    best: float  # harmonic mean of both validation NDCG@10
    largest_leak: float | None
    skipped: int  # steps whose gradients were no numbers
    memory: tuple[Fit, ...] = ()

    def record(self) -> dict[str, Any]:
        """What run.json says of it."""
        return {
            "steps": self.steps, "epochs": round(self.epochs, 3), "tokens": self.tokens,
            "seconds": round(self.seconds, 1), "seconds_per_step": round(self.seconds_per_step, 3),
            "best_valid_joint": self.best, "largest_leak": self.largest_leak, "skipped": self.skipped,
            "memory": [asdict(fit) for fit in self.memory],
        }  # fmt: skip

    def notes(self) -> list[str]:
        """What the stage's summary says of it."""
        told = [f"{self.epochs:.2f} epochs, best validation NDCG@10 {self.best:.4f} (harmonic mean)"]
        told += [
            f"memory, {fit.case}: validation NDCG@10 {fit.before:.4f} without it, {fit.after:.4f} with it "
            f"({fit.examples} examples)"
            for fit in self.memory
        ]
        if self.largest_leak is not None:
            told.append(f"largest leak out of the null space {self.largest_leak:.1e}")
        if self.skipped:
            told.append(f"{self.skipped} steps skipped: their gradients were NaN or infinite")
        return told


def run(
    config: Config,
    ids: ItemIds,
    items: pl.DataFrame,
    train: pl.DataFrame,
    valid: pl.DataFrame,
    general: list[str],
    *,
    null_space: Path,
    item_ids: Path,
    item_rows: Path,
    model_folder: Path,
    tuning_folder: Path,
    processes: Processes,
    log: Callable[[int, dict[str, float]], None],
) -> Outcome:
    """Tune `config.backbone` and write the model and the curves.

    `general` is the text that `tuning.drift_limit` is kept on; `null_space`, `item_ids` and `item_rows` are the folders
    of those stages; `log` is called with every step's scalars. Writes `model_folder` (a plain transformers checkpoint,
    the IDs, the memory and gemst.json) and curves.parquet, diagnostics.parquet in `tuning_folder`. Every process of a
    run calls it; process 0 alone logs and writes. Raises GemstError when an input does not fit the backbone.
    """
    import polars as pl
    import torch

    from gemst import backbone
    from gemst.prompts import make_prompter
    from gemst.tuning import methods
    from gemst.tuning.alignment import with_alignment
    from gemst.tuning.batches import make_batches
    from gemst.tuning.chain import ChainBatches
    from gemst.tuning.checkpoint import Checkpoints, tensors
    from gemst.tuning.drift_limit import DriftLimit
    from gemst.tuning.item_rows import load as load_rows
    from gemst.tuning.loop import train as train_loop
    from gemst.tuning.model import ItemModel
    from gemst.tuning.norm import freeze_norms, thaw_norms
    from gemst.tuning.null_space import fingerprint
    from gemst.tuning.parallel import on_first
    from gemst.tuning.precision import autocast
    from gemst.tuning.remember import remember
    from gemst.tuning.validation import Validation

    torch.manual_seed(config.seed)
    backbone.set_threads(config)
    model, tokenizer = backbone.load(config.backbone)
    untuned = fingerprint(model)
    inputs, outputs, white = load_rows(item_rows, ids, untuned)
    first = backbone.add_item_tokens(model, tokenizer, ids.tokens, inputs, outputs)
    if config.tuning.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    backbone.settle(model, processes.device)
    prompter = make_prompter(config, model, tokenizer, ids, first)
    examples = with_alignment(train, items, ids, config.tuning.alignment, config.seed)
    batches = make_batches(config, examples, prompter, backbone.decoder_start(model))
    item_model = ItemModel(model, first, ids.level_sizes, config.tuning.loss == "vocabulary", white)
    if isinstance(batches, ChainBatches):
        item_model.check_packed(batches.longest_prompt())  # now, not at the batch that holds it
    norms = freeze_norms(model)
    method = methods.make(config, item_model, null_space, processes.shard)
    tuned = backbone.Tuned(model, tokenizer, ids, first, prompter)
    validation = Validation(config, item_model, tuned, train, valid, processes)
    checkpoints = Checkpoints(
        tuning_folder.with_name(f".{tuning_folder.name}.checkpoints"),
        _identity(config, [train, valid, items], ids, untuned, general, null_space, item_rows),
    )
    limit = config.tuning.drift_limit
    drift = None if limit is None else DriftLimit(item_model, method, tokenizer, general, limit, processes)
    state = train_loop(
        item_model, method, batches, config.tuning,
        processes=processes, seed=config.seed, validate=validation, log=log, checkpoints=checkpoints, drift=drift,
    )  # fmt: skip
    epochs = state.step / batches.steps_per_epoch(config.tuning.accumulate)
    outcome = Outcome(
        state.step,
        epochs,
        state.tokens,
        state.seconds,
        state.stepping / max(state.step, 1),
        state.best,
        None,
        state.skipped,
    )
    method.optimizer.state.clear()
    _release_memory()
    weights = on_first(tensors(item_model, method))
    if not processes.first:
        return outcome
    leaks, before = _held(config, method, weights)
    if processes.sharded:  # shards cannot be taken off a model: a fresh one takes the tuned weights
        model, tokenizer = _fresh(config, ids, method, weights, white)
        tuned = backbone.Tuned(model, tokenizer, ids, first, prompter)
    else:
        with torch.no_grad():  # what `_held` settled, on the model's own device
            for name, tensor in tensors(item_model, method).items():
                tensor.copy_(weights[name])
        method.finish()
        thaw_norms(model, norms)
        item_model.fold()
    fits: tuple[Fit, ...] = ()
    if config.ranking.memory:
        with autocast(config.tuning.precision, tuned.model.device):
            memory = remember(tuned, train, valid, config)
        tuned, fits = replace(tuned, memory=memory), memory.fits
        log(state.step, {f"memory/{fit.case.replace(' ', '_')}_gain": fit.after - fit.before for fit in fits})
    _export(config, tuned, item_ids, model_folder, leaks, before)
    tuning_folder.mkdir(parents=True, exist_ok=True)
    pl.DataFrame(
        state.curves, schema={"step": pl.Int64, "name": pl.String, "value": pl.Float64}, orient="row"
    ).write_parquet(tuning_folder / "curves.parquet")
    layers = pl.DataFrame(state.layers, infer_schema_length=None)
    if leaks:
        final = pl.DataFrame({"module": list(leaks), "leak": list(leaks.values())})
        layers = layers.join(final, on="module", how="left") if len(layers) else final
    layers.write_parquet(tuning_folder / "diagnostics.parquet")
    checkpoints.clear()
    return replace(outcome, largest_leak=max(leaks.values()) if leaks else None, memory=fits)


def _release_memory() -> None:
    """Give what training has freed back to the system: glibc keeps it, and the backbone is loaded once more now."""
    import ctypes
    import gc
    import sys

    gc.collect()
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


def _identity(
    config: Config, frames: list[pl.DataFrame], ids: ItemIds, backbone: str, general: list[str], *made: Path
) -> str:
    """What a run is made of: every column of its tables, row by row, the drift limit's text, and how it is validated.

    How many processes share the work is no part.
    """
    other = ("registry.", "evaluation.", "threads", "tuning.distributed")
    parts = {name: value for name, value in config.flat().items() if not name.startswith(other)}
    parts["exclude_seen"] = config.evaluation.exclude_seen
    tables = [hashlib.sha256(frame.hash_rows(seed=1).to_numpy().tobytes()).hexdigest() for frame in frames]
    manifests = [path.read_text() for folder in made if (path := folder / "manifest.json").exists()]
    text = hashlib.sha256("\0".join(general).encode()).hexdigest()
    content = json.dumps([parts, tables, backbone, text, ids.item_id, manifests], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _held(config: Config, method: Any, after: dict[str, Tensor]) -> tuple[dict[str, float], dict[str, float]]:
    """Settle the change of every layer in `after` inside its null space; its leak afterwards and as tuning left it,
    against the weights on disk. Raises GemstError when tuning left more than rounding: settling would hide it."""
    if not hasattr(method, "certificate") or config.null_space.rule == "none":
        return {}, {}
    from gemst import backbone

    before, _ = backbone.load(config.backbone)
    named = {name: before.get_parameter(f"{name}.weight").detach() for name in method.attached.layers}
    left: dict[str, float] = method.certificate(named, after)
    method.settle(named, after)
    leaks: dict[str, float] = method.certificate(named, after)
    return leaks, left


def _fresh(
    config: Config, ids: ItemIds, method: Method, weights: dict[str, Tensor], white: Tensor | None
) -> tuple[Any, Any]:
    """The backbone with item tokens, and the tuned weights in it."""
    import torch

    from gemst import backbone

    model, tokenizer = backbone.load(config.backbone)
    rows = weights["items_out"] if white is None else weights["items_out"] @ white
    backbone.add_item_tokens(model, tokenizer, ids.tokens, weights["items_in"], rows)
    with torch.no_grad():
        for name in method.weights():
            model.get_parameter(f"{name}.weight").copy_(weights[name])
    return model, tokenizer


def _export(
    config: Config, tuned: Tuned, item_ids: Path, folder: Path, leaks: dict[str, float], before: dict[str, float]
) -> None:
    import shutil

    from gemst import __version__, backbone
    from gemst.files import atomic_folder

    card = {
        "gemst": __version__,
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "backbone": config.backbone.name,
        "first_item_token": tuned.first,
        "prompts": config.prompts.model_dump(mode="json"),
        "max_history": config.data.max_history,
        "params": config.model_dump(mode="json"),
        "leak_certificate": leaks,
        "leak_before_settling": before,
    }
    with atomic_folder(folder) as temporary:
        backbone.save(tuned.model, tuned.tokenizer, temporary)
        shutil.copytree(item_ids, temporary / "item_ids")
        if tuned.memory is not None:
            tuned.memory.save(temporary / "memory", tuned.ids)
        (temporary / "gemst.json").write_text(json.dumps(card, indent=2, sort_keys=True) + "\n")

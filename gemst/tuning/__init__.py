"""Tuning: from a backbone, item IDs and examples to a plain checkpoint."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import polars as pl
    from transformers import PreTrainedModel

    from gemst.config import Config
    from gemst.item_ids import ItemIds


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


def run(
    config: Config,
    ids: ItemIds,
    items: pl.DataFrame,
    train: pl.DataFrame,
    valid: pl.DataFrame,
    *,
    null_space: Path,
    item_ids: Path,
    model_folder: Path,
    tuning_folder: Path,
    log: Callable[[int, dict[str, float]], None],
) -> Outcome:
    """Tune `config.backbone` and write the model and the curves.

    `null_space` and `item_ids` are the folders of those stages; `log` is called with every step's scalars. Writes
    `model_folder` (a plain transformers checkpoint, the IDs and gemst.json) and curves.parquet, diagnostics.parquet in
    `tuning_folder`. Raises GemstError when an input does not fit the backbone.
    """
    import polars as pl
    import torch

    from gemst import backbone
    from gemst.prompts import Prompter
    from gemst.tuning import methods
    from gemst.tuning.alignment import with_alignment
    from gemst.tuning.batches import make_batches
    from gemst.tuning.checkpoint import Checkpoints
    from gemst.tuning.loop import precision
    from gemst.tuning.loop import train as train_loop
    from gemst.tuning.model import ItemModel
    from gemst.tuning.norm import freeze_norms, thaw_norms
    from gemst.tuning.rows import popularity, start_rows
    from gemst.tuning.validation import Validation

    torch.manual_seed(config.seed)
    if config.threads:
        torch.set_num_threads(config.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = backbone.load(config.backbone)
    rows = start_rows(model, tokenizer, ids, items)
    first = backbone.add_item_tokens(model, tokenizer, ids.tokens, rows, rows * config.tuning.item_scale)
    if device.type == "cpu" and not backbone.is_encoder_decoder(model):
        model.set_attn_implementation("eager")  # torch's fused attention is 2-4 times slower on CPU at these lengths
    model.to(device)  # type: ignore[arg-type]
    prompter = Prompter(tokenizer, ids.token_ids(first), ids.index, config.prompts, config.data.max_history)
    examples = with_alignment(train, items, ids, config.tuning.alignment, config.seed)
    batches = make_batches(config, examples, prompter, _decoder_start(model))
    item_model = ItemModel(model, first, ids.level_sizes, config.tuning.loss == "vocabulary")
    if config.tuning.popularity_prior:
        with torch.no_grad(), precision(config.tuning.precision, device):
            states = item_model.states(next(batches(0)).to(device))
        item_model.start_popular(popularity(ids, train), states)
    norms = freeze_norms(model)
    method = methods.make(config, item_model, null_space)
    tuned = backbone.Tuned(model, tokenizer, ids, first, prompter)
    validation = Validation(config, item_model, tuned, train, valid, device)
    checkpoints = Checkpoints(
        tuning_folder.with_name(f".{tuning_folder.name}.checkpoints"), _identity(config, train, ids)
    )
    state = train_loop(
        item_model,
        method,
        batches,
        config.tuning,
        validate=validation,
        log=log,
        checkpoints=checkpoints,
    )
    method.optimizer.state.clear()
    _release_memory()
    leaks = _certificate(config, method)
    method.finish()
    thaw_norms(model, norms)
    item_model.fold()
    _export(config, tuned, item_ids, model_folder, leaks)
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
    epochs = state.step / batches.steps_per_epoch(config.tuning.accumulate)
    leak = max(leaks.values()) if leaks else None
    return Outcome(
        state.step, epochs, state.tokens, state.seconds, state.stepping / max(state.step, 1), state.best, leak
    )


def _decoder_start(model: PreTrainedModel) -> int | None:
    return model.config.decoder_start_token_id if model.config.is_encoder_decoder else None


def _release_memory() -> None:
    """Give what training has freed back to the system: glibc keeps it, and the backbone is loaded once more now."""
    import ctypes
    import gc
    import sys

    gc.collect()
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


def _identity(config: Config, train: pl.DataFrame, ids: ItemIds) -> str:
    parts = {name: value for name, value in config.flat().items() if not name.startswith(("registry.", "evaluation."))}
    content = json.dumps([parts, len(train), len(ids.item_id)], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _certificate(config: Config, method: Any) -> dict[str, float]:
    """Leak of the whole change of every layer, against the weights on disk."""
    if not hasattr(method, "certificate") or config.null_space.rule == "none":
        return {}
    from gemst import backbone

    before, _ = backbone.load(config.backbone)
    leaks: dict[str, float] = method.certificate(
        {name: before.get_parameter(f"{name}.weight").detach() for name in method.weights()}
    )
    return leaks


def _export(config: Config, tuned: Any, item_ids: Path, folder: Path, leaks: dict[str, float]) -> None:
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
    }
    with atomic_folder(folder) as temporary:
        backbone.save(tuned.model, tuned.tokenizer, temporary)
        shutil.copytree(item_ids, temporary / "item_ids")
        (temporary / "gemst.json").write_text(json.dumps(card, indent=2, sort_keys=True) + "\n")

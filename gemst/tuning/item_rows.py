"""Item-token rows before tuning: input rows from text and co-behaviour, output rows fitted on the untouched backbone.

No method of tuning takes part in it, so every one of them starts here, and it is made once.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gemst.errors import GemstError
from gemst.tuning.head import fit, whitening
from gemst.tuning.null_space import fingerprint
from gemst.tuning.rows import BEHAVIOUR, by_token, ordered, popularity, start_rows

if TYPE_CHECKING:
    import polars as pl

    from gemst.config import Config
    from gemst.item_ids import ItemIds
    from gemst.tuning.batches import Batches
    from gemst.tuning.model import ItemModel

_TEXT = 32  # leading directions of the text rows, as features of the fit
_ASKED = 0.5  # length of the queries' features beside the others': at 1 recommendation pays for what search gains
_FILE = "rows.safetensors"


def build(config: Config, ids: ItemIds, items: pl.DataFrame, train: pl.DataFrame, out: Path) -> dict[str, Any]:
    """Write rows.safetensors and manifest.json to `out`; returns the manifest.

    The file holds `in` and `out`, both (tokens, d) float32, and where states were seen `white` (d, d), which whitens
    them: the base that the output rows are tuned in (`ItemModel`).

    Raises GemstError when the backbone cannot be loaded or there is nothing to train on.
    """
    from safetensors.torch import save_file

    from gemst import backbone
    from gemst.files import atomic_folder, write_json
    from gemst.prompts import make_prompter
    from gemst.tuning.batches import make_batches
    from gemst.tuning.model import ItemModel
    from gemst.tuning.precision import autocast

    torch.manual_seed(config.seed)
    settings, place = config.item_rows, backbone.best_device()
    model, tokenizer = backbone.load(config.backbone)
    fitted_on = fingerprint(model)
    company = company_of(ids, items, train)
    text = start_rows(model, tokenizer, ids, items)
    inputs = settings.norm * start_rows(model, tokenizer, ids, items, company, settings.behaviour)
    first = backbone.add_item_tokens(model, tokenizer, ids.tokens, inputs, text * settings.scale)
    backbone.settle(model, place)
    prompter = make_prompter(config, model, tokenizer, ids, first)
    batches = make_batches(config, train, prompter, backbone.decoder_start(model))
    item_model = ItemModel(model, first, ids.level_sizes, whole_vocabulary=False).eval()
    manifest: dict[str, Any] = {"ids": _identity(ids), "backbone": fitted_on, "tokens": 0, "targets": 0, "levels": []}
    base: Tensor | None = None
    if settings.popularity or settings.tokens:
        with torch.inference_mode(), autocast(config.tuning.precision, place):
            states, labels, level, manifest["tokens"] = collect(item_model, batches, max(settings.tokens, 1), place)
        if settings.popularity:
            item_model.start_popular(popularity(ids, train), states, level)
        if settings.tokens:
            features = features_of(ids, text, company, asked_of(ids, items, train, settings.queries))
            base = whitening(states)
            manifest["targets"] = len(labels)
            manifest["levels"] = _fit(item_model, features, states, labels, level, base, config.seed)
    with atomic_folder(out) as folder:
        rows = {"in": inputs, "out": item_model.items_out.detach().cpu()} | ({} if base is None else {"white": base})
        save_file({name: tensor.float().contiguous() for name, tensor in rows.items()}, folder / _FILE)
        write_json(folder / "manifest.json", manifest)
    return manifest


def load(folder: Path, ids: ItemIds, backbone: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Input rows, output rows (tokens, d), and the base of the latter if there is one.

    `backbone` is the fingerprint of the one to be tuned. Raises GemstError when the rows were made for another one, or
    for other item IDs.
    """
    from safetensors.torch import load_file

    from gemst.files import read_json, require

    manifest = read_json(require(folder / "manifest.json", made_by="gemst item-rows"))
    if manifest["ids"] != _identity(ids):
        raise GemstError(f"{folder} was made for other item IDs", "Run `gemst item-rows` again")
    if manifest.get("backbone") != backbone:
        raise GemstError(f"{folder} was made for another backbone", "Run `gemst item-rows` with the present backbone")
    rows = load_file(folder / _FILE)
    return rows["in"], rows["out"], rows.get("white")


def _identity(ids: ItemIds) -> str:
    content = repr([ids.strategy, ids.level_sizes, ids.item_id]).encode() + ids.codes.tobytes()
    return hashlib.sha256(content).hexdigest()[:16]


def company_of(ids: ItemIds, items: pl.DataFrame, train: pl.DataFrame) -> Tensor:
    """Co-behaviour vectors (items, k); zero where an item was never met."""
    from gemst.item_ids.behaviour import behaviour_vectors

    vectors, known = behaviour_vectors(ordered(ids, items), train, BEHAVIOUR)
    return torch.from_numpy(np.where(known[:, None], vectors, 0).astype(np.float32))


def asked_of(ids: ItemIds, items: pl.DataFrame, train: pl.DataFrame, dimensions: int) -> Tensor:
    """Vectors (items, k) of the queries that items are clicked for; k is 0 where there is none, or none is wanted."""
    from gemst.item_ids.behaviour import query_vectors

    return torch.from_numpy(query_vectors(ordered(ids, items), train, dimensions))


def features_of(ids: ItemIds, text: Tensor, company: Tensor, asked: Tensor) -> Tensor:
    """What tells tokens apart in the fit, (tokens, k): co-behaviour, the leading directions of their texts, and what
    they are clicked for."""
    away = text - text.mean(0)
    left, values, _ = torch.linalg.svd(away, full_matrices=False)
    parts = [by_token(ids, company), left[:, :_TEXT] * values[:_TEXT]]
    standard = [part / part.std().clamp(min=1e-6) for part in parts]
    if asked.shape[1]:
        part = by_token(ids, asked)
        standard.append(_ASKED * part / part.std().clamp(min=1e-6))
    return torch.cat(standard, 1)


def collect(items: ItemModel, batches: Batches, tokens: int, place: torch.device) -> tuple[Tensor, Tensor, Tensor, int]:
    """States (targets, d) float32, labels and levels (targets,) of an epoch's last `tokens`, and how many.

    Tuning begins with the first ones: what a short run sees is new to the rows.
    """
    from gemst import backbone
    from gemst.progress import Progress

    found, spent = [], 0
    with Progress("states of the backbone as it is", total=tokens) as progress:
        for rows in reversed(batches.plan(0)):
            batch = batches.collate(rows)
            moved = batch.to(place)
            states = items.states(moved).float() * backbone.output_scale(items.model)
            found.append((states.cpu(), batch.labels - items.first, batch.level))
            spent += batch.tokens
            progress.advance("", batch.tokens)
            if spent >= tokens:
                break
    states, labels, level = (torch.cat(parts) for parts in zip(*found, strict=True))
    return states, labels, level, spent


def _fit(
    items: ItemModel, features: Tensor, states: Tensor, labels: Tensor, level: Tensor, white: Tensor, seed: int
) -> list[dict[str, float]]:
    """Fit each level's output rows in place; returns what each gained."""
    gained = []
    for at, (start, stop) in enumerate(zip(items.starts[:-1], items.starts[1:], strict=True)):
        mine = level == at
        rows = items.items_out.data[start:stop]
        done = fit(rows.cpu(), features[start:stop], states[mine], labels[mine] - start, white, seed)
        rows.copy_(done.rows)
        gained.append({"loss_before": done.before, "loss_after": done.after, "epochs": done.epochs})
    return gained

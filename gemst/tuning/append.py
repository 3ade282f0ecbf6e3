"""New items for a tuned model, without training: an ID each and, for atomic IDs, rows guessed from their text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl
import torch
from torch import Tensor

from gemst.tuning.rows import item_texts

if TYPE_CHECKING:
    from gemst.config import Config

_PENALTIES = torch.logspace(-4, 4, 33, dtype=torch.float64)  # tried by `predict`, times the mean squared singular value


@dataclass(frozen=True)
class Appended:
    """Items that got an ID, items that lost their place, and items of the catalogue now."""

    new: int
    retired: int
    items: int


def append(model: Path, items: pl.DataFrame, config: Config, out: Path) -> Appended:
    """Write to `out` the tuned model of the folder `model` with the catalogue `items`, all of it as it is today.

    IDs are a new generation of the model's own (`gemst.item_ids.build`): published ones stay, items that are gone from
    `items` are retired. Semantic IDs are made of codes that the model knows already, so not one weight changes. An
    atomic ID is a new token: its input and output rows are predicted from the item's text by the ridge regression that
    best predicts the trained rows from theirs (`predict`); every other weight keeps its bits. Raises GemstError when
    the items do not fit the model's code space.
    """
    from gemst import backbone, item_ids
    from gemst.files import atomic_folder, read_json, write_json

    tuned = backbone.load_tuned(model)
    settings = config.item_ids.model_copy(update={"extends": model / "item_ids"})
    with atomic_folder(out) as folder:
        quality = item_ids.build(
            items, pl.DataFrame(), config.model_copy(update={"item_ids": settings}), folder / "item_ids"
        )
        ids = item_ids.load(folder / "item_ids")
        known = len(tuned.ids.tokens)
        if len(ids.tokens) > known:
            named = pl.DataFrame({"item_id": ids.item_id}).join(items, on="item_id", how="left", maintain_order="left")
            text = backbone.text_rows(tuned.model, tuned.tokenizer, item_texts(named))
            listed = torch.from_numpy(ids.active[:known])  # the text of retired items is gone
            trained = slice(tuned.first, tuned.first + known)
            rows = [
                predict(text[:known][listed], weight[trained].detach()[listed], text[known:])
                for weight in (backbone.vocabulary(tuned.model), backbone.output_head(tuned.model).weight)
            ]
            backbone.add_item_tokens(tuned.model, tuned.tokenizer, ids.tokens[known:], rows[0], rows[1])
        backbone.save(tuned.model, tuned.tokenizer, folder)
        write_json(folder / "gemst.json", read_json(model / "gemst.json"))
    was_active = int(tuned.ids.active.sum())
    new = len(ids.item_id) - len(tuned.ids.item_id)
    return Appended(new, was_active + new - quality["items"], quality["items"])


def predict(text: Tensor, trained: Tensor, new: Tensor) -> Tensor:
    """Rows (m, d) that a model would have for texts `new` (m, d), given `trained` (n, d) rows of texts `text` (n, d).

    Ridge regression about the means, its penalty chosen by generalised cross-validation. The predictions' mean distance
    from the mean row is then that of the trained rows: a regression alone shrinks them, and such items would never win.
    """
    x, y = text.double(), trained.double()
    centre, level = x.mean(0), y.mean(0)
    left, values, right = torch.linalg.svd(x - centre, full_matrices=False)
    target = left.T @ (y - level)
    energy = values.square()
    rest = (y - level).square().sum() - target.square().sum()  # what no penalty can explain
    errors = []
    for penalty in (penalties := _PENALTIES * energy.mean()):
        kept = energy / (energy + penalty)
        missed = ((1 - kept)[:, None] * target).square().sum() + rest
        errors.append(float(missed / (len(x) - kept.sum()).square()))
    kept = values / (energy + penalties[min(range(len(errors)), key=errors.__getitem__)])
    away = (new.double() - centre) @ right.T @ (kept[:, None] * target)
    norm = (y - level).norm(dim=1).mean() / away.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return (level + away * norm).to(trained.dtype)

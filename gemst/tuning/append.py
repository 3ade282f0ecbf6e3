"""New items for a tuned model, without training: an ID each and, for atomic IDs, rows made from their text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl
import torch
from torch import Tensor

from gemst.tuning.rows import item_texts

if TYPE_CHECKING:
    from gemst.backbone import Tuned
    from gemst.config import Config

_SAMPLE = 256  # trained items whose titles the model is asked for, and made-up histories, to learn its mean answers
_HISTORY = 10  # items in such a history
_UNPOPULAR = 0.1  # the share of trained items that stands below a new one when nobody asks for anything
_BATCH = 32


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
    atomic ID is a new token with an input and an output row (`_rows`); every other weight keeps its bits. Raises
    GemstError when the items do not fit the model's code space.
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
            rows_in, rows_out = _rows(tuned, items, ids.item_id[known:])
            backbone.add_item_tokens(tuned.model, tuned.tokenizer, ids.tokens[known:], rows_in, rows_out)
        backbone.save(tuned.model, tuned.tokenizer, folder)
        write_json(folder / "gemst.json", read_json(model / "gemst.json"))
    was_active = int(tuned.ids.active.sum())
    new = len(ids.item_id) - len(tuned.ids.item_id)
    return Appended(new, was_active + new - quality["items"], quality["items"])


def _rows(tuned: Tuned, items: pl.DataFrame, new: list[str]) -> tuple[Tensor, Tensor]:
    """Input and output rows (len(new), d) of the items `new`.

    Where a row lies from the mean trained row says what tells the item apart: for the input its text, as at the start
    of tuning; for the output the state in which the model itself answers a search for the item's title. To a history
    alone a new item is as likely an answer as items that are hardly ever clicked (`calm`).
    """
    from gemst import backbone

    ids = tuned.ids
    known = pl.DataFrame({"item_id": ids.item_id}).with_row_index("row").filter(pl.Series(ids.active))
    listed = known.join(items, on="item_id", how="inner", maintain_order="left")
    fresh = pl.DataFrame({"item_id": new}).join(items, on="item_id", how="left", maintain_order="left")
    tokens = torch.from_numpy(listed["row"].to_numpy().astype("int64")) + tuned.first
    words = [backbone.text_rows(tuned.model, tuned.tokenizer, item_texts(table)) for table in (listed, fresh)]
    sample = listed.sample(min(_SAMPLE, len(listed)), seed=0)
    known_answers, new_answers = (_answers(tuned, table["title"]) for table in (sample, fresh))
    pasts = _pasts(listed["item_id"], len(sample))
    searches = torch.stack([known_answers.mean(0), _answers(tuned, sample["title"], pasts).mean(0)])
    history = _answers(tuned, pl.Series([None] * len(sample), dtype=pl.String), pasts).mean(0)
    inputs, head = backbone.vocabulary(tuned.model).detach(), backbone.output_head(tuned.model).weight.detach()
    outputs = place(head[tokens], known_answers, new_answers)
    return place(inputs[tokens], *words), calm(outputs, head[tokens], history, searches)


def _pasts(item_ids: pl.Series, count: int) -> pl.Series:
    """`count` histories of items drawn at random."""
    drawn = item_ids.sample(count * _HISTORY, with_replacement=True, seed=1)
    return drawn.reshape((count, _HISTORY)).cast(pl.List(pl.String))


@torch.inference_mode()
def _answers(tuned: Tuned, queries: pl.Series, histories: pl.Series | None = None) -> Tensor:
    """States (len(queries), d) float32 that predict the ID for a query, or for none (null), after a history if any."""
    from gemst.ranking.context import encode
    from gemst.ranking.ranker import batches

    past = pl.lit([], dtype=pl.List(pl.String)) if histories is None else histories
    prompts = tuned.prompter.encode(pl.DataFrame({"query": queries}).select("query", past.alias("history")))
    states = torch.zeros(len(prompts), tuned.model.config.hidden_size)
    for batch in batches(prompts, _BATCH):
        found = encode(tuned.model, [prompts[row] for row in batch], branches=False).states
        states[torch.from_numpy(batch)] = found.float().cpu()
    return states


def place(trained: Tensor, known: Tensor, new: Tensor) -> Tensor:
    """Rows (m, d): the mean of the `trained` rows, moved the way `new` (m, d) differ from the mean of `known`.

    All of them lie as far from the mean as trained rows do on average, so that they neither drown nor drown others.
    """
    mean = trained.mean(0)
    away = new.clone() - known.mean(0)
    length = (trained - mean).norm(dim=1).mean()
    return mean + away * (length / away.norm(dim=1, keepdim=True).clamp(min=1e-12))


def calm(rows: Tensor, trained: Tensor, history: Tensor, searches: Tensor) -> Tensor:
    """`rows` (m, d), whose logits in the state `history` (d,) are lowered to that of an unpopular `trained` row.

    `history` is the mean state after a history without a query. Rows change along the part of it alone that the mean
    states of `searches` (k, d) lack, so that the mean search ranks them as before.
    """
    shared = torch.linalg.qr(searches.T).Q
    own = history - shared @ (shared.T @ history)
    if own.norm() < 0.1 * history.norm():  # the model hears no difference between the tasks
        return rows
    surplus = (rows @ history - (trained @ history).quantile(_UNPOPULAR)).clamp(min=0)
    return rows - surplus[:, None] * own / own.dot(history)

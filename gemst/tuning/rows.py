"""Start values of the item-token rows, so that an item is reachable before any click."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import torch
from torch import Tensor

from gemst.backbone import text_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from gemst.item_ids import ItemIds


def item_texts(items: pl.DataFrame) -> list[str]:
    """What an item's row starts from: title, categories, and the first words of its description."""
    return items.select(
        pl.concat_str(
            [pl.col("title"), pl.col("categories").list.join(", "), pl.col("text").str.slice(0, 200)],
            separator=" ",
            ignore_nulls=True,
        ).str.strip_chars()
    ).to_series().to_list()  # fmt: skip


def start_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: ItemIds, items: pl.DataFrame) -> Tensor:
    """Rows (tokens, d): an atomic token starts at its item's text, a code at the mean over the items that carry it.

    A code no item carries starts at the mean row.
    """
    ordered = pl.DataFrame({"item_id": ids.item_id}).join(items, on="item_id", how="left", maintain_order="left")
    by_item = text_rows(model, tokenizer, item_texts(ordered))
    tokens = torch.from_numpy(ids.token_ids(0))
    sums = torch.zeros(len(ids.tokens), by_item.shape[1])
    counts = torch.zeros(len(ids.tokens))
    for level in range(tokens.shape[1]):
        real = tokens[:, level] >= 0
        sums.index_add_(0, tokens[real, level], by_item[real])
        counts.index_add_(0, tokens[real, level], torch.ones(int(real.sum())))
    rows = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], by_item.mean(0))
    norm = by_item.norm(dim=1).mean()
    return rows * (norm / rows.norm(dim=1, keepdim=True).clamp(min=1e-12))


def popularity(ids: ItemIds, train: pl.DataFrame) -> Tensor:
    """How often each token is (part of) a training target, (tokens,)."""
    counted = train.select(item_id=pl.col("targets").list.explode(empty_as_null=True)).group_by("item_id").len()
    per_item = pl.DataFrame({"item_id": ids.item_id}).join(counted, on="item_id", how="left", maintain_order="left")
    weights = per_item["len"].fill_null(0).to_numpy().astype(np.float32)
    tokens = ids.token_ids(0)
    total = np.zeros(len(ids.tokens), np.float32)
    for level in range(tokens.shape[1]):
        real = tokens[:, level] >= 0
        np.add.at(total, tokens[real, level], weights[real])
    return torch.from_numpy(total)

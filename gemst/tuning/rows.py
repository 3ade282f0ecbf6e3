"""Start values of the item tokens' input rows: what an item is called, and the company it keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import torch
from torch import Tensor

from gemst.backbone import text_rows, vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from gemst.item_ids import ItemIds

BEHAVIOUR = 64  # dimensions of the co-behaviour vectors


def item_texts(items: pl.DataFrame) -> list[str]:
    """What an item's row starts from: title, categories, and the first words of its description."""
    return items.select(
        pl.concat_str(
            [pl.col("title"), pl.col("categories").list.join(", "), pl.col("text").str.slice(0, 200)],
            separator=" ",
            ignore_nulls=True,
        ).str.strip_chars()
    ).to_series().to_list()  # fmt: skip


def ordered(ids: ItemIds, items: pl.DataFrame) -> pl.DataFrame:
    """The catalogue in the order of `ids`; retired items have no text."""
    return pl.DataFrame({"item_id": ids.item_id}).join(items, on="item_id", how="left", maintain_order="left")


def start_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: ItemIds,
    items: pl.DataFrame,
    company: Tensor | None = None,
    weight: float = 0.0,
) -> Tensor:
    """Rows (tokens, d): an atomic token starts at its item's row, a code at the mean over the items that carry it.

    An item's row is its text's mean token embedding and, by `weight`, its `company` (items, k): co-behaviour vectors,
    zero for items nobody has met, which stay at their text. All rows have the vocabulary's mean norm.
    """
    by_item = text_rows(model, tokenizer, item_texts(ordered(ids, items)))
    norm = by_item.norm(dim=1).mean()
    if company is not None and weight > 0:
        known = company.norm(dim=1) > 0
        beside = _along_vocabulary(model, company[known])
        beside *= norm / beside.norm(dim=1, keepdim=True).clamp(min=1e-12)
        by_item[known] = (1 - weight) * by_item[known] + weight * beside
    rows = by_token(ids, by_item)
    return rows * (norm / rows.norm(dim=1, keepdim=True).clamp(min=1e-12))


def by_token(ids: ItemIds, vectors: Tensor) -> Tensor:
    """Mean (tokens, k) of `vectors` (items, k) over the items that carry a token; the mean of all where none does."""
    tokens = torch.from_numpy(ids.token_ids(0))
    sums = torch.zeros(len(ids.tokens), vectors.shape[1])
    counts = torch.zeros(len(ids.tokens))
    for level in tokens.T:
        sums.index_add_(0, level, vectors)
        counts.index_add_(0, level, torch.ones(len(level)))
    return torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], vectors.mean(0))


def popularity(ids: ItemIds, train: pl.DataFrame) -> Tensor:
    """How often each token is (part of) a training target, (tokens,)."""
    counted = train.select(item_id=pl.col("targets").list.explode(empty_as_null=True)).group_by("item_id").len()
    per_item = pl.DataFrame({"item_id": ids.item_id}).join(counted, on="item_id", how="left", maintain_order="left")
    weights = per_item["len"].fill_null(0).to_numpy().astype(np.float32)
    total = np.zeros(len(ids.tokens), np.float32)
    for level in ids.token_ids(0).T:
        np.add.at(total, level, weights)
    return torch.from_numpy(total)


def _along_vocabulary(model: PreTrainedModel, vectors: Tensor) -> Tensor:
    """`vectors` (n, k) laid along the k directions the backbone's vocabulary varies most in, (n, d); the rest is cut.

    Pretrained layers read these directions, so a frozen backbone carries what is written there to where it predicts.
    A direction has no sign of its own: each is turned so that what all vectors share lies towards the mean word, away
    from what all titles share. (The other way round, items look alike: half the NDCG of recommendation is gone.)
    """
    words = vocabulary(model).detach().float()
    mean = words.mean(0)
    away = words - mean
    values, directions = torch.linalg.eigh(away.T @ away / len(away))
    vectors = vectors[:, : len(values)]
    values, directions = values.flip(0)[: vectors.shape[1]], directions.flip(1)[:, : vectors.shape[1]]
    spread = vectors / vectors.std(0).clamp(min=1e-6)
    turned = torch.where(spread.mean(0) * (mean @ directions) < 0, -1.0, 1.0)
    return (spread * turned * values.clamp(min=0).sqrt()) @ directions.T

"""Item vectors: from a sentence encoder, from the backbone, or from a column the user brings."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from gemst.backbone import best_device
from gemst.errors import GemstError

if TYPE_CHECKING:
    from gemst.config import Config

Floats = NDArray[np.float32]

_LENGTH = 128  # tokens of a text that count


def documents(items: pl.DataFrame) -> list[str]:
    """One text per item: title, categories, and the first words of the description."""
    categories = pl.when(pl.col("categories").list.len() > 0).then(pl.col("categories").list.join(", "))
    parts = [pl.col("title"), categories, pl.col("text").str.slice(0, 400)]
    return items.select(document=pl.concat_str(parts, separator=". ", ignore_nulls=True))["document"].to_list()


def item_vectors(items: pl.DataFrame, config: Config) -> Floats:
    """Vectors (len(items), d) float32 of the items, as `item_ids.embedding` says; an item's depends on no other item.

    Raises GemstError when the encoder cannot be loaded, or `embedding` is `column` and items.embedding is not a column
    of equally long, finite, non-zero number lists.
    """
    source = config.item_ids.embedding
    if source == "column":
        vectors = _column(items)
    elif source == "backbone":
        vectors = _backbone(documents(items), config)
    else:
        vectors = embed_texts(documents(items), config.item_ids.encoder)
    return vectors


def embed_texts(texts: list[str], encoder: str, batch_size: int = 64) -> Floats:
    """Unit sentence embeddings (len(texts), d) float32: last hidden states, averaged over each text's tokens.

    `encoder` is a folder or hub name of a BERT-like encoder. Raises GemstError when it cannot be loaded.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModel, AutoTokenizer

    try:
        model = AutoModel.from_pretrained(encoder, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(encoder)
    except (OSError, ValueError, SafetensorError) as error:
        raise GemstError(
            f"item_ids.encoder = {encoder!r} cannot be loaded ({str(error).splitlines()[0]})",
            "Run `gemst fetch` for the default encoder, or name a folder with config.json and safetensors",
        ) from None
    return unit(_pooled(model, tokenizer, texts, batch_size, lambda **inputs: model(**inputs).last_hidden_state))


def unit(vectors: Floats) -> Floats:
    """Rows scaled to length one; a zero row stays zero."""
    scaled: Floats = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return scaled


def _backbone(texts: list[str], config: Config) -> Floats:
    """Mean last hidden states of the backbone (of its encoder, where it has one)."""
    from gemst import backbone

    model, tokenizer = backbone.load(config.backbone)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tower = model.get_encoder() if backbone.is_encoder_decoder(model) else backbone.tower(model)
    return _pooled(tower, tokenizer, texts, 32, lambda **inputs: tower(**inputs).last_hidden_state)


def _pooled(model: Any, tokenizer: Any, texts: list[str], batch_size: int, run: Callable[..., Any]) -> Floats:
    import torch

    from gemst.progress import Progress

    device = best_device()
    model.to(device)
    order = np.argsort([len(text) for text in texts], kind="stable")  # equal lengths together: little padding
    vectors = np.zeros((len(texts), model.config.hidden_size), np.float32)
    with torch.inference_mode(), Progress("embedding texts", len(texts)) as progress:
        for start in range(0, len(texts), batch_size):
            chosen = order[start : start + batch_size]
            batch = tokenizer(
                [texts[i] for i in chosen], padding=True, truncation=True, max_length=_LENGTH,
                split_special_tokens=True, return_tensors="pt",
            ).to(device)  # fmt: skip
            inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
            mask = inputs["attention_mask"][..., None]
            mean = (run(**inputs) * mask).sum(1) / mask.sum(1).clamp(min=1)
            vectors[chosen] = mean.float().cpu().numpy()
            progress.advance(by=len(chosen))
    return vectors


def _column(items: pl.DataFrame) -> Floats:
    fix = "Give every item a list of the same number of finite values, or set item_ids.embedding to sentence"
    if "embedding" not in items.columns:
        raise GemstError("items has no column `embedding`, which item_ids.embedding: column asks for", fix)
    lengths = items["embedding"].list.len()
    if lengths.null_count() or lengths.n_unique() != 1 or not lengths[0]:
        raise GemstError("items.embedding holds lists of different lengths or nulls", fix)
    flat = items["embedding"].explode(empty_as_null=True).cast(pl.Float32)
    vectors = np.asarray(flat.to_numpy()).reshape(len(items), -1)
    if not np.isfinite(vectors).all() or not vectors.any(axis=1).all():
        raise GemstError("items.embedding holds null, infinite or all-zero vectors", fix)
    return vectors

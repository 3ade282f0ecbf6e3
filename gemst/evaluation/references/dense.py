"""Dense text: nearest items to the query's, or the history's, sentence embedding."""

from __future__ import annotations

import numpy as np
import polars as pl

from gemst.backbone import best_device
from gemst.errors import GemstError
from gemst.evaluation.references.base import Floats, Reference
from gemst.evaluation.references.texts import documents

_BATCH = 64
_LENGTH = 128  # tokens of a text that count


class Dense(Reference):
    """Scores an item by the cosine of its text embedding with the query's; without one, with the history's mean.

    `encoder` is a folder or hub name of a BERT-like sentence encoder (mean pooling, unit length).
    """

    name = "dense"

    def __init__(self, encoder: str) -> None:
        self._encoder = Encoder(encoder)

    def _fit(self, events: pl.DataFrame, items: pl.DataFrame) -> None:
        self._items = self._encoder.embed(documents(items).to_list())
        self._known = pl.DataFrame(schema={"query": pl.String, "at": pl.Int64})
        self._queries = np.zeros((0, self._items.shape[1]), np.float32)

    def scores(self, examples: pl.DataFrame) -> Floats:
        searches = examples["query"].is_not_null().to_numpy()
        queries = examples.select(pl.col("query").cast(pl.String)).drop_nulls()
        fresh = queries.unique().join(self._known, on="query", how="anti").sort("query")
        if len(fresh):
            self._known = pl.concat([self._known, fresh.with_columns(at=pl.int_range(pl.len()) + len(self._known))])
            self._queries = np.concatenate([self._queries, self._encoder.embed(fresh["query"].to_list())])
        vectors = np.zeros((len(examples), self._items.shape[1]), np.float32)
        at = queries.join(self._known, on="query", how="left", maintain_order="left")["at"]
        vectors[searches] = self._queries[at.to_numpy()]
        vectors[~searches] = self.histories(examples.filter(~searches)) @ self._items
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return vectors @ self._items.T


class Encoder:
    """A BERT-like sentence encoder, loaded once. Raises GemstError when `name` is neither a folder nor a hub name."""

    def __init__(self, name: str) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            self.model = AutoModel.from_pretrained(name, dtype=torch.float32).eval()
        except (OSError, ValueError) as error:
            raise GemstError(
                f"item_ids.encoder = {name!r} cannot be loaded ({str(error).splitlines()[0]})",
                "Run `gemst fetch` for the default encoder, or name a folder with config.json and safetensors",
            ) from None
        self.device = best_device()
        self.model.to(self.device)

    def embed(self, texts: list[str]) -> Floats:
        """Unit embeddings (len(texts), d), float32: the mean of the last hidden states over each text's tokens."""
        import torch

        order = np.argsort([len(text) for text in texts], kind="stable")  # equal lengths together: little padding
        vectors = np.zeros((len(texts), self.model.config.hidden_size), np.float32)
        with torch.inference_mode():
            for start in range(0, len(texts), _BATCH):
                chosen = order[start : start + _BATCH]
                batch = self.tokenizer(
                    [texts[i] for i in chosen], padding=True, truncation=True, max_length=_LENGTH, return_tensors="pt"
                ).to(self.device)
                states = self.model(**batch).last_hidden_state
                mask = batch["attention_mask"][..., None]
                mean = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
                vectors[chosen] = torch.nn.functional.normalize(mean, dim=1).cpu().numpy()
        return vectors

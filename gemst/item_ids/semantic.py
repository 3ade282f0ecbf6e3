"""Semantic IDs: item vectors, a residual quantizer over them, and unique codes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from numpy.typing import NDArray

from gemst.errors import GemstError
from gemst.item_ids.collisions import resolve
from gemst.item_ids.embeddings import Floats, item_vectors, unit
from gemst.item_ids.residual import bounded, kmeans, nearest, quantize

if TYPE_CHECKING:
    from gemst.config import Config

Ints = NDArray[np.int32]

_BEHAVIOUR = 64  # dimensions of a co-behaviour vector


@dataclass(frozen=True)
class Quantizer:
    """What turns item vectors into codes, for the items of today and of later generations.

    `centre` (d,): the mean of the vectors it was learned from, where they are the backbone's, or None: decoder-only
    states share a large common direction, and without it the rest tells items apart. `codebooks`: levels of (size,
    width) float32. `encoder`: the RQ-VAE's weights, or none. `from_text` (d_text, d_behaviour): guesses co-behaviour
    from text (joint), or None; `text_weight` is the share of text then.
    """

    codebooks: list[Floats]
    encoder: dict[str, Floats]
    from_text: Floats | None
    text_weight: float
    centre: Floats | None = None

    def save(self, path: Path) -> None:
        """Write everything as safetensors."""
        from safetensors.numpy import save_file

        tensors = {f"codebook.{level}": codebook for level, codebook in enumerate(self.codebooks)}
        tensors |= {f"encoder.{name}": value for name, value in self.encoder.items()}
        if self.from_text is not None:
            tensors |= {"from_text": self.from_text}
        if self.centre is not None:
            tensors |= {"centre": self.centre}
        tensors["text_weight"] = np.array([self.text_weight])
        save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path)

    @classmethod
    def load(cls, path: Path) -> Quantizer:
        """Read what `save` wrote."""
        from safetensors.numpy import load_file

        tensors = load_file(path)
        levels = sum(name.startswith("codebook.") for name in tensors)
        return cls(
            [tensors[f"codebook.{level}"] for level in range(levels)],
            {name.removeprefix("encoder."): value for name, value in tensors.items() if name.startswith("encoder.")},
            tensors.get("from_text"),
            float(tensors["text_weight"][0]),
            tensors.get("centre"),
        )

    @property
    def width(self) -> int:
        """Numbers in an item vector."""
        if self.encoder:
            return int(self.encoder["0.weight"].shape[1])  # the encoder's first Linear
        return len(self.codebooks[0][0] if self.from_text is None else self.from_text)

    def latents(self, vectors: Floats, behaviour: Floats | None = None) -> Floats:
        """What the codebooks quantize (n, width), from text vectors and, where known, co-behaviour (joint)."""
        if self.encoder:
            from gemst.item_ids.rqvae import encoded

            return encoded(vectors, self.encoder)
        if self.from_text is None:
            return vectors
        guessed = unit(vectors @ self.from_text) if behaviour is None else behaviour
        return fuse(vectors, guessed, self.text_weight)


def fuse(text: Floats, behaviour: Floats, text_weight: float) -> Floats:
    """One vector of both, side by side: squared distances add up in the proportion text_weight to 1 - text_weight."""
    return np.concatenate([text * text_weight**0.5, behaviour * (1 - text_weight) ** 0.5], axis=1, dtype=np.float32)


def fit(items: pl.DataFrame, train: pl.DataFrame, config: Config) -> tuple[Quantizer, Ints, Ints]:
    """Learn a quantizer from `items` (and `train`, strategy joint).

    Returns it, the codes before (n, levels) and after collisions were resolved.
    """
    settings = config.item_ids
    vectors = item_vectors(items, config)
    centre = vectors.mean(0) if settings.embedding == "backbone" else None
    vectors = centred(vectors, centre)
    if settings.strategy == "rq-vae":
        from gemst.item_ids import rqvae

        weights, codebooks = rqvae.fit(vectors, settings.levels, settings.codebook_size, settings.epochs, config.seed)
        quantizer = Quantizer(codebooks, weights, None, 1.0, centre)
        latents = quantizer.latents(vectors)
        before = quantize(latents, codebooks)
        return quantizer, before, resolve(latents, codebooks, before)
    from_text, blocks, latents = None, [slice(None)] * settings.levels, vectors
    if settings.strategy == "joint":
        from gemst.item_ids.behaviour import behaviour_vectors
        from gemst.item_ids.behaviour import from_text as regression

        behaviour, known = behaviour_vectors(items, train, _BEHAVIOUR)
        from_text = regression(vectors, behaviour, known)
        behaviour[~known] = unit(vectors[~known] @ from_text)
        latents = fuse(vectors, behaviour, settings.text_weight)
        if settings.joint == "shared-specific":
            text = vectors.shape[1]
            blocks[-2:] = [slice(0, text), slice(text, None)][-min(2, settings.levels) :]
    codebooks, before = learn(latents, settings.codebook_size, blocks, config.seed)
    quantizer = Quantizer(codebooks, {}, from_text, settings.text_weight, centre)
    return quantizer, before, resolve(latents, codebooks, before)


def centred(vectors: Floats, centre: Floats | None) -> Floats:
    """Unit vectors (n, d), measured from `centre`."""
    return unit(vectors if centre is None else vectors - centre)


def place(quantizer: Quantizer, items: pl.DataFrame, taken: Ints, config: Config) -> tuple[Ints, Ints]:
    """Codes (n, levels) of new items, before and after they make way for the IDs already `taken` (m, levels).

    Joint: nobody has met a new item, so its co-behaviour is guessed from its text. Raises GemstError when the items'
    vectors are not as wide as those the quantizer was learned from.
    """
    if items.is_empty():
        return np.empty((0, taken.shape[1]), np.int32), np.empty((0, taken.shape[1]), np.int32)
    vectors = item_vectors(items, config)
    if vectors.shape[1] != quantizer.width:
        raise GemstError(
            f"item vectors have {vectors.shape[1]} numbers, those of the build in item_ids.extends {quantizer.width}",
            f"Bring vectors of the same model (item_ids.embedding is {config.item_ids.embedding}), "
            "or clear item_ids.extends to build new IDs (and tune again)",
        )
    latents = quantizer.latents(centred(vectors, quantizer.centre))
    before = quantize(latents, quantizer.codebooks)
    return before, resolve(latents, quantizer.codebooks, before, taken)


def learn(latents: Floats, size: int, blocks: list[slice], seed: int) -> tuple[list[Floats], Ints]:
    """Balanced residual k-means: codebooks, and the codes (n, levels) the codebooks were learned with.

    `blocks` names the columns a level quantizes; its codebook is zero in the others. The first level is assigned within
    its balance bound, the later ones to the nearest.
    """
    residual, codebooks = latents.copy(), []
    codes = np.empty((len(latents), len(blocks)), np.int32)
    for level, block in enumerate(blocks):
        codebook = np.zeros((size, latents.shape[1]), np.float32)
        codebook[:, block] = kmeans(np.ascontiguousarray(residual[:, block]), size, seed + level, balanced=True)
        codes[:, level] = bounded(residual, codebook) if level == 0 else nearest(residual, codebook)
        residual -= codebook[codes[:, level]]
        codebooks.append(codebook)
    return codebooks, codes

"""RQ-VAE: it learns, it wastes no code, it repeats, and it leaves the caller's random state alone."""

from __future__ import annotations

import numpy as np
import torch

from gemst.item_ids import rqvae
from gemst.item_ids.embeddings import unit
from gemst.item_ids.residual import quantize


def points(n: int = 300) -> np.ndarray:
    rng = np.random.default_rng(0)
    return unit(
        (rng.standard_normal((8, 16))[np.arange(n) % 8] * 2 + 0.5 * rng.standard_normal((n, 16))).astype(np.float32)
    )


def test_codes_tell_clusters_apart_and_none_is_dead() -> None:
    x = points()
    weights, codebooks = rqvae.fit(x, levels=2, size=8, epochs=60, seed=0)
    codes = quantize(rqvae.encoded(x, weights), codebooks)
    assert [len(set(codes[:, level])) for level in range(2)] == [8, 8]
    cluster = np.arange(300) % 8
    purity = sum(np.bincount(cluster[codes[:, 0] == code]).max() for code in set(codes[:, 0])) / 300
    assert purity > 0.8


def test_equal_seeds_repeat_and_the_global_seed_is_not_touched() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    _, first = rqvae.fit(points(), levels=2, size=8, epochs=5, seed=1)
    assert torch.equal(torch.rand(3), expected)
    _, second = rqvae.fit(points(), levels=2, size=8, epochs=5, seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))

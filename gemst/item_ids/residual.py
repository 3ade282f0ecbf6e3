"""Residual codebooks: learn them by balanced k-means, read codes off them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gemst.item_ids.embeddings import Floats

Ints = NDArray[np.int32]

_SLACK = 1.25  # a balanced cell holds at most this many times the mean
_ROUNDS = 8  # assignments under that bound after plain k-means
_BLOCK = 50_000_000  # distances held at once: 200 MB


def kmeans(x: Floats, size: int, seed: int, balanced: bool) -> Floats:
    """Centroids (size, d) of `x` (n, d) by faiss; `balanced` adds rounds in which no cell exceeds its share.

    With fewer points than centroids the points themselves come first, then copies of the mean with small noise.
    """
    import faiss

    n, d = x.shape
    if n <= size:
        rng = np.random.default_rng(seed)
        spread = max(float(x.std()), 1e-6)
        rest = x.mean(0) + 0.1 * spread * rng.standard_normal((size - n, d), np.float32)
        return np.concatenate([x, rest]).astype(np.float32)
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)  # a sum in another order is another clustering
    algorithm = faiss.Kmeans(d, size, niter=25, seed=seed, min_points_per_centroid=1, max_points_per_centroid=1000)
    algorithm.train(np.ascontiguousarray(x))
    faiss.omp_set_num_threads(threads)
    centroids: Floats = np.array(algorithm.centroids, np.float32)
    if balanced:
        for _ in range(_ROUNDS):
            centroids = means(x, bounded(x, centroids), centroids)
    return revive(x, centroids)


def bounded(x: Floats, centroids: Floats) -> Ints:
    """Codes (n,) of the nearest centroids such that none holds more than its balanced share."""
    from gemst.item_ids.collisions import assign

    size = len(centroids)
    room = np.full((1, size), int(np.ceil(_SLACK * len(x) / size)), np.int64)
    return assign(x, centroids, np.zeros(len(x), np.int64), room, nearest(x, centroids))


def means(x: Floats, codes: Ints, centroids: Floats) -> Floats:
    """Mean of each code's points; a code without any keeps its centroid."""
    sums = np.zeros_like(centroids)
    np.add.at(sums, codes, x)
    counts = np.bincount(codes, minlength=len(centroids))[:, None]
    return np.where(counts > 0, sums / np.maximum(counts, 1), centroids).astype(np.float32)


def revive(x: Floats, centroids: Floats) -> Floats:
    """Move centroids nobody is nearest to onto the points that are farthest from theirs, until all are in use.

    Stops when every distinct point has a centroid of its own.
    """
    centroids = centroids.copy()
    for _ in range(20):
        codes = nearest(x, centroids)
        dead = np.flatnonzero(np.bincount(codes, minlength=len(centroids)) == 0)
        if len(dead) == 0:
            break
        error = np.square(x - centroids[codes]).sum(1)
        far = np.argsort(-error, kind="stable")
        far = far[error[far] > 1e-10]
        _, first = np.unique(x[far], axis=0, return_index=True)  # equal points would share one revived centroid
        far = far[np.sort(first)][: len(dead)]
        if len(far) == 0:
            break
        centroids[dead[: len(far)]] = x[far]
    return centroids


def nearest(x: Floats, centroids: Floats) -> Ints:
    """Code (n,) of the nearest centroid, the lower one among equals."""
    step = max(1, _BLOCK // len(centroids))
    parts = [distances(x[i : i + step], centroids).argmin(1) for i in range(0, len(x), step)]
    return np.concatenate(parts).astype(np.int32) if parts else np.empty(0, np.int32)


def distances(x: Floats, centroids: Floats) -> Floats:
    """Squared distances (n, size)."""
    result: Floats = np.square(x).sum(1)[:, None] + (np.square(centroids).sum(1) - 2 * (x @ centroids.T))
    return result


def quantize(x: Floats, codebooks: list[Floats]) -> Ints:
    """Greedy residual codes (n, levels): the nearest code of each level for what the levels before leave."""
    codes, residual = np.empty((len(x), len(codebooks)), np.int32), x.copy()
    for level, codebook in enumerate(codebooks):
        codes[:, level] = nearest(residual, codebook)
        residual -= codebook[codes[:, level]]
    return codes

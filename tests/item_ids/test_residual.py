"""Codebooks: balanced, nothing wasted, repeatable."""

from __future__ import annotations

import numpy as np

from gemst.item_ids.residual import bounded, kmeans, nearest, quantize, revive


def blobs(n: int = 400, d: int = 8) -> np.ndarray:
    """Clusters of very different size."""
    rng = np.random.default_rng(0)
    centres = 4 * rng.standard_normal((10, d))
    of = rng.choice(10, n, p=np.array([0.5, *[0.5 / 9] * 9]))
    return (centres[of] + 0.3 * rng.standard_normal((n, d))).astype(np.float32)


def test_balanced_codebooks_spread_the_items() -> None:
    x = blobs()
    plain, balanced = (np.bincount(nearest(x, kmeans(x, 16, 0, balanced=flag)), minlength=16) for flag in (False, True))
    assert balanced.max() < plain.max()
    assert balanced.min() >= 1
    assert np.bincount(bounded(x, kmeans(x, 16, 0, balanced=True)), minlength=16).max() <= np.ceil(1.25 * 400 / 16)


def test_equal_seeds_give_equal_codebooks_whatever_the_number_of_threads() -> None:
    import faiss

    x, found, threads = blobs(), [], faiss.omp_get_max_threads()
    for count in (1, 2):
        faiss.omp_set_num_threads(count)
        found.append(kmeans(x, 16, 3, balanced=True))
        assert faiss.omp_get_max_threads() == count
    faiss.omp_set_num_threads(threads)
    assert np.array_equal(*found)


def test_dead_codes_move_to_the_points_worst_served() -> None:
    x = np.array([[0.0], [0.1], [5.0], [5.2], [9.0]], np.float32)
    alive = revive(x, np.array([[0.0], [1000.0], [-1000.0]], np.float32))
    assert sorted(np.bincount(nearest(x, alive), minlength=3))[0] >= 1
    assert 9.0 in alive


def test_revival_ends_when_there_are_more_codes_than_distinct_points() -> None:
    x = np.array([[1.0], [1.0], [2.0]], np.float32)
    assert len(np.unique(nearest(x, revive(x, np.arange(9, dtype=np.float32)[:, None] * 100)))) == 2


def test_each_level_quantizes_what_the_levels_before_leave() -> None:
    x = blobs()
    codebooks, residual = [], x.copy()
    errors = []
    for level in range(3):
        codebooks.append(kmeans(residual, 16, level, balanced=False))
        residual = residual - codebooks[-1][nearest(residual, codebooks[-1])]
        errors.append(np.square(residual).mean())
    codes = quantize(x, codebooks)
    rebuilt = sum(codebook[codes[:, level]] for level, codebook in enumerate(codebooks))
    np.testing.assert_allclose(x - rebuilt, residual, atol=1e-4)
    assert errors[0] > errors[1] > errors[2]


def test_fewer_points_than_codes() -> None:
    x = blobs(5)
    codebook = kmeans(x, 16, 0, balanced=True)
    assert codebook.shape == (16, 8)
    assert sorted(nearest(x, codebook)) == [0, 1, 2, 3, 4]

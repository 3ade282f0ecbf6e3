"""Resolution: unique whenever there is room, minimal, stable, and blind to nothing that is already published."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemst.item_ids.collisions import assign, resolve
from gemst.item_ids.residual import distances, quantize


def distinct(codes: np.ndarray) -> int:
    return len(np.unique(codes, axis=0))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_ids_become_unique_even_in_a_full_space_and_beside_published_ones(data: st.DataObject) -> None:
    depth, size = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    room = size**depth
    n = data.draw(st.integers(1, room))
    published = data.draw(st.integers(0, room - n))
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    codebooks = [rng.standard_normal((size, 3)).astype(np.float32) for _ in range(depth)]
    x = rng.standard_normal((n, 3)).astype(np.float32)
    x[: n // 2] = x[0]  # many items with one and the same vector
    taken = np.stack(np.unravel_index(rng.permutation(room)[:published], (size,) * depth), axis=1).astype(np.int32)
    codes = resolve(x, codebooks, quantize(x, codebooks), taken)
    assert distinct(np.concatenate([codes, taken])) == n + published
    assert (codes >= 0).all()
    assert (codes < size).all()


def test_codes_without_a_collision_stay_as_they_are() -> None:
    rng = np.random.default_rng(0)
    codebooks = [rng.standard_normal((16, 4)).astype(np.float32) for _ in range(3)]
    x = rng.standard_normal((20, 4)).astype(np.float32)
    codes = quantize(x, codebooks)
    unique = np.sort(np.unique(codes, axis=0, return_index=True)[1])
    assert (resolve(x[unique], codebooks, codes[unique]) == codes[unique]).all()


def test_the_nearest_keeps_the_code_and_the_other_takes_the_nearest_free_one() -> None:
    codebooks = [np.array([[0.0], [100.0]], np.float32), np.array([[0.0], [1.0], [5.0]], np.float32)]
    x = np.array([[0.4], [0.1], [100.9]], np.float32)
    before = quantize(x, codebooks)
    assert before.tolist() == [[0, 0], [0, 0], [1, 1]]
    assert resolve(x, codebooks, before).tolist() == [[0, 1], [0, 0], [1, 1]]


def test_a_full_bucket_overflows_into_the_next_nearest_bucket() -> None:
    codebooks = [np.array([[0.0], [10.0], [99.0]], np.float32), np.array([[0.0], [1.0]], np.float32)]
    x = np.array([[0.0], [0.1], [3.0]], np.float32)
    codes = resolve(x, codebooks, quantize(x, codebooks))
    assert distinct(codes) == 3
    assert codes[2].tolist() == [1, 0]  # the farthest of the three moves, to the bucket at 10


def test_assignment_is_stable() -> None:
    rng = np.random.default_rng(2)
    x, codebook = rng.standard_normal((30, 2)).astype(np.float32), rng.standard_normal((6, 2)).astype(np.float32)
    cost = distances(x, codebook)
    codes = assign(x, codebook, np.zeros(30, np.int64), np.full((1, 6), 5), cost.argmin(1).astype(np.int32))
    assert (np.bincount(codes, minlength=6) == 5).all()
    worst = np.array([cost[codes == code, code].max() for code in range(6)])
    rather = cost < cost[np.arange(30), codes][:, None]
    assert not (rather & (cost < worst)).any()  # no item and code would both rather have each other


def resolve_slowly(x: np.ndarray, codebooks: list[np.ndarray], codes: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """The whole table of cells, and in every round the whole line of everybody."""
    final, residual, size = np.empty_like(codes), x.copy(), len(codebooks[0])
    everyone = np.arange(len(x))
    prefixes, moved = np.zeros((len(x) + len(taken), 0), np.int32), np.zeros(len(x), bool)
    for level, codebook in enumerate(codebooks):
        groups, both = np.unique(prefixes, axis=0, return_inverse=True)
        own, cells = both[: len(x)], both[len(x) :] * size + taken[:, level]
        room = size ** (len(codebooks) - level - 1) - np.bincount(cells, minlength=len(groups) * size)
        cost = distances(residual, codebook)
        open_cost = np.where(room.reshape(-1, size)[own] > 0, cost, np.inf)
        wanted = np.where(moved, open_cost.argmin(1), codes[:, level])
        preference = cost.copy()
        preference[everyone, wanted] = -np.inf
        order, asked = np.argsort(preference, axis=1, kind="stable"), np.zeros(len(x), np.int64)
        while True:
            choice = order[everyone, asked]
            line = np.lexsort((everyone, cost[everyone, choice], own * size + choice))
            cell = (own * size + choice)[line]
            behind = line[everyone - np.searchsorted(cell, cell) >= room[cell]]
            if len(behind) == 0:
                break
            asked[behind] += 1
        final[:, level] = choice
        moved |= choice != codes[:, level]
        residual -= codebook[choice]
        prefixes = np.concatenate([prefixes, np.concatenate([final[:, [level]], taken[:, [level]]])], axis=1)
    return final


@pytest.mark.parametrize("seed", range(12))
def test_the_same_as_the_slow_way(seed: int) -> None:
    """Numbers with few digits: sums are exact in any order, and many distances are equal."""
    rng = np.random.default_rng(seed)
    depth, size = rng.integers(1, 4), rng.integers(2, 9)
    space = size**depth
    n = int(rng.integers(1, space + 1))
    codebooks = [rng.integers(-9, 10, (size, 2)).astype(np.float32) for _ in range(depth)]
    x = rng.integers(-20, 21, (n, 2)).astype(np.float32)
    picked = rng.permutation(space)[: rng.integers(0, space - n + 1)]
    taken = np.stack(np.unravel_index(picked, (size,) * depth), axis=1).astype(np.int32)
    codes = quantize(x, codebooks)
    assert (resolve(x, codebooks, codes, taken) == resolve_slowly(x, codebooks, codes, taken)).all()


def test_no_table_of_all_codes_below_all_prefixes() -> None:
    """256 codes for each of 20,000 prefixes would be 41 MB."""
    rng = np.random.default_rng(0)
    numbers = rng.permutation(256**2)[:20_000]
    codes = np.stack([numbers // 256, numbers % 256, numbers % 7], axis=1).astype(np.int32)
    codebooks = [rng.standard_normal((256, 2)).astype(np.float32) for _ in range(3)]
    tracemalloc.start()
    assert (resolve(rng.standard_normal((20_000, 2)).astype(np.float32), codebooks, codes) == codes).all()
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


def test_too_many_items_are_refused() -> None:
    with pytest.raises(ValueError, match="3 items, 2 IDs"):
        resolve(np.zeros((3, 1), np.float32), [np.zeros((2, 1), np.float32)], np.zeros((3, 1), np.int32))

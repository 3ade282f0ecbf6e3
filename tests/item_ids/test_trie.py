"""The trie holds exactly the given IDs, whatever their number, length and order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemst.item_ids import trie
from gemst.item_ids.trie import Trie


@st.composite
def catalogues(draw: st.DrawFn) -> np.ndarray:
    """Distinct codes (n, levels) in random order."""
    depth, size = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    room = size**depth
    numbers = draw(st.lists(st.integers(0, room - 1), min_size=1, max_size=min(room, 40), unique=True))
    return np.stack(np.unravel_index(numbers, (size,) * depth), axis=1).astype(np.int32)


def walk(built: Trie, prefix: tuple[int, ...] = (), node: int = 0) -> list[tuple[tuple[int, ...], int]]:
    """Every (ID, leaf item) found by following the arrays."""
    if len(prefix) == built.depth:
        return [(prefix, int(built.items[node - 1 - built.levels[-2]]))]
    edges = range(built.offsets[node], built.offsets[node + 1])
    return [found for edge in edges for found in walk(built, (*prefix, int(built.codes[edge])), edge + 1)]


@given(catalogues())
@settings(max_examples=60, deadline=None)
def test_walking_the_trie_gives_every_id_once_and_its_item(codes: np.ndarray) -> None:
    found = walk(trie.build(codes))
    assert sorted(found) == sorted((tuple(code), row) for row, code in enumerate(codes.tolist()))


@given(catalogues())
@settings(max_examples=60, deadline=None)
def test_paths_follow_the_codes_and_leaves_count_the_items_below(codes: np.ndarray) -> None:
    built = trie.build(codes)
    paths = built.paths(np.arange(len(codes)))
    assert (built.codes[paths] == codes).all()
    edges, below = np.unique(paths, return_counts=True)
    assert (built.leaves[edges] == below).all()
    assert len(edges) == len(built.codes)


def test_rows_name_the_items_of_a_part_of_the_catalogue() -> None:
    codes = np.array([[1, 0], [0, 2]], np.int32)
    built = trie.build(codes, np.array([7, 3], np.int32))
    assert built.items.tolist() == [3, 7]
    assert (built.paths(np.array([0, 100, -1])) == -1).all()
    assert built.codes[built.paths(np.array([7]))].tolist() == [[1, 0]]


def test_width_is_the_largest_number_of_children() -> None:
    built = trie.build(np.array([[0, 0], [0, 1], [0, 5], [4, 2]], np.int32))
    assert built.widths == [2, 3]


def test_wide_codes_that_fit_no_single_key_sort_the_same() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 2**30, (50, 4)).astype(np.int32)
    assert sorted(walk(trie.build(codes))) == sorted((tuple(code), row) for row, code in enumerate(codes.tolist()))


def test_equal_ids_are_refused() -> None:
    with pytest.raises(ValueError, match="1 item IDs are not unique"):
        trie.build(np.array([[0, 1], [0, 1]], np.int32))


def test_it_survives_the_disk(tmp_path) -> None:
    built = trie.build(np.array([[2, 0], [0, 1], [2, 1]], np.int32))
    built.save(tmp_path / "trie.safetensors")
    assert walk(Trie.load(tmp_path / "trie.safetensors")) == walk(built)

"""The trie over item IDs as CSR arrays: next-token candidates are a gather, whatever the size of the catalogue."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]


@dataclass(frozen=True)
class Trie:
    """Nodes are numbered breadth first, the root is 0, so edge e leads to node e + 1 and a level is one range.

    `offsets` (inner nodes + 1) int32: the edges of node v are offsets[v] to offsets[v + 1].
    `codes` (edges) int32: the code an edge stands for, local to its level, ascending within a node.
    `items` (leaves) int32: the item row of each leaf, in node order.
    `leaves` (edges) int32: leaves below each edge.
    `levels` (levels + 1) int64: first edge of each level; the last entry is the number of edges.
    """

    offsets: Ints
    codes: Ints
    items: Ints
    leaves: Ints
    levels: NDArray[np.int64]

    @property
    def depth(self) -> int:
        """Levels of codes."""
        return len(self.levels) - 1

    @cached_property
    def widths(self) -> list[int]:
        """By level, the largest number of children of a node whose children are on it."""
        nodes = [0, *(int(edge) + 1 for edge in self.levels[:-1])]  # first node above each level, and past the last
        return [int(np.diff(self.offsets[first : last + 1]).max(initial=0)) for first, last in pairwise(nodes)]

    @cached_property
    def walks(self) -> dict[Any, Any]:
        """What the ranking has made of the arrays, by device: kept as long as they are, for request after request."""
        return {}

    def paths(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Edges (n, levels) from the root to each item row, -1 for rows that are not in the trie."""
        leaf = np.full(len(rows), -1, np.int64)
        inside = (rows >= 0) & (rows < len(self._leaf_of))
        leaf[inside] = self._leaf_of[rows[inside]]
        steps = zip(self.levels[:-1], self._leaf_ends, strict=True)
        edges = np.stack([first + np.searchsorted(ends, leaf, side="right") for first, ends in steps], axis=1)
        edges[leaf < 0] = -1
        return edges

    @cached_property
    def _leaf_of(self) -> Ints:
        """Leaf number of each item row, -1 where it has none."""
        leaf_of = np.full(int(self.items.max(initial=-1)) + 1, -1, np.int32)
        leaf_of[self.items] = np.arange(len(self.items), dtype=np.int32)
        return leaf_of

    @cached_property
    def _leaf_ends(self) -> list[NDArray[np.int64]]:
        """For each level, the leaf number after the last leaf of each edge."""
        bounds = zip(self.levels[:-1], self.levels[1:], strict=True)
        return [np.cumsum(self.leaves[first:last], dtype=np.int64) for first, last in bounds]

    def save(self, path: Path) -> None:
        """Write the arrays as safetensors."""
        from safetensors.numpy import save_file

        save_file({name: getattr(self, name) for name in _ARRAYS}, path)

    @classmethod
    def load(cls, path: Path) -> Trie:
        """Read what `save` wrote."""
        from safetensors.numpy import load_file

        return cls(**load_file(path))


_ARRAYS = ("offsets", "codes", "items", "leaves", "levels")


def build(codes: Ints, rows: Ints | None = None) -> Trie:
    """Build the trie of `codes` (n, levels), each row unique and non-negative; `rows` (n,) are the items' rows.

    One sort and a few passes: 10 M IDs of length 4 take seconds. Raises ValueError when two rows are equal.
    """
    n, depth = codes.shape
    if n == 0:
        none = np.empty(0, np.int32)
        return Trie(np.zeros(2, np.int32), none, none, none, np.zeros(depth + 1, np.int64))
    order = _order(codes)
    ordered = codes[order]
    new = np.zeros(n, bool)  # does the path of this row up to this level differ from the row before?
    new[0] = True
    starts = []
    for level in range(depth):
        new[1:] |= ordered[1:, level] != ordered[:-1, level]
        starts.append(np.flatnonzero(new))
    if len(starts[-1]) != n:
        raise ValueError(f"{n - len(starts[-1])} item IDs are not unique")
    levels = np.cumsum([0] + [len(start) for start in starts], dtype=np.int64)
    # First edge of every inner node: where its first row stands among the starts of the next level.
    firsts = [np.zeros(1, np.int64)]
    firsts += [levels[level + 1] + np.searchsorted(starts[level + 1], starts[level]) for level in range(depth - 1)]
    offsets = np.concatenate([*firsts, levels[-1:]]).astype(np.int32)
    return Trie(
        offsets=offsets,
        codes=np.concatenate([ordered[start, level] for level, start in enumerate(starts)]).astype(np.int32),
        items=(order if rows is None else rows[order]).astype(np.int32),
        leaves=np.concatenate([np.diff(start, append=n) for start in starts]).astype(np.int32),
        levels=levels,
    )


def _order(codes: Ints) -> NDArray[np.int64]:
    """Row order that sorts `codes` lexicographically; one integer key where it fits into 63 bits."""
    bits = [int(column.max()).bit_length() or 1 for column in codes.T]
    if sum(bits) > 62:
        return np.lexsort(codes.T[::-1])
    key = np.zeros(len(codes), np.int64)
    for level, width in enumerate(bits):
        key = (key << width) | codes[:, level]
    return np.argsort(key, kind="stable")

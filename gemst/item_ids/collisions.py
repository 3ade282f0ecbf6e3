"""Unique IDs out of codes that collide: items move to the nearest code that still has room below it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gemst.item_ids.embeddings import Floats
from gemst.item_ids.residual import distances

Ints = NDArray[np.int32]
Longs = NDArray[np.int64]

_BLOCK = 20_000  # items whose preferences are sorted at once


def resolve(x: Floats, codebooks: list[Floats], codes: Ints, taken: Ints | None = None) -> Ints:
    """Codes (n, levels) without two equal rows, as close to `codes` as their distances allow.

    From the first level down, a code under a given prefix has room for as many items as there are IDs below it, less
    those already `taken` (published (m, levels), never moved). Where more want it, the nearest stay and the others
    take the next nearest code with room; below a move, codes are chosen anew from the new residual. Deterministic.
    Raises ValueError when the code space is too small.
    """
    n, depth = codes.shape
    sizes = [len(codebook) for codebook in codebooks]
    taken = np.empty((0, depth), np.int32) if taken is None else taken
    if n + len(taken) > np.prod(np.array(sizes, dtype=object)):
        raise ValueError(f"{n + len(taken)} items, {np.prod(sizes)} IDs")
    final, residual = np.empty_like(codes), x.copy()
    group, taken_group = np.zeros(n, np.int64), np.zeros(len(taken), np.int64)
    moved = np.zeros(n, bool)
    for level, codebook in enumerate(codebooks):
        below = int(np.prod(np.array(sizes[level + 1 :], dtype=object)))
        _, both = np.unique(np.concatenate([group, taken_group]), return_inverse=True)
        own, used = both[:n], both[n:] * sizes[level] + taken[:, level]
        wanted = codes[:, level].copy()
        prefixes, at = np.unique(own[moved], return_inverse=True)
        wanted[moved] = _nearest_open(residual[moved], codebook, below - _counts(used, prefixes, sizes[level])[at])
        final[:, level] = wanted
        # Prefixes are as many as items: a table of all their codes is made of the few where something has to give way.
        crowded = _crowded(own * sizes[level] + wanted, used, below, sizes[level])
        members = np.flatnonzero(np.isin(own, crowded))
        final[members, level] = assign(
            residual[members],
            codebook,
            np.searchsorted(crowded, own[members]),
            below - _counts(used, crowded, sizes[level]),
            wanted[members],
        )
        moved |= final[:, level] != codes[:, level]
        residual -= codebook[final[:, level]]
        group = own * sizes[level] + final[:, level]
        taken_group = used
    return final


def assign(x: Floats, codebook: Floats, group: Longs, room: Longs, wanted: Ints) -> Ints:
    """Codes (n,) such that at most room[g, c] items of group g hold code c, each as near as that allows.

    `wanted` (n,) is every item's first choice, later ones are by distance; a code keeps the nearest of those who ask
    (deferred acceptance, so no item and code would both rather have each other). Only groups with a code that too many
    want are worked on. `room` (groups, codes); every group must have room for its items.
    """
    size = len(codebook)
    codes = wanted.copy()
    cells = group * size + wanted
    crowded = np.any(np.bincount(cells, minlength=room.size).reshape(room.shape) > room, axis=1)
    members = np.flatnonzero(crowded[group])
    if len(members) == 0:
        return codes
    cost = distances(x[members], codebook)
    order = np.empty(cost.shape, np.int32)
    for start in range(0, len(members), _BLOCK):  # a sort takes three times the memory of what it sorts
        preference = cost[start : start + _BLOCK].copy()
        preference[np.arange(len(preference)), wanted[members[start : start + _BLOCK]]] = -np.inf
        order[start : start + _BLOCK] = np.argsort(preference, axis=1, kind="stable")
    asked = np.zeros(len(members), np.int64)  # position in the order of the code each one holds or asks for
    free = room.ravel()
    choice = order[:, 0].copy()
    cell = group[members] * size + choice
    while True:
        # A cell that nobody asks any more holds no more than its room since it was last sorted.
        line = np.flatnonzero((np.bincount(cell, minlength=len(free)) > free)[cell])
        if len(line) == 0:
            break
        # Within each cell the nearest come first; whoever stands behind its room has to ask elsewhere.
        line = line[np.lexsort((cost[line, choice[line]], cell[line]))]
        standing = np.arange(len(line)) - np.searchsorted(cell[line], cell[line])
        turned = line[standing >= free[cell[line]]]
        asked[turned] += 1
        choice[turned] = order[turned, asked[turned]]
        cell[turned] = group[members[turned]] * size + choice[turned]
    codes[members] = choice
    return codes


def _counts(cells: Longs, groups: Longs, size: int) -> Longs:
    """How many of `cells` (group * size + code) there are of every code of `groups` (ascending), (groups, size)."""
    cells = cells[np.isin(cells // size, groups)]
    at = np.searchsorted(groups, cells // size) * size + cells % size
    return np.bincount(at, minlength=len(groups) * size).reshape(-1, size)


def _crowded(wanted: Longs, used: Longs, below: int, size: int) -> Longs:
    """Groups, ascending, with a cell that more want than it has IDs left: `below`, less those `used`."""
    cells, back, counts = np.unique(np.concatenate([wanted, used]), return_inverse=True, return_counts=True)
    asked = np.zeros(len(cells), bool)
    asked[back[: len(wanted)]] = True
    return np.unique(cells[asked & (counts > below)] // size)


def _nearest_open(x: Floats, codebook: Floats, room: Longs) -> Ints:
    """Code (n,) of the nearest centroid with any room."""
    return np.where(room > 0, distances(x, codebook), np.inf).argmin(1).astype(np.int32)

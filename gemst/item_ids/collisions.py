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
        prefixes, both = np.unique(np.concatenate([group, taken_group]), return_inverse=True)
        own, used = both[:n], both[n:] * sizes[level] + taken[:, level]
        room = below - np.bincount(used, minlength=len(prefixes) * sizes[level]).reshape(-1, sizes[level])
        wanted = codes[:, level].copy()
        wanted[moved] = _nearest_open(residual[moved], codebook, room[own[moved]])
        final[:, level] = assign(residual, codebook, own, room, wanted)
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
    active = np.arange(len(members))
    while len(active):
        choice = order[np.arange(len(members)), asked]
        cell = group[members] * size + choice
        # Within each cell the nearest come first; whoever stands behind its room has to ask elsewhere.
        line = np.lexsort((np.arange(len(members)), cost[np.arange(len(members)), choice], cell))
        standing = np.arange(len(members)) - np.searchsorted(cell[line], cell[line])
        active = line[standing >= free[cell[line]]]
        asked[active] += 1
    codes[members] = order[np.arange(len(members)), asked]
    return codes


def _nearest_open(x: Floats, codebook: Floats, room: Longs) -> Ints:
    """Code (n,) of the nearest centroid with any room."""
    return np.where(room > 0, distances(x, codebook), np.inf).argmin(1).astype(np.int32)

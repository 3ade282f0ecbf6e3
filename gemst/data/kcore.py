"""The iterative k-core of an event log."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def k_core(users: NDArray[np.uint32], items: NDArray[np.uint32], k: int) -> NDArray[np.bool_]:
    """Mask of the largest set of events in which every user and every item has at least `k` events.

    `users` and `items` (events,) are codes from 0; events of both tasks count, repeats too. The set is unique, so the
    order of the events does not matter.
    """
    kept = np.ones(len(users), dtype=bool)
    if k <= 1 or not len(users):
        return kept
    alive = np.arange(len(users))
    while True:
        by_user, by_item = np.bincount(users[alive]), np.bincount(items[alive])
        enough = (by_user[users[alive]] >= k) & (by_item[items[alive]] >= k)
        if enough.all():
            break
        alive = alive[enough]
        if not len(alive):
            break
    kept[:] = False
    kept[alive] = True
    return kept

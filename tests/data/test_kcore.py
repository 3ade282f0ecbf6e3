import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gemst.data.kcore import k_core

pairs = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=60)


def by_hand(events: list[tuple[int, int]], k: int) -> list[bool]:
    alive = [True] * len(events)
    changed = True
    while changed:
        changed = False
        for i, event in enumerate(events):
            for side in (0, 1):
                if (
                    alive[i]
                    and sum(a and other[side] == event[side] for a, other in zip(alive, events, strict=True)) < k
                ):
                    alive[i], changed = False, True
    return alive


@given(pairs, st.integers(0, 5))
def test_equals_taking_out_one_event_at_a_time(events, k):
    users, items = (np.array([event[side] for event in events], dtype=np.uint32) for side in (0, 1))
    assert k_core(users, items, k).tolist() == by_hand(events, k)

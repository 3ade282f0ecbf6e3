from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemst.data import blocks


@given(st.lists(st.integers(0, 30), max_size=30), st.integers(1, 40))
def test_blocks_are_bounded_and_hold_every_row_once(sizes, most):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "CELLS", most)
        found = list(blocks.blocks(sizes))
    assert [row for block in found for row in range(len(sizes))[block]] == list(range(len(sizes)))
    assert all(sum(sizes[block]) <= most or len(sizes[block]) == 1 for block in found)
    # None could take in the first row of the next one.
    assert all(sum(sizes[b.start : b.stop + 1]) > most for b in found[:-1])


def test_spread_puts_each_row_beside_its_slice():
    table = pl.DataFrame({"name": ["a", "b", "c"], "begin": [2, 0, 1], "length": [2, 0, 3]})
    values = pl.DataFrame({"value": np.arange(10, 15)})
    assert blocks.spread(table, values).rows() == [("a", 12), ("a", 13), ("c", 11), ("c", 12), ("c", 13)]
    assert blocks.spread(table.clear(), values).columns == ["name", "value"]

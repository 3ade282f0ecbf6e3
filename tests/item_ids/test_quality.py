"""The quality report's numbers, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from gemst.item_ids import ItemIds
from gemst.item_ids.quality import report


def test_numbers_of_a_small_build() -> None:
    before = np.array([[0, 0], [0, 0], [0, 1], [1, 0], [2, 2]], np.int32)
    after = np.array([[0, 0], [0, 2], [0, 1], [1, 0], [2, 2]], np.int32)
    active = np.array([True, True, True, True, False])
    ids = ItemIds([*"abcde"], after, (4, 3), "rq-kmeans", np.zeros(5, np.int32), active)
    quality = report(ids, before)
    assert quality["items"] == 4
    assert quality["retired"] == 1
    assert quality["unique_ratio_before"] == 0.75
    assert quality["unique_ratio_after"] == 1.0
    assert quality["collisions_before"] == quality["moved"] == 1
    assert quality["kept_first_level"] == 1.0
    assert quality["singleton_rate"] == 0.5  # buckets 0 (three items) and 1 (one)
    assert quality["largest_bucket"] == 3
    first, second = quality["levels"]
    assert first["coverage"] == 0.5
    assert first["dead"] == 2
    assert first["entropy_bits"] == pytest.approx(-(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25)))
    assert first["perplexity"] == pytest.approx(2 ** first["entropy_bits"])
    assert first["gini"] == pytest.approx(0.625)  # of 0, 0, 1, 3
    assert second["coverage"] == 1.0
    assert second["largest"] == 2

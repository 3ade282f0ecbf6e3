from __future__ import annotations

import polars as pl
import pytest

from gemst.data import tables
from gemst.data.diff import diff, divergence, lines
from gemst.errors import GemstError
from tests.data.conftest import events_table, items_table


def write(folder, items, events):
    tables.write_items(items, folder / "items.parquet")
    tables.write_events(events, folder / "events.parquet")
    return folder


def test_says_what_came_went_and_changed(tmp_path):
    before = write(
        tmp_path / "a",
        items_table("a", "b", "c"),
        events_table(("u", "a", 0, None), ("u", "b", 1, "red"), ("v", "a", 2, None)),
    )
    items = items_table("a", "b", "d", title=["Film a", "Film B, the remake", "Film d"])
    after = write(
        tmp_path / "b",
        items,
        events_table(("u", "a", 0, None), ("u", "b", 1, "red"), ("w", "d", 3, "blue"), ("u", "d", 4, None)),
    )
    found = diff(before, after)
    assert found["changes"] == {
        "new items": 1,
        "gone items": 1,
        "changed items": 1,
        "new users": 1,
        "gone users": 1,
        "new events": 2,
        "gone events": 1,
        "events of new items": 2,
        "events of new users": 1,
    }
    sizes = {row["name"]: (row["before"], row["after"]) for row in found["sizes"]}
    assert sizes["events"] == (3, 4)
    assert sizes["search events"] == (1, 2)
    assert found["drift"]["query"] == pytest.approx(0.311278, abs=1e-6)
    assert any(line.startswith("new events") and line.endswith(" 2") for line in lines(found))


def test_equal_versions_have_no_difference(tmp_path):
    folder = write(tmp_path / "a", items_table("a"), events_table(("u", "a", 0, "q"), ("u", "a", 1, None)))
    found = diff(folder, folder)
    assert set(found["changes"].values()) == {0}
    assert set(found["drift"].values()) == {0.0}


def test_divergence_is_symmetric_and_bounded():
    left, right = pl.Series(list("aab")), pl.Series(list("abbbc"))
    assert divergence(left, right) == divergence(right, left)
    assert 0 < divergence(left, right) < 1
    assert divergence(pl.Series(["a"]), pl.Series(["b"])) == 1
    assert divergence(pl.Series([], dtype=pl.String), pl.Series(["b"])) == 1


def test_missing_version(tmp_path):
    with pytest.raises(GemstError, match=r"items\.parquet does not exist"):
        diff(tmp_path, tmp_path)

from __future__ import annotations

import polars as pl
import pytest

from gemst.data.rules import item_rules, judge
from gemst.data.sources.base import Loaded, settle
from gemst.data.sources.proxy import one_each
from tests.data.conftest import events_table, items_table

# What two rows of one item differ in.
ROWS = {
    "title": {"title": ["B", "A"]},
    "missing title": {"title": [None, "B"]},
    "blank title": {"title": [" ", "B"]},
    "both titles blank": {"title": [" ", ""]},
    "text": {"title": ["A", "A"], "text": [None, "some"]},
    "categories": {"title": ["A", "A"], "categories": [["Z"], ["A", "B"]]},
    "no categories": {"title": ["A", "A"], "categories": [["Z"], None]},
}


@pytest.mark.parametrize("columns", ROWS.values(), ids=ROWS)
def test_the_row_that_is_kept_is_the_one_that_queries_are_made_of(columns):
    twice = items_table("i", "i", **columns)
    for rows in (twice, twice.reverse()):
        items = settle(Loaded(rows, events_table(("u", "i", 0, None)), rows_in={"items": 2, "events": 1})).items
        kept = items.filter(judge(items, item_rules()).is_null())
        found = one_each(rows).with_columns(pl.col("categories").fill_null([]))
        assert found.equals(kept if len(kept) else items.head(1))


def test_a_catalogue_without_repeats_stays_as_it_is():
    once = items_table("b", "a", title=["", "A"])
    assert one_each(once) is once

"""Small logs: generated ones for properties, written-out ones for pinned results, shared ones where present."""

from __future__ import annotations

import datetime as dt
import os
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import strategies as st

from gemst.data.tables import EVENTS, ITEMS

PROJECT = Path(__file__).parents[2]
START = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)


def items_table(*ids: str, **columns: list[Any]) -> pl.DataFrame:
    rows = {
        "item_id": list(ids),
        "title": [f"Film {i}" for i in ids],
        "text": [None] * len(ids),
        "categories": [["Drama"]] * len(ids),
    }
    return pl.DataFrame({**rows, **columns}, schema=ITEMS)


def events_table(*rows: tuple[Any, ...]) -> pl.DataFrame:
    """Rows of (user, item, minutes after START, query or None[, request_id[, shown]])."""
    full = [(*row, None, None)[:6] for row in rows]
    return pl.DataFrame(
        [
            (
                user,
                item,
                START + dt.timedelta(minutes=at),
                "recommendation" if query is None else "search",
                query,
                request,
                shown,
            )
            for user, item, at, query, request, shown in full
        ],
        schema=EVENTS,
        orient="row",
    )


@st.composite
def logs(draw: st.DrawFn) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Items and events with many ties, repeats, shared requests and impressions."""
    catalogue = [f"i{n}" for n in range(draw(st.integers(1, 9)))]
    item = st.sampled_from(catalogue)
    rows = draw(
        st.lists(
            st.tuples(
                st.sampled_from(["ann", "bob", "cy", "dee"]), item, st.integers(0, 6),
                st.sampled_from([None, "old film", "drama"]), st.sampled_from([None, None, "r1", "r2"]),
                st.one_of(st.none(), st.lists(item, max_size=4)),
            ),
            min_size=1, max_size=40,
        )
    )  # fmt: skip
    return items_table(*catalogue), events_table(*rows)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of shared development data sets; skips where it is absent."""
    folder = Path(os.environ.get("GEMST_SHARED_DATA", PROJECT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("shared data sets are absent (set GEMST_SHARED_DATA)")
    return folder


def write_recbole(folder: Path, **files: str) -> Path:
    """Write `name.kind` files such as inter=..., item=... as one RecBole data set."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, content in files.items():
        (folder / f"toy.{kind}").write_text(content, encoding="utf-8")
    return folder

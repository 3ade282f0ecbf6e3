"""Who is excluded, and who is a candidate."""

from __future__ import annotations

from datetime import UTC, datetime

import polars as pl
import pytest

from gemst.evaluation.protocols import candidates, met_items, seen_items
from gemst.evaluation.references.bm25 import BM25
from gemst.evaluation.references.popularity import Popularity

SCHEMA = {
    "user_id": pl.String, "task": pl.String, "query": pl.String, "history": pl.List(pl.String),
    "targets": pl.List(pl.String), "negatives": pl.List(pl.String), "timestamp": pl.Datetime("ms", "UTC"),
}  # fmt: skip
NOW = datetime(2024, 1, 1, tzinfo=UTC)


def example(
    user: str, history: list[str], targets: list[str], query: str | None = None, negatives: list[str] | None = None
) -> dict[str, object]:
    task = "recommendation" if query is None else "search"
    return {
        "user_id": user, "task": task, "query": query, "history": history, "targets": targets,
        "negatives": negatives or [], "timestamp": NOW,
    }  # fmt: skip


def table(*examples: dict[str, object]) -> pl.DataFrame:
    return pl.DataFrame(examples, schema=SCHEMA)


@pytest.fixture
def items() -> pl.DataFrame:
    return pl.DataFrame(
        {
            "item_id": [f"i{n}" for n in range(300)],
            "title": [f"{'red' if n % 2 else 'blue'} film {n} (199{n % 10})" for n in range(300)],
            "text": [None] * 300,
            "categories": [["film"]] * 300,
        },
        schema_overrides={"text": pl.String},
    )


def test_seen_is_the_users_past_and_the_history() -> None:
    train = table(example("u", ["a"], ["b"]), example("v", [], ["z"]))
    valid = table(example("u", ["a", "b"], ["c"]))
    test = table(example("u", ["b", "c", "h"], ["d"]))
    seen = seen_items(test, [train, valid])
    assert seen.rows() == [(0, "a"), (0, "b"), (0, "c"), (0, "h")]
    assert seen.schema == {"row": pl.UInt32, "item_id": pl.String}


def test_nothing_is_left_out_where_a_target_was_met_before() -> None:
    """Else the target would be the one known item left, and naming what was met before the whole answer."""
    train = table(*(example("u", [], [item]) for item in "abc"))
    test = table(
        example("u", ["a", "b", "c"], ["b"]), example("u", ["a", "b", "c"], ["d", "a"]), example("u", [], ["d"])
    )
    assert seen_items(test, [train]).rows() == [(2, "a"), (2, "b"), (2, "c")]
    assert len(met_items(test, [train])) == 9


def test_seen_without_a_past_is_the_history() -> None:
    assert seen_items(table(example("u", ["a", "a"], ["b"])), []).rows() == [(0, "a")]


def test_uniform_candidates_are_the_targets_and_99_unseen_items(items: pl.DataFrame) -> None:
    test = table(example("u", ["i0"], ["i5", "i6"]), example("v", [], ["i7"]))
    seen = pl.DataFrame(
        {"row": [0] * 100, "item_id": [f"i{n}" for n in range(200, 300)]}, schema_overrides={"row": pl.UInt32}
    )
    lists = candidates("uniform99", test, items, seen, seed=3).to_list()
    assert [len(ids) for ids in lists] == [101, 100]
    assert [len(set(ids)) for ids in lists] == [101, 100]
    assert {"i5", "i6"} <= set(lists[0])
    assert "i7" in lists[1]
    assert not set(lists[0]) & set(seen["item_id"])
    assert lists == candidates("uniform99", test, items, seen, seed=3).to_list()
    assert lists != candidates("uniform99", test, items, seen, seed=4).to_list()


def test_uniform_takes_all_there_is_in_a_small_catalogue(items: pl.DataFrame) -> None:
    pool = candidates("uniform99", table(example("u", [], ["i1"])), items.head(10), None, seed=0)
    assert sorted(pool[0]) == sorted(items["item_id"].head(10))


def test_uniform_is_uniform(items: pl.DataFrame) -> None:
    pool = candidates("uniform99", table(*[example(f"u{n}", [], ["i0"]) for n in range(2000)]), items, None, seed=0)
    counts = pool.explode().value_counts(name="n").filter(pl.col("candidates") != "i0")["n"]
    assert len(counts) == 299
    assert counts.mean() == pytest.approx(2000 * 99 / 299)
    assert counts.min() > 540
    assert counts.max() < 790  # 6 standard deviations around 662


def test_candidate_order_does_not_betray_the_target(items: pl.DataFrame) -> None:
    pool = candidates("uniform99", table(*[example(f"u{n}", [], ["i0"]) for n in range(400)]), items, None, seed=0)
    places = pl.DataFrame({"pool": pool}).select(at=pl.col("pool").list.eval(pl.element() == "i0").list.arg_max())["at"]
    assert 40 < places.mean() < 60  # type: ignore[operator]


def test_bm25_candidates_match_the_query_and_only_searches_have_them(items: pl.DataFrame) -> None:
    train = table(example("u", [], ["i1"]))
    test = table(example("u", [], ["i2"], query="red"), example("u", [], ["i4"]))
    pool = candidates("bm25-99", test, items, None, seed=0, bm25=BM25().fit(train, items))
    assert len(pool[0]) == 100
    assert len(pool[1]) == 0
    negatives = set(pool[0]) - {"i2"}
    assert all(int(item[1:]) % 2 for item in negatives)  # all of them red


def test_bm25_needs_its_reference(items: pl.DataFrame) -> None:
    with pytest.raises(ValueError, match="bm25-99"):
        candidates("bm25-99", table(example("u", [], ["i2"], query="red")), items, None, seed=0)


def test_shown_candidates_are_what_the_page_showed(items: pl.DataFrame) -> None:
    test = table(example("u", [], ["i2"], query="red", negatives=["i3", "i4"]), example("u", [], ["i4"]))
    pool = candidates("shown", test, items, None, seed=0)
    assert sorted(pool[0]) == ["i2", "i3", "i4"]
    assert len(pool[1]) == 0


def test_an_unknown_protocol_is_refused(items: pl.DataFrame) -> None:
    with pytest.raises(ValueError, match="leave-one-in"):
        candidates("leave-one-in", table(example("u", [], ["i2"])), items, None, seed=0)


def test_popularity_reranks_ties_by_popularity_not_by_candidate_order(items: pl.DataFrame) -> None:
    train = table(*[example(f"u{n}", [], ["i9"]) for n in range(3)], example("x", [], ["i8"]))
    ranker = Popularity().fit(train, items)
    ordered = ranker.rerank(table(example("u", [], ["i9"])), pl.Series([["i8", "nowhere", "i9"]]))
    assert ordered.select("item_id", "rank").rows() == [("i9", 1), ("i8", 2), ("nowhere", 3)]

"""The metrics equal an independent library's, and each known mistake of released code would be caught."""

from __future__ import annotations

import doctest
import math
from itertools import pairwise

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemst.evaluation import metrics
from gemst.evaluation.metrics import harmonic_mean, relevant_items, table_of_metrics

KS = (1, 3, 10)


def frames(queries: list[tuple[list[str], list[str]]]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """(ranked list, relevant list) per query, as the two tables."""
    ranked = [(row, item, rank) for row, (items, _) in enumerate(queries) for rank, item in enumerate(items, 1)]
    relevant = [(row, item) for row, (_, items) in enumerate(queries) for item in items]
    return (
        pl.DataFrame(ranked, schema={"row": pl.UInt32, "item_id": pl.String, "rank": pl.UInt16}, orient="row"),
        pl.DataFrame(relevant, schema={"row": pl.UInt32, "item_id": pl.String}, orient="row"),
    )


def one(ranked: list[str], relevant: list[str], k: int = 10) -> dict[str, float]:
    line = table_of_metrics(*frames([(ranked, relevant)]), (k,)).row(0, named=True)
    return {name.split("@")[0]: value for name, value in line.items() if name != "row"}


def assert_equals_ranx(queries: list[tuple[list[str], list[str]]]) -> None:
    import numba

    numba.config.DISABLE_JIT = True  # ranx as plain Python is done long before it would be compiled
    from ranx import Qrels, Run, evaluate

    table = table_of_metrics(*frames(queries), KS)
    qrels = Qrels({f"q{row:05d}": dict.fromkeys(relevant, 1) for row, (_, relevant) in enumerate(queries)})
    # ranx orders by score and cannot hold an empty ranking: an item nobody wants stands for it.
    run = Run(
        {
            f"q{row:05d}": {item: -float(at) for at, item in enumerate(items or ["nobody wants"])}
            for row, (items, _) in enumerate(queries)
        }
    )
    for ours, theirs in (("hit", "hit_rate"), ("ndcg", "ndcg"), ("mrr", "mrr"), ("map", "map")):
        for k in KS:
            expected = evaluate(qrels, run, f"{theirs}@{k}", return_mean=False)
            np.testing.assert_allclose(table[f"{ours}@{k}"].to_numpy(), expected, atol=1e-9, err_msg=f"{ours}@{k}")


def test_the_numbers_in_the_docstrings() -> None:
    assert doctest.testmod(metrics).failed == 0


def test_equal_to_ranx_on_random_queries() -> None:
    rng = np.random.default_rng(0)
    catalogue = np.array([f"i{n}" for n in range(40)])
    queries = [
        (
            rng.permutation(catalogue)[: rng.integers(1, 25)].tolist(),
            rng.permutation(catalogue)[: rng.integers(1, 15)].tolist(),
        )
        for _ in range(300)
    ]
    assert_equals_ranx(queries)


@pytest.mark.parametrize(
    ("ranked", "relevant"),
    [
        ([], ["a"]),
        (["a"], ["a"]),
        (["x", "y"], ["a", "b"]),
        (["a", "b", "c"], ["c", "b", "a"]),
        (["a"], ["a", "b", "c"]),
        (list("xyzuvwrstab"), ["a", "b"]),  # found at ranks 10 and 11
        (list("abcdefghijklmnop"), list("abcdefghijklmnop")),  # more relevant than k
        (["x", "a", "y", "b"], ["a", "b", "not in the catalogue"]),
    ],
)
def test_equal_to_ranx_on_adversarial_queries(ranked: list[str], relevant: list[str]) -> None:
    assert_equals_ranx([(ranked, relevant), (["q"], ["q"])])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.permutations(list("abcdefgh")).map(lambda p: p[:5]), st.sets(st.sampled_from("abcdefghij"), min_size=1)
        ),
        min_size=1,
        max_size=5,
    )
)
def test_every_metric_lies_between_0_and_1_and_grows_with_k_where_it_must(
    queries: list[tuple[list[str], set[str]]],
) -> None:
    table = table_of_metrics(*frames([(ranked, sorted(relevant)) for ranked, relevant in queries]), (1, 2, 5, 10))
    values = table.drop("row")
    assert len(table) == len(queries)
    assert (values.min_horizontal() >= 0).all()
    assert (values.max_horizontal() <= 1 + 1e-12).all()
    for metric in ("hit", "mrr", "map"):
        steps = [table[f"{metric}@{k}"] for k in (1, 2, 5, 10)]
        assert all((after >= before).all() for before, after in pairwise(steps))


def test_ideal_dcg_counts_targets_that_were_not_found() -> None:
    """The released code divides by the ideal of the hits: 1.0 here."""
    assert one(["a", "x", "y"], ["a", "b", "c"])["ndcg"] == pytest.approx(1 / (1 + 1 / math.log2(3) + 0.5))
    assert one(["a", "x", "y"], ["a", "b", "c"])["ndcg"] == pytest.approx(0.4693, abs=1e-4)


def test_map_divides_by_all_targets_not_by_hits() -> None:
    """The released code divides by the hits: 1.0 here."""
    assert one(["a", "x"], ["a", "b"])["map"] == pytest.approx(0.5)


def test_hit_is_one_when_any_target_is_found_not_the_share_of_targets() -> None:
    """Hits over targets is recall: 1/3 here."""
    assert one(["a", "x"], ["a", "b", "c"])["hit"] == 1.0


def test_ideal_dcg_is_cut_at_k_when_there_are_more_targets() -> None:
    assert one(["a", "b"], ["a", "b", "c", "d"], k=2)["ndcg"] == pytest.approx(1.0)


def test_an_item_listed_twice_is_one_hit_at_its_best_rank() -> None:
    assert one(["a", "a", "a"], ["a", "b"]) == pytest.approx(one(["a", "x", "y"], ["a", "b"]))


def test_a_target_listed_twice_counts_once() -> None:
    assert one(["a"], ["a", "a"])["ndcg"] == pytest.approx(1.0)


def test_a_query_without_any_ranked_item_scores_zero_and_keeps_its_line() -> None:
    ranked, relevant = frames([(["a"], ["a"]), ([], ["b"]), (["c"], ["c"])])
    table = table_of_metrics(ranked, relevant, (10,))
    assert table["row"].to_list() == [0, 1, 2]
    assert table["ndcg@10"].to_list() == [1.0, 0.0, 1.0]


def test_a_ranked_row_without_targets_gets_no_line() -> None:
    ranked, relevant = frames([(["a"], []), (["b"], ["b"])])
    assert table_of_metrics(ranked, relevant, (1,))["row"].to_list() == [1]


def test_the_order_of_lines_does_not_matter() -> None:
    rng = np.random.default_rng(1)
    ranked, relevant = frames(
        [([f"i{n}" for n in rng.permutation(30)], [f"i{n}" for n in range(5)]) for _ in range(20)]
    )
    shuffled = table_of_metrics(ranked.sample(fraction=1, shuffle=True, seed=2), relevant.reverse(), KS)
    assert shuffled.equals(table_of_metrics(ranked, relevant, KS))


def test_no_query_at_all_gives_an_empty_table_with_its_columns() -> None:
    table = table_of_metrics(*frames([]), (10,))
    assert len(table) == 0
    assert table.columns == ["row", "hit@10", "ndcg@10", "mrr@10", "map@10"]


def test_ranks_and_cut_offs_below_one_are_refused() -> None:
    ranked, relevant = frames([(["a"], ["a"])])
    with pytest.raises(ValueError, match="cut-offs"):
        table_of_metrics(ranked, relevant, (0, 10))
    with pytest.raises(ValueError, match="ranks start at 1"):
        table_of_metrics(ranked.with_columns(rank=pl.lit(0, pl.UInt16)), relevant, (10,))


def test_relevant_items_are_positions_and_targets() -> None:
    examples = pl.DataFrame({"targets": [["a", "b"], [], ["c"]]}, schema={"targets": pl.List(pl.String)})
    assert relevant_items(examples).rows() == [(0, "a"), (0, "b"), (2, "c")]


def test_the_harmonic_mean_of_a_task_that_failed_is_zero() -> None:
    assert harmonic_mean([0.5, 0.0]) == 0.0
    assert harmonic_mean([]) == 0.0
    assert harmonic_mean([0.2, 0.2]) == pytest.approx(0.2)

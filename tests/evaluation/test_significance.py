"""Intervals that cover, differences that are found, and frames that do not fit."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import numpy as np
import polars as pl
import polars.testing
import pytest

from gemst.errors import GemstError
from gemst.evaluation.significance import intervals, paired_bootstrap


def frame(values: np.ndarray, tasks: tuple[str, ...] = ("recommendation", "search")) -> pl.DataFrame:
    """One query per user and task; values (users, tasks)."""
    users = len(values)
    return pl.DataFrame(
        {
            "row": np.arange(values.size, dtype=np.uint32),
            "user_id": np.repeat([f"u{n}" for n in range(users)], values.shape[1]),
            "task": list(tasks) * users,
            "timestamp": [datetime(2024, 1, 1, tzinfo=UTC)] * values.size,
            "ndcg@10": values.ravel(),
            "ranker": "model",
            "protocol": "full",
        }
    )


def compare(a: pl.DataFrame, b: pl.DataFrame, **options: Any) -> pl.DataFrame:
    return paired_bootstrap(a, b, metrics=["ndcg@10"], **options)


def draw(users: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((users, 2))


def test_a_run_compared_with_itself_differs_by_nothing() -> None:
    a = frame(draw(50, 0))
    lines = compare(a, a)
    assert lines["task"].to_list() == ["recommendation", "search", "joint"]
    for name in ("difference", "difference_low", "difference_high"):
        assert lines[name].to_list() == [0.0] * 3
    assert lines["ratio"].to_list() == lines["ratio_high"].to_list() == [1.0] * 3
    assert lines["p"].to_list() == [1.0] * 3


def test_means_differences_and_ratios_are_those_of_the_frames() -> None:
    x, y = draw(80, 1), draw(80, 2)
    lines = compare(frame(x), frame(y)).to_dicts()
    for task in (0, 1):
        assert lines[task]["a"] == pytest.approx(x[:, task].mean())
        assert lines[task]["difference"] == pytest.approx(y[:, task].mean() - x[:, task].mean())
        assert lines[task]["ratio"] == pytest.approx(y[:, task].mean() / x[:, task].mean())
    hmean = 2 / (1 / x.mean(0)).sum()
    assert lines[2]["a"] == pytest.approx(hmean)


def test_pairing_finds_a_small_but_constant_gain() -> None:
    noisy = draw(200, 3)
    lines = compare(frame(noisy), frame(noisy + 0.01))
    assert (lines["difference_low"] > 0.005).all()
    assert (lines["p"] < 0.01).all()
    worse = compare(frame(noisy + 0.01), frame(noisy))
    assert (worse["difference_high"] < -0.005).all()


def test_the_order_of_lines_does_not_matter() -> None:
    a, b = frame(draw(40, 4)), frame(draw(40, 5))
    assert compare(a, b).equals(compare(a.reverse(), b.sample(fraction=1, shuffle=True, seed=1)))


def test_the_interval_agrees_with_the_normal_one_and_has_its_coverage() -> None:
    difference, covered = [], 0
    for seed in range(100):
        x, y = draw(120, 2 * seed + 10), draw(120, 2 * seed + 11)
        line = compare(frame(x), frame(y), resamples=300).row(0, named=True)
        covered += line["difference_low"] <= 0 <= line["difference_high"]
        paired = x[:, 0] - y[:, 0]
        difference.append(
            (line["difference_high"] - line["difference_low"]) / (2 * 1.96 * paired.std() / len(paired) ** 0.5)
        )
    assert np.mean(difference) == pytest.approx(1, abs=0.05)
    assert 88 <= covered <= 100


def test_users_are_resampled_not_queries() -> None:
    """Ten equal queries of a user are one observation: the interval must not shrink."""
    once = frame(draw(60, 6)[:, :1], ("search",))
    other = frame(draw(60, 7)[:, :1], ("search",))
    tenfold = [pl.concat([part] * 10).with_columns(row=pl.arange(600, dtype=pl.UInt32)) for part in (once, other)]
    single, many = compare(once, other).row(0, named=True), compare(*tenfold).row(0, named=True)
    assert many["difference_low"] == pytest.approx(single["difference_low"])
    assert many["queries"] == 600


def test_a_lead_that_one_seed_in_three_gives_is_not_beyond_chance() -> None:
    """Users alone would say so: the mean of the seeds is ahead for nearly every one of them."""
    base = draw(400, 20)
    ours = [frame(base + lead) for lead in (0.09, 0.0, 0.0)]
    line = compare([frame(base)] * 3, ours).row(0, named=True)
    assert line["difference"] == pytest.approx(0.03)
    assert line["difference_low"] <= 0 < line["difference_high"]
    steady = compare([frame(base)] * 3, [frame(base + 0.03)] * 3).row(0, named=True)
    assert steady["difference_low"] == pytest.approx(0.03)


def test_seeds_are_drawn_in_pairs_where_both_sides_have_as_many() -> None:
    runs = [frame(draw(40, seed)) for seed in (21, 22, 23)]
    line = compare(runs, [part.with_columns(pl.col("ndcg@10") + 0.01) for part in runs]).row(0, named=True)
    assert line["difference_low"] == pytest.approx(0.01)
    other = compare(runs[0], runs).row(0, named=True)  # one run against several: those alone are drawn
    assert other["difference_low"] < 0 < other["difference_high"]


def test_blocks_of_resamples_do_not_change_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = frame(draw(30, 8)), frame(draw(30, 9))
    whole = compare(a, b, resamples=100)
    monkeypatch.setattr("gemst.evaluation.significance._CELLS", 300)
    pl.testing.assert_frame_equal(compare(a, b, resamples=100), whole)


def test_no_ratio_over_zero() -> None:
    line = compare(frame(np.zeros((20, 2))), frame(draw(20, 1))).row(0, named=True)
    assert line["ratio"] is None
    assert line["ratio_low"] is None
    assert line["difference"] > 0


def test_frames_of_different_queries_are_refused() -> None:
    a = frame(draw(20, 1))
    with pytest.raises(GemstError, match="same queries"):
        compare(a, frame(draw(21, 1)))
    with pytest.raises(GemstError, match=r"second run's .* no column ndcg@10"):
        compare(a, a.drop("ndcg@10"))
    with pytest.raises(GemstError, match="no line"):
        compare(a.clear(), a)
    with pytest.raises(GemstError, match=r"first run's .* no column ranker"):
        compare(a.drop("ranker"), a)
    with pytest.raises(GemstError, match="other types of user_id"):
        compare(a, a.with_columns(pl.col("user_id").str.slice(1).cast(pl.Int64)))


def test_a_task_few_users_have_is_judged_on_the_draws_that_hold_it() -> None:
    """Two of twelve users search, and b is better by 0.5 on both: no draw can say anything else."""
    recommended = frame(np.full((12, 1), 0.5), ("recommendation",))
    searched = frame(np.full((2, 1), 0.2), ("search",)).with_columns(row=pl.Series([12, 13], dtype=pl.UInt32))
    a = pl.concat([recommended, searched])
    b = a.with_columns(pl.when(task="search").then(0.7).otherwise("ndcg@10").alias("ndcg@10"))
    line = compare(a, b).row(1, named=True)
    assert (line["difference_low"], line["difference_high"]) == pytest.approx((0.5, 0.5))
    assert line["ratio_low"] == pytest.approx(3.5)
    assert line["p"] < 0.01


def test_runs_of_several_seeds_count_as_their_mean_and_joint_is_the_mean_of_theirs() -> None:
    ours, theirs = [draw(60, seed) for seed in (1, 2)], [draw(60, seed) for seed in (3, 4)]
    lines = compare([frame(run) for run in theirs], [frame(run) for run in ours]).to_dicts()
    mean = np.mean(ours, axis=0).mean(0) - np.mean(theirs, axis=0).mean(0)
    assert [lines[0]["difference"], lines[1]["difference"]] == pytest.approx(mean.tolist())
    joint = [np.mean([2 / (1 / run.mean(0)).sum() for run in side]) for side in (theirs, ours)]
    assert (lines[2]["a"], lines[2]["difference"]) == pytest.approx((joint[0], joint[1] - joint[0]))


def test_intervals_hold_the_mean_of_each_ranker() -> None:
    values = draw(100, 3)
    both = pl.concat(
        [
            frame(values),
            frame(values / 2).with_columns(ranker=pl.lit("bm25")),
        ]
    )
    lines = intervals(both)
    assert lines.select("ranker", "task").rows() == [
        ("model", "recommendation"), ("model", "search"), ("bm25", "recommendation"), ("bm25", "search"),
    ]  # fmt: skip
    assert lines["mean"].to_list() == pytest.approx([*values.mean(0), *values.mean(0) / 2])
    assert ((lines["low"] < lines["mean"]) & (lines["mean"] < lines["high"])).all()


def test_two_rankers_of_one_table_and_one_protocol() -> None:
    values = draw(30, 3)
    table = pl.concat(
        [
            frame(values),
            frame(values / 2).with_columns(ranker=pl.lit("bm25")),
            frame(values / 4).with_columns(protocol=pl.lit("uniform99")),
        ]
    )
    lines = compare(table, table, rankers=("bm25", "model"))
    assert lines["ratio"].to_list() == pytest.approx([2.0] * 3)
    with pytest.raises(GemstError, match="no line"):
        compare(table, table, rankers=("model", "bm25"), protocol="uniform99")

from __future__ import annotations

import datetime as dt
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from gemst.config import Data
from gemst.data import examples
from gemst.data.tables import EXAMPLES, TRAIN_EXAMPLES
from gemst.errors import GemstError
from tests.data.conftest import START, events_table, items_table, logs

configs = st.builds(
    Data,
    history=st.sampled_from(["both", "own"]),
    split=st.sampled_from(["leave-last-out", "global-time"]),
    core=st.integers(0, 3),
    min_history=st.integers(0, 3),
    max_history=st.integers(1, 5),
    negatives=st.sampled_from(["none", "uniform", "bm25", "shown"]),
    num_negatives=st.integers(1, 6),
)


def build(log: tuple[pl.DataFrame, pl.DataFrame], config: Data) -> examples.Splits | None:
    try:
        return examples.build(*log, config, seed=3)
    except GemstError:  # nothing left to train on
        return None


def minutes(example: dict) -> int:
    return int((example["timestamp"] - START).total_seconds() // 60)


@given(logs(), configs)
@settings(max_examples=150, deadline=None)
def test_histories_hold_only_the_users_earlier_events(log, config):
    splits = build(log, config)
    if splits is None:
        return
    for name in ("train", "valid", "test"):
        keys = getattr(splits, name).select("user_id", "timestamp", "task")
        assert keys.equals(keys.sort(pl.all()))
        for example in getattr(splits, name).to_dicts():
            earlier = log[1].filter(pl.col("user_id") == example["user_id"], pl.col("timestamp") < example["timestamp"])
            if config.history == "own":
                earlier = earlier.filter(pl.col("task") == example["task"])
            pool = earlier["item_id"].to_list()
            for item in example["history"]:
                pool.remove(item)  # each history entry is another earlier event
            assert len(example["history"]) <= config.max_history
            if name != "train":
                assert len(example["history"]) >= min(config.min_history, config.max_history)


@given(logs(), configs)
@settings(max_examples=100, deadline=None)
def test_every_event_is_a_target_once_or_dropped_by_name(log, config):
    splits = build(log, config)
    if splits is None:
        return
    counts = splits.counts
    targets = {name: getattr(splits, name)["targets"].list.len().sum() for name in ("train", "valid", "test")}
    assert counts["events"] == log[1].height == sum(targets.values()) + sum(counts["dropped"].values())
    assert targets["valid"] == counts["valid_targets"]
    assert targets["test"] == counts["test_targets"]
    assert [getattr(splits, name).height for name in targets] == [counts[name] for name in targets]


@given(logs(), configs)
@settings(max_examples=100, deadline=None)
def test_negatives_are_never_met_items(log, config):
    splits = build(log, config)
    if splits is None:
        return
    met = log[1].group_by("user_id").agg(pl.col("item_id").unique())
    met = dict(zip(met["user_id"], met["item_id"].to_list(), strict=True))
    for example in pl.concat([splits.valid, splits.test]).to_dicts():
        negatives = example["negatives"]
        assert len(set(negatives)) == len(negatives)
        assert not set(negatives) & set(example["targets"])
        if config.negatives in ("uniform", "bm25"):
            assert not set(negatives) & set(met[example["user_id"]])
            assert len(negatives) == min(config.num_negatives, log[0].height - len(met[example["user_id"]]))


@given(logs(), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_core_holds_for_every_user_and_item(log, core):
    splits = build(log, Data(core=core))
    if splits is None:
        return
    tables = [table.select("user_id", "targets") for table in (splits.train, splits.valid, splits.test)]
    used = pl.concat(tables).explode("targets", empty_as_null=True)
    lost = {"same item again in a held-out request", "a held-out item of the same user, at its moment or later"}
    if not lost & splits.counts["dropped"].keys():
        assert used.group_by("user_id").len()["len"].min() >= core
        assert used.group_by("targets").len()["len"].min() >= core


@given(logs(), configs, st.randoms())
@settings(max_examples=100, deadline=None)
def test_order_of_the_rows_does_not_matter(log, config, random):
    splits = build(log, config)
    order = list(range(log[1].height))
    random.shuffle(order)
    # Rows that differ in their impressions alone have no order to restore.
    again = build((log[0].reverse(), log[1][order]), config)
    if splits is None:
        assert again is None
        return
    columns = [name for name in EXAMPLES.names() if config.negatives != "shown" or name != "negatives"]
    for name in ("train", "valid", "test"):
        assert_frame_equal(getattr(splits, name).select(columns), getattr(again, name).select(columns))


@given(logs(), configs)
@settings(max_examples=60, deadline=None)
def test_train_histories_hold_no_held_out_event(log, config):
    """With a new item for every event, an item of valid or test in a train history would be that very event."""
    events = log[1].with_columns(item_id=pl.format("e{}", pl.int_range(pl.len())))
    splits = build((items_table(*events["item_id"]), events), config)
    if splits is None:
        return
    item = pl.col("history").explode(empty_as_null=False).unique()
    held = {name: set(getattr(splits, name)["targets"].explode(empty_as_null=False)) for name in ("valid", "test")}
    assert not held["valid"] & held["test"]
    assert not set(splits.train.select(item)["history"]) & (held["valid"] | held["test"])
    assert not set(splits.valid.select(item)["history"]) & held["test"]
    assert not set(splits.train["targets"].explode(empty_as_null=False)) & (held["valid"] | held["test"])


@given(logs(), configs)
@settings(max_examples=100, deadline=None)
def test_no_train_target_is_a_held_out_one_of_its_user_at_that_time_or_later(log, config):
    splits = build(log, config)
    if splits is None:
        return
    held = pl.concat([splits.valid, splits.test]).explode("targets", empty_as_null=True)
    pairs = splits.train.explode("targets", empty_as_null=True).join(held, on=["user_id", "targets"], suffix="_held")
    assert not len(pairs.filter(pl.col("clicked") >= pl.col("timestamp_held")))


def test_events_without_a_request_are_held_out_only_where_there_are_no_others():
    """Recent clicks that a page lists are guesses: the page before it validates, not they."""
    pages = [("u", "a", 1, None, "r1"), ("u", "b", 20, None, "r2"), ("u", "c", 30, None, "r3")]
    guessed = [
        ("u", "d", 28, None),
        ("u", "e", 29, None),
        ("v", "a", 1, None),
        ("v", "b", 2, None),
        ("v", "c", 3, None),
    ]
    splits = examples.build(items_table(*"abcde"), events_table(*pages, *guessed), Data(), seed=0)
    assert splits.test.select("user_id", "targets").rows() == [("u", ["c"]), ("v", ["c"])]
    assert splits.valid.select("user_id", "targets").rows() == [("u", ["b"]), ("v", ["b"])]
    assert splits.test["history"][0].to_list() == ["a", "b", "d", "e"]


def test_what_comes_with_a_held_out_event_is_dropped():
    """Two tags of one item are two searches beside the recommendation, all of one moment."""
    moment = [("u", "x", 9, None), ("u", "x", 9, "rock"), ("u", "x", 9, "90s"), ("u", "x", 12, "rock again")]
    earlier = [("u", "x", 1, "rock"), ("u", "a", 2, None), ("u", "b", 3, "pop"), ("u", "c", 4, None)]
    later = [("u", "d", 20, "jazz"), ("u", "e", 21, "jazz")]
    splits = examples.build(items_table(*"abcdex"), events_table(*moment, *earlier, *later), Data(), seed=0)
    assert splits.test.filter(task="recommendation")["targets"].to_list() == [["x"]]
    train = splits.train.select("task", "query", pl.col("targets").list.first()).rows()
    assert sorted(train, key=str) == [("recommendation", None, "a"), ("search", "pop", "b"), ("search", "rock", "x")]
    assert splits.counts["dropped"] == {"a held-out item of the same user, at its moment or later": 3}


def test_what_is_dropped_leaves_no_held_out_example_without_its_history():
    """The search for Y had the search for X before it; that one gave the recommendation of X away."""
    log = [("u", "A", 1, None), ("u", "X", 2, None), ("u", "X", 3, "soap"), ("u", "Y", 4, "soap")]
    config = Data(history="own", min_history=1)
    splits = examples.build(items_table(*"AXY"), events_table(*log), config, seed=0)
    assert splits.test.select("task", "history", "targets").rows() == [("recommendation", ["A"], ["X"])]
    assert splits.counts["dropped"] == {
        "a held-out item of the same user, at its moment or later": 1,
        "held out with fewer than 1 events before it": 1,
    }


def test_leave_last_out_of_each_task():
    log = items_table(*"abcdefg"), events_table(
        ("u", "a", 0, None), ("u", "b", 1, "q1"), ("u", "c", 2, None), ("u", "d", 2, "q2"), ("u", "e", 3, None),
        ("u", "f", 4, "q3"), ("v", "g", 9, "alone"),
    )  # fmt: skip
    splits = examples.build(*log, Data(max_history=3), seed=0)
    shown = {
        name: [
            (e["task"], e["query"], e["history"], e["targets"], minutes(e)) for e in getattr(splits, name).to_dicts()
        ]
        for name in ("train", "valid", "test")
    }
    assert shown["test"] == [
        ("recommendation", None, ["b", "c", "d"], ["e"], 3),
        ("search", "q3", ["c", "d", "e"], ["f"], 4),
    ] or (
        shown["test"]
        == [("recommendation", None, ["b", "d", "c"], ["e"], 3), ("search", "q3", ["d", "c", "e"], ["f"], 4)]
    )
    # c and d are tied: neither is in the other's history.
    assert shown["valid"] == [("recommendation", None, ["a", "b"], ["c"], 2), ("search", "q2", ["a", "b"], ["d"], 2)]
    assert shown["train"] == [
        ("recommendation", None, [], ["a"], 0), ("search", "q1", ["a"], ["b"], 1), ("search", "alone", [], ["g"], 9),
    ]  # fmt: skip
    assert splits.train.schema == TRAIN_EXAMPLES
    assert splits.test.schema == EXAMPLES


def test_own_histories_hold_one_task():
    log = (
        items_table(*"abcd"),
        events_table(("u", "a", 0, None), ("u", "b", 1, "q"), ("u", "c", 2, None), ("u", "d", 3, "q")),
    )
    splits = examples.build(*log, Data(history="own"), seed=0)
    assert {e["targets"][0]: e["history"] for e in splits.test.to_dicts()} == {"c": ["a"], "d": ["b"]}


def test_clicks_of_one_request_are_one_test_example():
    log = items_table(*"abcd"), events_table(
        ("u", "a", 0, "q"), ("u", "b", 5, "q", "r", ["d", "a"]), ("u", "c", 6, "q", "r", ["a", "c"]),
    )  # fmt: skip
    splits = examples.build(*log, Data(negatives="shown"), seed=0)
    (test,) = splits.test.to_dicts()
    assert sorted(test["targets"]) == ["b", "c"]
    assert test["history"] == ["a"]
    assert minutes(test) == 5
    assert test["negatives"] == ["d", "a"]  # shown and not clicked, in the page's order
    assert splits.train["targets"].to_list() == [["a"]]


def test_global_time_puts_the_newest_events_last():
    log = (
        items_table(*"abcdefghij"),
        events_table(*((f"u{i % 2}", item, i, None) for i, item in enumerate("abcdefghij"))),
    )
    splits = examples.build(*log, Data(split="global-time", valid_fraction=0.2, test_fraction=0.3), seed=0)
    assert [sorted(t["targets"].explode().to_list()) for t in (splits.train, splits.valid, splits.test)] == [
        list("abcde"), list("fg"), list("hij"),
    ]  # fmt: skip


def test_unknown_item_is_dropped_by_name():
    log = items_table("a", "b"), events_table(("u", "a", 0, None), ("u", "zz", 1, None), ("u", "b", 2, None))
    assert examples.build(*log, Data(), seed=0).counts["dropped"] == {"item not in items": 1}


def test_nothing_left_says_what_to_change():
    log = items_table("a"), events_table(("u", "a", 0, None))
    with pytest.raises(GemstError, match=r"5-core.*data\.core"):
        examples.build(*log, Data(core=5), seed=0)


def test_seed_changes_negatives_alone():
    log = items_table(*(f"i{n}" for n in range(50))), events_table(*(("u", f"i{n}", n, None) for n in range(6)))
    config = Data(negatives="uniform", num_negatives=5)
    first, second = (examples.build(*log, config, seed).test for seed in (1, 2))
    assert first["negatives"].to_list() != second["negatives"].to_list()
    assert_frame_equal(first.drop("negatives"), second.drop("negatives"))


def test_blocks_on_disk_equal_the_table_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(examples, "_BLOCK", 3)
    log = (
        items_table(*"abcdefgh"),
        events_table(*((f"u{n % 4}", "abcdefgh"[n % 8], n, "q" if n % 3 else None) for n in range(40))),
    )
    config = Data(negatives="uniform", num_negatives=2)
    splits, counts = examples.build(*log, config, 5), examples.write(*log, config, 5, tmp_path)
    assert counts == splits.counts
    for name in ("train", "valid", "test"):
        assert_frame_equal(pl.read_parquet(tmp_path / f"{name}.parquet"), getattr(splits, name))


class Worker:
    """A process of its own with a thread count of its own, which builds examples for the logs it is sent."""

    SCRIPT = """
import pickle, sys
import polars as pl
from gemst.data import examples
from gemst.errors import GemstError
while True:
    try:
        items, events, config = pickle.load(sys.stdin.buffer)
    except EOFError:
        break
    try:
        splits = examples.build(items, events, config, seed=3)
        answer = pl.thread_pool_size(), splits.counts, [splits.train, splits.valid, splits.test]
    except GemstError as error:
        answer = pl.thread_pool_size(), str(error), []
    pickle.dump(answer, sys.stdout.buffer)
    sys.stdout.flush()
"""

    def __init__(self, threads: int) -> None:
        environment = {"POLARS_MAX_THREADS": str(threads), "PYTHONPATH": str(Path(__file__).parents[2])}
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )

    def build(self, log: tuple[pl.DataFrame, pl.DataFrame], config: Data) -> tuple[int, Any, list[pl.DataFrame]]:
        pickle.dump((*log, config), self.process.stdin)
        self.process.stdin.flush()
        return pickle.load(self.process.stdout)


@pytest.fixture(scope="module")
def workers() -> Iterator[list[Worker]]:
    """One thread, and five: more than this test's logs have use for, and not a divisor of anything."""
    started = [Worker(1), Worker(5)]
    yield started
    for worker in started:
        worker.process.kill()
        worker.process.wait()


@given(log=logs(), config=configs)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_thread_count_does_not_matter(workers, log, config):
    (one, counts, tables), (five, same_counts, same_tables) = (worker.build(log, config) for worker in workers)
    assert (one, five) == (1, 5)
    assert counts == same_counts
    for table, same in zip(tables, same_tables, strict=True):
        assert_frame_equal(table, same)


def test_thread_count_does_not_change_the_bytes_of_a_larger_log(tmp_path):
    script = """
import sys
from pathlib import Path
from tests.data.conftest import events_table, items_table
from gemst.config import Data
from gemst.data import examples
items = items_table(*(f"i{n}" for n in range(300)))
rows = [(f"u{n * 7 % 90}", f"i{n * n % 300}", n % 50, "film drama" if n % 2 else None) for n in range(3000)]
for kind in ("uniform", "bm25"):
    config = Data(negatives=kind, core=2, num_negatives=20)
    examples.write(items, events_table(*rows), config, 1, Path(sys.argv[1]) / kind)
"""
    for threads in ("1", "2"):
        folder = tmp_path / threads
        arguments = [sys.executable, "-c", script, str(folder)]
        subprocess.run(
            arguments, check=True, env={"POLARS_MAX_THREADS": threads, "PYTHONPATH": str(Path(__file__).parents[2])}
        )
    for path in sorted((tmp_path / "1").rglob("*.parquet")):
        assert path.read_bytes() == (tmp_path / "2" / path.relative_to(tmp_path / "1")).read_bytes()


def test_timestamps_are_the_targets_own():
    log = items_table("a", "b"), events_table(("u", "a", 0, None), ("u", "b", 7, None))
    (test,) = examples.build(*log, Data(), seed=0).test.to_dicts()
    assert test["timestamp"] == START + dt.timedelta(minutes=7)

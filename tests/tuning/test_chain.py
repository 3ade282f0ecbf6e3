"""The chain layout trains on exactly the prompts of the single layout."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator

import numpy as np
import polars as pl
import pytest
import torch

from gemst.config import Config, Data, Prompts
from gemst.data import examples
from gemst.data.tables import EVENTS, TIME, conform
from gemst.errors import GemstError
from gemst.prompts import Prompter
from gemst.tuning.batches import Batch, Batches, make_batches
from gemst.tuning.chain import ChainBatches, Segment
from gemst.tuning.events import load_events
from gemst.tuning.model import ItemModel
from gemst.tuning.single import SingleBatches
from tests.tuning.conftest import ITEMS, gpt2, llama, make_train


def chain(train: pl.DataFrame, prompter: Prompter, **settings: int) -> ChainBatches:
    return ChainBatches(load_events(train, prompter), prompter, **{"chain_items": 64, "batch_tokens": 256, **settings})


def item_model(make, attention: str = "sdpa") -> ItemModel:
    model = make(20 + ITEMS)
    model.set_attn_implementation(attention)
    return ItemModel(model, 20, (ITEMS,), False)


def assert_same_losses(model: ItemModel, batches: Batches, train: pl.DataFrame, prompter: Prompter) -> None:
    """Every example's loss is that of its single-target row."""
    single = SingleBatches(train, prompter, batch_tokens=64, decoder_start=None, seed=0)
    with torch.no_grad():
        by_chain, one_by_one = (
            torch.cat([model(batch) for batch in made(0)]).sort().values for made in (batches, single)
        )
    assert len(by_chain) >= len(train)
    torch.testing.assert_close(by_chain, one_by_one, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("make", "attention"), [(llama, "sdpa"), (llama, "eager"), (gpt2, "eager")])
def test_chain_losses_equal_single_target_rows(train: pl.DataFrame, prompter: Prompter, make, attention: str) -> None:
    model = item_model(make, attention)
    assert_same_losses(model, chain(train, prompter), train, prompter)


@pytest.mark.parametrize("days", [0, 2])  # later on, users begin with a history of what the table does not hold
def test_tasks_that_share_no_history_are_chained_apart(train: pl.DataFrame, prompter: Prompter, days: int) -> None:
    later = own_history(train).filter(pl.col("timestamp").dt.day() > days)
    config = Config.model_validate({"data": {"history": "own"}, "tuning": {"layout": "chain"}})
    model = item_model(llama)
    assert len(later) > 4
    assert_same_losses(model, make_batches(config, later, prompter, None), later, prompter)


def own_history(train: pl.DataFrame) -> pl.DataFrame:
    """The table as `data.history: own` makes it: strictly earlier targets of the same user and task."""
    past = pl.Series(
        [
            [
                target
                for user, task, (target,), time in train.select("user_id", "task", "targets", "timestamp").iter_rows()
                if (user, task) == (row["user_id"], row["task"]) and time < row["timestamp"]
            ]
            for row in train.iter_rows(named=True)
        ],
        dtype=pl.List(pl.String),
    )
    return train.with_columns(history=past)


def test_a_click_later_than_its_page_is_no_history_before_it_happened(prompter: Prompter) -> None:
    """Pages whose clicks have times of their own, through the real split: both layouts, one prompt."""
    when = [(0, "a"), (1, "r"), (5, None), (7, "r"), (9, None), (9, "s"), (11, None), (15, "s"), (16, None)]
    when += [(96, "t"), (97, None), (98, "v"), (99, None)]  # held out
    start = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)
    log = pl.DataFrame(
        {
            "user_id": ["u"] * len(when),
            "item_id": [f"i{n % 9}" for n in range(len(when))],
            "timestamp": pl.Series([start + dt.timedelta(minutes=at) for at, _ in when], dtype=TIME),
            "task": ["search" if page else "recommendation" for _, page in when],
            "query": ["comedy" if page else None for _, page in when],
            "request_id": [page for _, page in when],
        }
    )
    items = pl.DataFrame({"item_id": [f"i{n}" for n in range(9)]}).with_columns(title="item_id")
    made = examples.build(items, conform(log, EVENTS, "events"), Data(), seed=0).train
    late = made.filter(pl.col("clicked") > pl.col("timestamp"))
    assert late["targets"].to_list() == [["i3"], ["i7"]]
    model = item_model(llama)
    assert_same_losses(model, chain(made, prompter), made, prompter)


def test_examples_that_do_not_say_when_they_were_clicked_are_refused(train: pl.DataFrame, prompter: Prompter) -> None:
    with pytest.raises(GemstError, match=r"no column `clicked`.*Run `gemst split`"):
        load_events(train.drop("clicked"), prompter)


RAGGED = np.array([[20 + i % 4, 24 + i % 3, 27 + i] for i in range(ITEMS)])
RAGGED[::2, 2] = -1  # IDs of two and three tokens
RAGGED[0, 1] = -1  # and of one


@pytest.mark.parametrize(("batch_tokens", "exact"), [(4096, True), (60, False)])
@pytest.mark.parametrize(("chain_items", "tasks"), [(1, (0, 1)), (4, (0, 1)), (5, (1,)), (5, (0,)), (64, (0, 1))])
def test_the_longest_prompt_is_that_of_all_cuts(tokenizer, chain_items, tasks, batch_tokens, exact) -> None:
    """One long query, some events without an ID, some of them by the other task alone: what no batch exceeds."""
    prompter = Prompter(tokenizer, RAGGED, {f"i{n}": n for n in range(ITEMS - 1)}, Prompts(), 20)
    frame = make_train(5)
    long = pl.when((pl.col("task") == "search") & (pl.int_range(pl.len()) == 13)).then(pl.lit("old " * 30))
    made = chain(frame.with_columns(query=long.otherwise("query")), prompter, chain_items=chain_items, tasks=tasks,
                 batch_tokens=batch_tokens)  # fmt: skip
    longest = [max(int(made.collate(rows).position_ids.max()) + 1 for rows in made.plan(epoch)) for epoch in range(12)]
    assert max(longest) <= made.longest_prompt()
    assert max(longest) == made.longest_prompt() or not exact
    assert len(set(longest)) > 1 or chain_items in (1, 64)  # the first epoch alone does not show it


@pytest.mark.parametrize("style", ["compact", "paper"])  # without and with a suffix of a recommendation
@pytest.mark.parametrize("codes", [20 + np.arange(ITEMS)[:, None], RAGGED])
def test_a_segment_is_its_targets_one_by_one(train: pl.DataFrame, tokenizer, codes: np.ndarray, style: str) -> None:
    prompter = Prompter(tokenizer, codes, {f"i{n}": n for n in range(ITEMS - 1)}, Prompts(style=style), 20)
    batches = chain(train, prompter, chain_items=5)
    found = [segment for epoch in range(3) for segment in batches.segments(epoch)]
    assert {segment.task for segment in found} == {0, 1}
    for segment in found:
        built = batches._segment(segment, 0)
        for name, expected in one_by_one(batches, segment).items():
            np.testing.assert_array_equal(getattr(built, name), expected, err_msg=name)
            assert getattr(built, name).dtype == np.int64
        assert batches.length(segment) == len(built.ids)


def one_by_one(batches: ChainBatches, segment: Segment) -> dict[str, list[int]]:
    """A segment's tokens and targets, made with a loop over its targets."""
    events, prompter = batches.events, batches.prompter
    trunk, before = list(prompter.prefix), []
    for item in events.items[segment.low : segment.high].tolist():
        before.append(len(trunk))
        trunk += [] if item < 0 else [code for code in prompter.token_ids[item].tolist() if code >= 0]
    row: dict[str, list[int]] = {name: [] for name in ("ids", "position", "branch", "limit", "at", "labels", "level")}
    row["ids"], row["position"], row["limit"] = (list(part) for part in (trunk, range(len(trunk)), range(len(trunk))))
    row["branch"] = [0] * len(trunk)
    number = 0
    for event in range(segment.fresh, segment.high):
        if events.task[event] != segment.task or events.items[event] < 0:
            continue
        number += 1
        seen = before[max(int(batches.visible[event]), segment.low) - segment.low]
        code = [token for token in prompter.token_ids[events.items[event]].tolist() if token >= 0]
        suffix = events.suffixes[events.query[event]]
        hung = len(row["ids"])
        branch = [*suffix, *code[:-1]]
        row["at"] += [hung + len(suffix) - 1 if suffix else seen - 1]
        row["at"] += [hung + len(suffix) + at for at in range(len(code) - 1)]
        row["labels"] += code
        row["level"] += range(len(code))
        row["ids"] += branch
        row["position"] += range(seen, seen + len(branch))
        row["branch"] += [number] * len(branch)
        row["limit"] += [seen - 1] * len(branch)
    return row


def test_ragged_ids_have_the_losses_of_single_rows(train: pl.DataFrame, tokenizer) -> None:
    prompter = Prompter(tokenizer, RAGGED, {f"i{n}": n for n in range(ITEMS - 1)}, Prompts(), 20)
    model = ItemModel(llama(27 + ITEMS), 20, (4, 3, ITEMS), False)
    assert_same_losses(model, chain(train, prompter), train, prompter)


def test_every_target_is_in_an_epoch_once_however_segments_are_cut(train: pl.DataFrame, prompter: Prompter) -> None:
    wanted = sorted(prompter.index[t[0]] for t in train["targets"].to_list())
    for epoch in range(3):
        batches = list(chain(train, prompter, chain_items=4, batch_tokens=24)(epoch))
        assert sorted(np.concatenate([b.labels.numpy() - 20 for b in batches])) == wanted
        assert all(b.targets[0] + b.targets[1] == len(b.labels) for b in batches)


def test_rows_are_sorted_by_task(train: pl.DataFrame, prompter: Prompter) -> None:
    search = {prompter.index[t[0]] for t in train.filter(task="search")["targets"].to_list()}
    users_share = {prompter.index[t[0]] for t in train.filter(task="recommendation")["targets"].to_list()} & search
    for batch in chain(train, prompter)(0):
        rows = batch.at // batch.input_ids.shape[1]
        for row, label in zip(rows.tolist(), (batch.labels - 20).tolist(), strict=True):
            if label not in users_share:
                assert (label in search) == (row >= batch.boundary)


def test_a_target_never_sees_its_own_or_later_items(train: pl.DataFrame, prompter: Prompter) -> None:
    """Changing the items at or after a target's timestamp must not change its loss."""
    model = item_model(llama)
    chained = chain(train.filter(user_id="u1"), prompter)
    batch = chained.collate([[s] for s in sorted(chained.segments(0), key=lambda s: s.task)])
    with torch.no_grad():
        before = model(batch)
    events = chained.events
    last = events.time.max()
    target_rows = {int(events.items[i]) for i in np.flatnonzero(events.time == last)}
    changed = batch.input_ids.clone()
    for row in target_rows:
        changed[batch.input_ids == 20 + row] = 20 + (row + 1) % ITEMS
    batch.input_ids = changed
    with torch.no_grad():
        after = model(batch)
    torch.testing.assert_close(after, before)


def test_only_one_task(train: pl.DataFrame, prompter: Prompter) -> None:
    batches = list(chain(train, prompter, tasks=(1,))(0))
    assert sum(b.targets[1] for b in batches) == len(train.filter(task="search"))
    assert all(b.boundary == 0 and b.targets[0] == 0 for b in batches)


def test_one_long_query_has_a_row_of_its_own(train: pl.DataFrame, prompter: Prompter) -> None:
    """The other rows stay as short as a batch allows."""
    number = train.with_row_index().filter(task="search")["index"][0]
    long = pl.when(pl.int_range(pl.len()) == number).then(pl.lit("a bad old film " * 60)).otherwise("query")
    lengths = []
    for table in (train, train.with_columns(query=long)):
        batches = chain(table, prompter, batch_tokens=64, chain_items=4)
        rows = [row for batch in batches.plan(0) for row in batch]
        lengths.append(sorted(sum(map(batches.length, row)) for row in rows))
    assert lengths[1][-1] > 200
    assert max(lengths[0]) <= 32
    assert max(lengths[1][:-1]) <= 32


def test_long_queries_are_spread_over_rows_that_fit_a_batch(train: pl.DataFrame, prompter: Prompter) -> None:
    asked = pl.when(pl.col("task") == "search").then(pl.lit("a bad old film " * 8)).otherwise("query")
    pages = train.with_columns(query=asked)
    roomy, tight = (chain(pages, prompter, batch_tokens=tokens) for tokens in (4096, 160))
    assert max(map(roomy.length, roomy.segments(0))) > 80
    assert max(map(tight.length, tight.segments(0))) <= 80
    assert max(batch.input_ids.shape[1] for batch in tight(0)) <= 96  # rows are rounded up to 32 tokens
    model = item_model(llama)
    with torch.no_grad():
        sums = [torch.cat([model(batch) for batch in batches(0)]).sum() for batches in (roomy, tight)]
    torch.testing.assert_close(*sums, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("layout", ["chain", "single"])
def test_equal_mixing_has_as_many_rows_of_each_task_and_others_every_epoch(prompter: Prompter, layout: str) -> None:
    train = make_train(users=40)
    rare = train.filter((pl.col("task") == "search") | (pl.int_range(pl.len()) % 5 == 0))
    config = Config.model_validate({"tuning": {"layout": layout, "batch_tokens": 64, "chain_items": 6}})
    equal = config.model_copy(update={"tuning": config.tuning.model_copy(update={"mixing": "equal"})})
    (few, many), (of_each, as_many) = (
        np.sum([of_tasks(batch) for batch in make_batches(one, rare, prompter, None)(0)], 0) for one in (config, equal)
    )
    assert many > 2 * few
    assert of_each == as_many == few
    first, second = (make_batches(equal, rare, prompter, None)(epoch) for epoch in (0, 1))
    assert labels(first) != labels(second)
    if layout == "chain":
        assert all(min(of_tasks(batch)) > 0 for batch in make_batches(equal, rare, prompter, None)(0))


def of_tasks(batch: Batch) -> tuple[int, int]:
    """Rows of recommendation and search."""
    return batch.boundary, len(batch.input_ids) - batch.boundary


def labels(batches: Iterator[Batch]) -> list[int]:
    return sorted(label for batch in batches for label in batch.labels.tolist())

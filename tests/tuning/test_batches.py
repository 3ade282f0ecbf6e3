"""Both layouts' batches: how many tokens they have, and what they say when there is nothing to make them of."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest

from gemst.config import Config, Prompts
from gemst.errors import GemstError
from gemst.prompts import Prompter
from gemst.tuning.batches import Batches, make_batches
from gemst.tuning.loop import schedule
from tests.tuning.conftest import ITEMS

LAYOUTS = [("chain", None), ("single", None), ("single", 0)]
layouts = pytest.mark.parametrize(("layout", "decoder_start"), LAYOUTS, ids=["chain", "single", "encoder-decoder"])


def batches(train: pl.DataFrame, prompter: Prompter, decoder_start: int | None, **tuning: Any) -> Batches:
    settings = {"batch_tokens": 90, "chain_items": 4, **tuning}
    return make_batches(Config.model_validate({"tuning": settings}), train, prompter, decoder_start)


@layouts
@pytest.mark.parametrize("style", ["compact", "paper"])
def test_tokens_are_those_of_the_collated_batch(train, tokenizer, layout, decoder_start, style) -> None:
    """Also where IDs differ in length, some items have none, and histories are longer than what is shown."""
    codes = np.array([[20 + i % 4, 24 + i % 3, 27 + i] for i in range(ITEMS)])
    codes[::2, 2] = -1
    known = {f"i{n}": n for n in range(ITEMS - 2)}
    made = batches(train, Prompter(tokenizer, codes, known, Prompts(style=style), 3), decoder_start, layout=layout)
    plans = [rows for epoch in range(2) for rows in made.plan(epoch)]
    assert len(plans) > 2
    for rows in plans:
        assert made.tokens(rows) == made.collate(rows).tokens
        assert made.tokens(rows[:1]) == made.collate(rows[:1]).tokens  # the share of one of several processes


@layouts
def test_a_task_without_an_example_is_an_answer(train, prompter, layout, decoder_start) -> None:
    alone = train.filter(task="recommendation")
    with pytest.raises(GemstError, match=r"no training example for tuning.tasks: search.*split.json"):
        batches(alone, prompter, decoder_start, layout=layout, tasks="search")


@layouts
def test_targets_without_any_id_are_an_answer(train, prompter, layout, decoder_start) -> None:
    prompter.index = {f"other{n}": n for n in range(ITEMS)}
    with pytest.raises(GemstError, match=r"no train target has an ID. Run `gemst tokenize` on the same data"):
        batches(train, prompter, decoder_start, layout=layout)


@layouts
def test_no_target_at_all_is_an_answer(train, prompter, layout, decoder_start) -> None:
    nothing = train.with_columns(targets=pl.lit([], dtype=pl.List(pl.String)))
    with pytest.raises(GemstError, match="no train target has an ID"):
        batches(nothing, prompter, decoder_start, layout=layout)


@layouts
def test_targets_without_an_id_are_left_out(train, prompter, layout, decoder_start) -> None:
    """Whole segments of the chain and single rows alike: two items in three are unknown."""
    prompter.index = {f"i{n}": n for n in range(0, ITEMS, 3)}
    wanted = sorted(prompter.index[t[0]] + 20 for t in train["targets"].to_list() if t[0] in prompter.index)
    made = batches(train, prompter, decoder_start, layout=layout, chain_items=2)
    assert sorted(np.concatenate([batch.labels.numpy() for batch in made(0)]).tolist()) == wanted


@pytest.mark.parametrize("decoder_start", [None, 0])
def test_single_rows_stay_inside_a_batch_however_long_queries_are(train, prompter, decoder_start) -> None:
    number = train.with_row_index().filter(task="search")["index"][0]
    page = pl.when(pl.int_range(pl.len()) == number).then(pl.lit("a bad old film " * 10)).otherwise("query")
    pages = train.with_columns(query=page)
    made = batches(pages, prompter, decoder_start, layout="single")
    for epoch in range(3):
        plan = made.plan(epoch)
        assert sorted(np.concatenate(plan)) == list(range(len(train)))
        for rows in plan:
            ids = made.collate(rows).input_ids
            assert ids.numel() <= 90 or len(rows) == 1


@pytest.mark.parametrize("accumulate", [1, 2, 4, 50])
def test_a_step_may_span_epochs_and_the_schedule_counts_passes_all_the_same(train, prompter, accumulate) -> None:
    made = batches(train, prompter, 0, batch_tokens=40)
    settings = Config.model_validate({"tuning": {"epochs": 10, "accumulate": accumulate}}).tuning
    passes = schedule(made, settings) * accumulate / len(made.plan(0))
    assert len(made.plan(0)) % 4
    assert abs(passes - 10) <= accumulate / len(made.plan(0)) / 2

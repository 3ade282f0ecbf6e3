"""Alignment rows are ordinary search rows: both layouts, both families, one and several ID levels."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch
from pydantic import ValidationError

from gemst.config import Config
from gemst.item_ids import ItemIds
from gemst.prompts import Prompter
from gemst.tuning.alignment import with_alignment
from gemst.tuning.chain import ChainBatches
from gemst.tuning.events import load_events
from gemst.tuning.model import ItemModel
from gemst.tuning.single import SingleBatches
from tests.tuning.conftest import ITEMS, llama, t5

CATALOGUE = pl.DataFrame(
    {
        "item_id": [f"i{n}" for n in range(ITEMS)],
        "title": [f"the {'old' if n % 2 else 'new'} film" for n in range(ITEMS)],
    }
)


def ids(levels: tuple[int, ...], retired: int | None = None) -> ItemIds:
    codes = np.stack(np.unravel_index(np.arange(ITEMS), levels), axis=1).astype(np.int32)
    active = np.arange(ITEMS) != (-1 if retired is None else retired)
    strategy = "atomic" if len(levels) == 1 else "rq-kmeans"
    return ItemIds(CATALOGUE["item_id"].to_list(), codes, levels, strategy, np.zeros(ITEMS, np.int32), active)


def test_every_active_item_is_asked_for_by_its_title_as_often_as_any_other(train: pl.DataFrame) -> None:
    mixed = with_alignment(train, CATALOGUE, ids((ITEMS,), retired=3), 22 / len(train), seed=0)
    assert mixed[: len(train)].equals(train)
    rows = mixed[len(train) :]
    assert rows["targets"].list.first().value_counts()["count"].to_list() == [2] * (ITEMS - 1)
    assert "i3" not in rows["targets"].list.first()
    title = dict(CATALOGUE.iter_rows())
    assert rows["query"].to_list() == [title[item] for item in rows["targets"].list.first()]
    assert set(rows["task"]) == {"search"}
    assert rows["history"].list.len().sum() == 0
    assert rows["user_id"].n_unique() == len(rows)
    assert rows.equals(
        with_alignment(train, CATALOGUE, ids((ITEMS,), retired=3), 22 / len(train), seed=0)[len(train) :]
    )


def test_weight_zero_changes_nothing(train: pl.DataFrame) -> None:
    assert with_alignment(train, CATALOGUE, ids((ITEMS,)), 0.0, seed=0) is train


@pytest.mark.parametrize("levels", [(ITEMS,), (4, 3)])
def test_chain_and_single_rows_ask_for_the_same_as_search(levels, train, tokenizer) -> None:
    own = ids(levels)
    prompter = Prompter(tokenizer, own.token_ids(20), own.index, Config().prompts, 20)
    mixed = with_alignment(train, CATALOGUE, own, 1.0, seed=0)
    model = ItemModel(llama(20 + sum(levels)), 20, levels, False)
    chained = list(ChainBatches(load_events(mixed, prompter), prompter, chain_items=64, batch_tokens=128)(0))
    single = list(SingleBatches(mixed, prompter, batch_tokens=128, decoder_start=None, seed=0)(0))
    with torch.no_grad():
        by_chain, one_by_one = (torch.cat([model(batch) for batch in batches]) for batches in (chained, single))
    torch.testing.assert_close(by_chain.sort().values, one_by_one.sort().values, atol=2e-5, rtol=1e-5)
    wanted = [int((mixed["task"] == task).sum()) * len(levels) for task in ("recommendation", "search")]
    for batches in (chained, single):
        assert [sum(batch.targets[task] for batch in batches) for task in (0, 1)] == wanted


def test_t5_learns_titles_of_items_that_nobody_clicked(train, tokenizer) -> None:
    """With alignment rows alone the loss of a title falls, with none it does not: the rows are really trained on."""
    own = ids((ITEMS,))
    prompter = Prompter(tokenizer, own.token_ids(20), own.index, Config().prompts, 20)
    catalogue = CATALOGUE.with_columns(title=pl.Series((["comedy", "drama", "thriller"] * ITEMS)[:ITEMS]))
    rows = with_alignment(train, catalogue, own, 1.0, seed=0)[len(train) :]
    model = ItemModel(t5(20 + ITEMS), 20, (ITEMS,), False)
    batches = SingleBatches(rows, prompter, batch_tokens=4096, decoder_start=0, seed=0)
    optimizer = torch.optim.Adam([model.items_in, model.items_out], lr=0.05)
    losses = []
    for epoch in range(12):
        for batch in batches(epoch):
            assert batch.boundary == 0  # all of them count as search
            loss = model(batch).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.5


def test_a_recommendation_model_has_no_use_for_it() -> None:
    with pytest.raises(ValidationError, match="count as search"):
        Config.model_validate({"tuning": {"tasks": "recommendation", "alignment": 0.1}})

"""The chain layout trains on exactly the prompts of the single layout."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch

from gemst.prompts import Prompter
from gemst.tuning.chain import ChainBatches
from gemst.tuning.events import load_events
from gemst.tuning.model import ItemModel
from gemst.tuning.single import SingleBatches
from tests.tuning.conftest import ITEMS, gpt2, llama


def chain(train: pl.DataFrame, prompter: Prompter, **settings: int) -> ChainBatches:
    return ChainBatches(load_events(train, prompter), prompter, **{"chain_items": 64, "batch_tokens": 256, **settings})


def item_model(make, attention: str = "sdpa") -> ItemModel:
    model = make(20 + ITEMS)
    model.set_attn_implementation(attention)
    return ItemModel(model, 20, (ITEMS,), False)


@pytest.mark.parametrize(("make", "attention"), [(llama, "sdpa"), (llama, "eager"), (gpt2, "eager")])
def test_chain_losses_equal_single_target_rows(train: pl.DataFrame, prompter: Prompter, make, attention: str) -> None:
    model = item_model(make, attention)
    with torch.no_grad():
        by_chain = torch.cat([model(batch) for batch in chain(train, prompter)(0)])
        single = SingleBatches(train, prompter, batch_tokens=64, decoder_start=None, seed=0)
        one_by_one = torch.cat([model(batch) for batch in single(0)])
    assert len(by_chain) == len(train)
    torch.testing.assert_close(by_chain.sort().values, one_by_one.sort().values, atol=2e-5, rtol=1e-5)


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

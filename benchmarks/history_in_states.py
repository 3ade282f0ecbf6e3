"""How much of the history the untuned backbone carries to where it predicts: what item rows alone can use of it.

    python benchmarks/history_in_states.py --out benchmarks/results/history-in-states.json

A history is summed up by the co-behaviour vectors of its last 20 items, newest first, each weighing 0.7 of the one
after it. The share of their variance (R2) that ridge regression reads off the states at which `gemst item-rows` fits
its rows is measured on held-out targets, by task, the penalty chosen by leave-one-out on the others. No output rows,
however well fitted, find the next item by a history that is not in the states. Run the pipeline up to tokenize first,
in this folder or in --project; results are kept by data set. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from sklearn.linear_model import RidgeCV
from sklearn.metrics import r2_score

from gemst import backbone, item_ids, layout
from gemst.data import tables
from gemst.files import read_json, require, write_json
from gemst.item_ids import ItemIds
from gemst.params import load
from gemst.prompts import TASKS, make_prompter
from gemst.tuning.batches import make_batches
from gemst.tuning.chain import ChainBatches
from gemst.tuning.head import whitening
from gemst.tuning.item_rows import collect, company_of
from gemst.tuning.model import ItemModel
from gemst.tuning.precision import autocast
from gemst.tuning.rows import start_rows

LAST, DECAY = 20, 0.7  # of a history, as the co-visits of the evaluation weigh it
HELD = 5  # one target in so many judges
PENALTIES = np.logspace(0, 4, 9)


def summaries(batches: ChainBatches, vectors: np.ndarray, at: np.ndarray) -> np.ndarray:
    """What the targets `at` (event numbers) have before them, (targets, k)."""
    events = batches.events
    start = np.repeat(events.start[:-1], np.diff(events.start))[at]
    found = np.zeros((len(at), vectors.shape[1]), np.float32)
    for age in range(LAST):
        place = batches.visible[at] - 1 - age
        known = (place >= start) & (events.items[place] >= 0)
        found[known] += DECAY**age * vectors[events.items[place[known]]]
    return found


@dataclass(frozen=True)
class Sample:
    """What `gemst item-rows` fits atomic rows on: an epoch's last targets and the untuned states that predict them."""

    ids: ItemIds
    items: pl.DataFrame
    train: pl.DataFrame
    batches: ChainBatches
    text: torch.Tensor  # the items' text rows (items, d)
    company: torch.Tensor  # their co-behaviour vectors (items, k)
    states: torch.Tensor  # (targets, d)
    labels: torch.Tensor  # (targets,) positions in the catalogue
    events: np.ndarray  # (targets,) numbers of the predicted events
    task: np.ndarray  # (targets,) 0 recommendation, 1 search
    held: int  # targets from this one on judge
    tokens: int

    def without_held(self) -> pl.DataFrame:
        """The train examples whose targets do not judge, for features that have not seen these."""
        if not self.train["clicked"].equals(self.train["timestamp"]):  # the examples are the targets, in order
            raise SystemExit("this benchmark is for logs without clicks later than their page")
        targets = self.batches.events.task >= 0
        held = np.zeros(len(targets), bool)
        held[self.events[self.held :]] = True
        return self.train.filter(pl.Series(~held[targets]))

    def prior(self, popular: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Output rows (items, d) that score `popular` (items,), clicks of each, in the mean of `states`."""
        wanted, mean = popular.add(1).log(), states.mean(0)
        return (wanted - wanted.mean())[:, None] * mean / mean.dot(mean)


def sample(tokens: int) -> Sample:
    """Run the untuned backbone of the project in the current folder over `tokens` of its training log."""
    config = load(Path("params.yaml"), ["tuning.batch_tokens=1024", "tuning.layout=chain"])
    torch.manual_seed(config.seed)
    model, tokenizer = backbone.load(config.backbone)
    items = tables.read_items(require(layout.VALIDATED / "items.parquet", made_by="gemst validate"))
    train = pl.read_parquet(require(layout.EXAMPLES / "train.parquet", made_by="gemst split"))
    ids = item_ids.load(require(layout.ITEM_IDS, made_by="gemst tokenize"))
    company = company_of(ids, items, train)
    text = start_rows(model, tokenizer, ids, items)
    inputs = start_rows(model, tokenizer, ids, items, company, config.item_rows.behaviour)
    first = backbone.add_item_tokens(model, tokenizer, ids.tokens, config.item_rows.norm * inputs, text)
    place = backbone.best_device()
    backbone.settle(model, place)
    batches = make_batches(config, train, make_prompter(config, model, tokenizer, ids, first), None)
    assert isinstance(batches, ChainBatches)
    item_model = ItemModel(model, first, ids.level_sizes, whole_vocabulary=False).eval()
    with torch.inference_mode(), autocast(config.tuning.precision, place):
        states, labels, level, spent = collect(item_model, batches, tokens, place)
    at, left = [], spent
    for rows in reversed(batches.plan(0)):  # the events those states predict
        at += [batches.targets(segment) for row in rows for segment in row]
        left -= batches.tokens(rows)
        if left <= 0:
            break
    events = np.concatenate(at)
    # Copies, because tensors of inference mode take no part in a fit.
    return Sample(
        ids, items, train, batches, text, company, states[level == 0].clone(), labels[level == 0].clone(), events,
        batches.events.task[events], len(events) - len(events) // HELD, spent,
    )  # fmt: skip


def measure(tokens: int) -> dict[str, Any]:
    """R2 by task of the project in the current folder."""
    log = sample(tokens)
    wanted = summaries(log.batches, log.company.numpy(), log.events)
    white = (log.states @ whitening(log.states[: log.held])).numpy()
    ridge = RidgeCV(PENALTIES).fit(white[: log.held], wanted[: log.held])
    guess = ridge.predict(white[log.held :])
    r2 = {
        name: round(r2_score(wanted[log.held :][mine], guess[mine], multioutput="variance_weighted"), 3)
        for number, name in enumerate(TASKS)
        if (mine := log.task[log.held :] == number).any()
    }
    return {
        "r2": r2, "targets": len(log.events), "items": len(log.ids.item_id), "tokens": log.tokens,
        "penalty": ridge.alpha_,
    }  # fmt: skip


def main(doc: str, measure: Callable[[int], dict[str, Any]]) -> int:
    """Measure the project of the command line and keep the result by data set; `doc` is the help."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=40_000, help="of an epoch's last batches")
    parser.add_argument("--project", type=Path, default=Path(), help="where params.yaml and artifacts/ are")
    parser.add_argument("--name", default="ml-100k", help="name of the data set in the results")
    parser.add_argument("--out", type=Path, help="write the results there as well, beside those of other data sets")
    given = parser.parse_args()
    out = given.out and given.out.resolve()
    os.chdir(given.project)
    found = measure(given.tokens)
    if out:
        kept = read_json(out) if out.exists() else {}
        write_json(out, {**kept, given.name: found})
    print(json.dumps({given.name: found}))
    return 0


if __name__ == "__main__":
    sys.exit(main(__doc__, measure))

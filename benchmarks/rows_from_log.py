"""What a query log adds to the fit of item rows on the untuned backbone's states.

    python benchmarks/rows_from_log.py --tokens 40000 --out benchmarks/results/rows-from-log.json

`gemst item-rows` fits the output rows to the items that were taken. Here a search's target is mixed with what others
took after the same query in the whole training log (its own click left out, smoothed by popularity): knowledge
distillation from the exact-query lookup, which has seen every search while the fit sees a sample. Each share of the
mixture is fitted until the held-out targets' loss rises; loss (nats) and NDCG@10 of those, nothing left out of the
ranking, are printed by task, beside popularity, the lookup and a fit on fewer targets. Run the pipeline up to tokenize
first, in this folder or in --project; results are kept by data set. The last line is JSON.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import polars as pl
import torch
from history_in_states import Sample, main, sample
from torch import Tensor
from torch.nn import functional

from gemst.evaluation.references.lookup import Lookup
from gemst.prompts import TASKS
from gemst.tuning.head import whitening
from gemst.tuning.item_rows import features_of
from gemst.tuning.rows import popularity

SHARES = (0.0, 0.5, 0.7, 0.9)
SMOOTH = 10.0  # clicks' worth of popularity under every query
LR, BATCH, EPOCHS, PATIENCE = 3e-4, 512, 60, 2  # as in gemst.tuning.head


class Clicks:
    """What others took after the query of a target, as a distribution over the catalogue."""

    def __init__(self, log: Sample, prior: Tensor) -> None:
        self.log, self.prior = log, prior
        self.lookup = Lookup().fit(log.train, log.items)
        place = pl.DataFrame({"item_id": self.lookup.item_ids}).with_row_index("at")
        known = pl.DataFrame({"item_id": log.ids.item_id})
        self.order = known.join(place, on="item_id", how="left", maintain_order="left")["at"].to_numpy()
        targets = log.batches.events.task >= 0
        row = np.full(len(targets), -1)
        row[targets] = np.arange(targets.sum())  # the train examples are the events that are targets, in order ...
        if not log.train["clicked"].equals(log.train["timestamp"]):  # ... but where a page has times of its own
            raise SystemExit("this benchmark is for logs without clicks later than their page")
        self.examples = log.train[row[log.events]]

    def __call__(self, at: np.ndarray) -> Tensor:
        counts = torch.from_numpy(self.lookup.scores(self.examples[at])[:, self.order])
        own = self.log.labels[at][:, None]
        counts.scatter_add_(1, own, -torch.ones(own.shape)).clamp_(min=0)
        return (counts + SMOOTH * self.prior) / (counts.sum(1, keepdim=True) + SMOOTH)


def judge(log: Sample, logits: Tensor) -> dict[str, list[float]]:
    """Loss and NDCG@10 of the held-out targets by task."""
    labels, task = log.labels[log.held :], log.task[log.held :]
    loss = functional.cross_entropy(logits, labels, reduction="none")
    own = logits.gather(1, labels[:, None])
    rank = (logits > own).sum(1) + ((logits == own).sum(1) - 1) / 2 + 1.0  # the middle of its equals
    gain = torch.where(rank <= 10, 1 / torch.log2(rank + 1), 0)
    return {
        name: [round(float(value[torch.from_numpy(task == number)].mean()), 4) for value in (loss, gain)]
        for number, name in enumerate(TASKS)
    }


def fit(log: Sample, share: float, used: int, clicks: Clicks) -> dict[str, Any]:
    """Rows fitted to the first `used` targets; `share` of a search's target is others' clicks."""
    features = features_of(log.ids, log.text, log.company, log.text[:, :0])  # measured before queries were features
    white = log.states @ whitening(log.states[:used])
    mean = white[:used].mean(0)
    mean = mean / mean.norm()
    searches = torch.from_numpy(log.task == 1)
    matrix = torch.nn.Parameter(torch.zeros(features.shape[1], white.shape[1]))
    bias = torch.nn.Parameter(torch.zeros(len(features)))
    adam = torch.optim.Adam([matrix, bias], lr=LR, betas=(0.9, 0.99))

    def logits(at: Tensor | slice) -> Tensor:
        return clicks.prior.log() + (white[at] @ matrix.T) @ features.T + (white[at] @ mean)[:, None] * bias

    generator = torch.Generator().manual_seed(7)
    best, kept, epoch, stale = float("inf"), {}, 0, 0
    while stale < PATIENCE and epoch < EPOCHS:
        for at in torch.randperm(used, generator=generator).split(BATCH):
            logp = logits(at).log_softmax(1)
            losses = -logp.gather(1, log.labels[at][:, None])[:, 0]
            if share:
                asked = searches[at]
                soft = -(clicks(at[asked].numpy()) * logp[asked]).sum(1)
                losses = torch.cat([losses[~asked], (1 - share) * losses[asked] + share * soft])
            adam.zero_grad()
            losses.mean().backward()
            adam.step()
        epoch, stale = epoch + 1, stale + 1
        with torch.no_grad():
            now = logits(slice(log.held, None))
            if (loss := float(functional.cross_entropy(now, log.labels[log.held :]))) < best:
                best, stale, kept = loss, 0, {"share": share, "targets": used, "epochs": epoch, **judge(log, now)}
    return kept


def measure(tokens: int) -> dict[str, Any]:
    """Every share on all targets but the held-out ones, and none on a quarter of them."""
    log = sample(tokens)
    prior = popularity(log.ids, log.train) + 1
    clicks = Clicks(log, prior / prior.sum())
    held = np.arange(log.held, len(log.labels))
    found: dict[str, Any] = {
        "tokens": log.tokens, "items": len(prior), "popularity": judge(log, clicks.prior.log().expand(len(held), -1)),
        "lookup": judge(log, torch.cat([clicks(at).log() for at in np.array_split(held, 1 + len(held) // BATCH)])),
        "fits": [],
    }  # fmt: skip
    for share, used in [(0.0, log.held // 4), *((share, log.held) for share in SHARES)]:
        found["fits"].append(fit(log, share, used, clicks))
        print(found["fits"][-1], file=sys.stderr)
    return found


if __name__ == "__main__":
    sys.exit(main(__doc__, measure))

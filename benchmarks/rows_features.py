"""What click rates by query add to the features of the item rows' fit, on the untuned backbone's states.

    python benchmarks/rows_features.py --tokens 40000 --out benchmarks/results/rows-features.json

`gemst item-rows` fits one matrix from item features to states. Rows are fitted with co-behaviour and text alone, and
with the click rates of `item_rows.queries` dimensions beside them, at several lengths. A fifth of the targets judges:
loss (nats) and NDCG@10 by task, nothing left out of the ranking. No feature has seen their clicks. Run the pipeline up
to tokenize first, in this folder or in --project; results are kept by data set. The last line is JSON.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from history_in_states import main, sample
from rows_from_log import judge

from gemst.config import ItemRows
from gemst.tuning import item_rows
from gemst.tuning.head import fit, whitening
from gemst.tuning.rows import popularity

LENGTHS = (0.0, 0.25, 0.5, 1.0)  # of the queries' features beside the others'; 0: none


def measure(tokens: int) -> dict[str, Any]:
    """Every set of features on the same targets."""
    log = sample(tokens)
    train = log.without_held()
    company = item_rows.company_of(log.ids, log.items, train)
    asked = item_rows.asked_of(log.ids, log.items, train, ItemRows().queries)
    states, labels = log.states[: log.held], log.labels[: log.held]
    white = whitening(states)
    start = log.prior(popularity(log.ids, train), states)
    found: dict[str, Any] = {"tokens": log.tokens, "targets": len(log.labels), "items": len(start), "fits": []}
    known = item_rows.features_of(log.ids, log.text, company, asked[:, :0])
    for length in LENGTHS:
        features = torch.cat([known, length * asked / asked.std()], 1)
        done = fit(start, features, states, labels, white, seed=7)
        scores = judge(log, log.states[log.held :] @ done.rows.T)
        found["fits"].append({"length": length, "epochs": done.epochs, **scores})
        print(found["fits"][-1], file=sys.stderr)
    return found


if __name__ == "__main__":
    sys.exit(main(__doc__, measure))

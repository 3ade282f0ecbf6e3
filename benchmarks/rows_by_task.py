"""Whether one task's item rows suffer from the other's targets, on the untuned backbone's states.

    python benchmarks/rows_by_task.py --tokens 160000 --out benchmarks/results/rows-by-task.json

`gemst item-rows` fits one matrix to the targets of both tasks. Rows are fitted to all of them, to those of each task
alone, and to all with the rarer task's repeated until both have about as many. A fifth of the targets judges: loss
(nats) and NDCG@10 by task, nothing left out of the ranking. No feature has seen their clicks. Run the pipeline up to
tokenize first, in this folder or in --project; results are kept by data set. The last line is JSON.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from history_in_states import main, sample
from rows_from_log import judge

from gemst.config import ItemRows
from gemst.prompts import TASKS
from gemst.tuning import item_rows
from gemst.tuning.head import fit, whitening
from gemst.tuning.rows import popularity


def measure(tokens: int) -> dict[str, Any]:
    """Every choice of targets, judged on the same others."""
    log = sample(tokens)
    train = log.without_held()
    company = item_rows.company_of(log.ids, log.items, train)
    asked = item_rows.asked_of(log.ids, log.items, train, ItemRows().queries)
    features = item_rows.features_of(log.ids, log.text, company, asked)
    popular = popularity(log.ids, train)
    task = log.task[: log.held]
    of = [np.flatnonzero(task == number) for number in range(len(TASKS))]
    fewer, more = sorted(of, key=len)
    even = np.sort(np.concatenate([more, *[fewer] * max(1, round(len(more) / len(fewer)))]))
    found: dict[str, Any] = {"tokens": log.tokens, "items": len(log.ids.item_id), "fits": []}
    fitted_on = {"both": np.arange(log.held), "both, as many of each": even} | dict(zip(TASKS, of, strict=True))
    for name, at in fitted_on.items():
        states, labels = log.states[at], log.labels[at]
        done = fit(log.prior(popular, states), features, states, labels, whitening(states), seed=7)
        scores = judge(log, log.states[log.held :] @ done.rows.T)
        counted = {one: int((task[at] == number).sum()) for number, one in enumerate(TASKS)}
        found["fits"].append({"targets of": name, "targets": counted, "epochs": done.epochs, **scores})
        print(found["fits"][-1], file=sys.stderr)
    return found


if __name__ == "__main__":
    sys.exit(main(__doc__, measure))

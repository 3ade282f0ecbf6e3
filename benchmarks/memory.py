"""What the memory costs: rankings by the demo backbone with and without it, in turns, and the counting itself.

The logs are those of `evaluation_scale.py`: synthetic, one category word a query, so that every query has clicked
thousands of items, and item rows are random. Seconds mean everything, rankings nothing. The last line is one JSON
object.

    python benchmarks/memory.py                                 # needs `gemst fetch`
    python benchmarks/memory.py --queries 128 --items 2000 --users 500
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from evaluation_scale import EVENTS, logs, untrained

from gemst import memory
from gemst.config import Config
from gemst.memory.evidence import Fit
from gemst.ranking import rank

_TURNS = 3


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--queries", type=int, default=512, help="queries to rank, half of each task")
    arguments.add_argument("--items", type=int, default=20_000)
    arguments.add_argument("--users", type=int, default=25_000, help=f"of the log; {EVENTS} events each")
    given = arguments.parse_args()
    config = Config()
    items, split = logs(given.users, given.items)
    train, asked = split(1, EVENTS), split(EVENTS, EVENTS + 2)[: given.queries]
    plain = untrained(config, items)
    counted, counting = timed(lambda: memory.build(plain.ids, memory.train_events(train)))
    fits = [Fit(case, 1, 0.0, 0.0, (0.7, 2.0, 0.1, 0.3, 0.1)) for case in ("recommendation", "search", "new query")]
    tuned = replace(plain, memory=counted.fitted(fits))
    seconds: dict[str, float] = {"without": float("inf"), "with": float("inf"), "mixture": float("inf")}
    for _ in range(_TURNS):
        for name, one in (("without", plain), ("with", tuned)):
            seconds[name] = min(seconds[name], timed(lambda one=one: rank(one, asked, 10, config.ranking))[1])
        size = config.ranking.batch_size
        parts = [asked[at : at + size] for at in range(0, len(asked), size)]
        _, spent = timed(lambda parts=parts: [tuned.memory.mixture(tuned.ids, part) for part in parts])
        seconds["mixture"] = min(seconds["mixture"], spent)
    each = {name: round(1000 * value / len(asked), 3) for name, value in seconds.items()}
    ratio = seconds["with"] / seconds["without"]
    print(f"{len(train):,} train events counted in {counting:.1f} s; {torch.get_num_threads()} threads")
    print(f"ms a query: {each['without']} without, {each['with']} with ({ratio:.2f}x); counts alone {each['mixture']}")
    line = {"queries": len(asked), "items": len(items), "train": len(train), "counting_s": round(counting, 2)}
    print(json.dumps(line | {"ms_per_query": each, "ratio": round(ratio, 3)}))


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What `work` returns, and its seconds."""
    began = time.perf_counter()
    return work(), time.perf_counter() - began


if __name__ == "__main__":
    main()

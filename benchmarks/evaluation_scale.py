"""Seconds of a full-catalogue evaluation: 10,000 queries over 20,000 items with the demo backbone and all references.

The logs are synthetic (Zipf clicks, one category word a query) and the item rows random: the metrics mean nothing, the
seconds everything. The last line is one JSON object.

    python benchmarks/evaluation_scale.py                                 # needs `gemst fetch`
    python benchmarks/evaluation_scale.py --queries 500 --items 2000
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from datetime import UTC, datetime

import numpy as np
import polars as pl
import torch

from gemst import backbone
from gemst.backbone import Tuned
from gemst.config import Config
from gemst.evaluation.run import evaluate
from gemst.item_ids import ItemIds
from gemst.progress import peak_mib
from gemst.prompts import Prompter
from gemst.ranking import rank

EVENTS = 40  # train events of a user
HISTORY = 20
CATEGORIES = 50


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--queries", type=int, default=10_000, help="test queries, half of each task")
    arguments.add_argument("--items", type=int, default=20_000)
    given = arguments.parse_args()
    config = Config()
    items, split = logs(given.queries // 2, given.items)
    train, valid, test = split(1, EVENTS), split(EVENTS, EVENTS + 2), split(EVENTS + 2, EVENTS + 4)
    tuned = untrained(config, items)
    result = evaluate(
        config, items, train, valid, test, lambda examples, k, seen: rank(tuned, examples, k, config.ranking, seen)
    )
    tokens = sum(len(prompt) for prompt in tuned.prompter.encode(test))
    seconds = result.metrics["seconds"]
    others = seconds["total"] - seconds["model"]
    print(f"{len(test):,} queries, {len(items):,} items, {tokens:,} prompt tokens, device {tuned.model.device}")
    print(f"model {seconds['model']:.1f} s; references, metrics and intervals {others:.1f} s; peak {peak_mib():,} MiB")
    line = {"queries": len(test), "items": len(items), "prompt_tokens": tokens, "peak_mib": peak_mib()}
    print(json.dumps(line | {"seconds": seconds}))


def logs(users: int, count: int) -> tuple[pl.DataFrame, Callable[[int, int], pl.DataFrame]]:
    """Items, and a function that gives the examples of every user's events [first, last)."""
    rng = np.random.default_rng(0)
    words = rng.zipf(1.3, (count, 3)) % 5000
    ids = pl.Series([f"i{n}" for n in range(count)])
    items = pl.DataFrame(
        {
            "item_id": ids,
            "title": [f"w{first} w{second} w{third}" for first, second, third in words.tolist()],
            "text": pl.Series([None] * count, dtype=pl.String),
            "categories": [[f"c{n % CATEGORIES}"] for n in range(count)],
        }
    )
    clicked = (rng.zipf(1.15, (users, EVENTS + 4)) - 1) % count

    def split(first: int, last: int) -> pl.DataFrame:
        user = np.repeat(np.arange(users), last - first)
        place = np.tile(np.arange(first, last), users)
        before = place[:, None] - HISTORY + np.arange(HISTORY)
        history = pl.DataFrame(
            {
                "row": np.repeat(np.arange(len(user)), HISTORY),
                "item_id": ids.gather(clicked[user[:, None], np.maximum(before, 0)].ravel()),
                "known": (before >= 0).ravel(),
            }
        )
        target = clicked[user, place]
        search = place % 2 == 1
        return pl.DataFrame(
            {
                "user_id": [f"u{n}" for n in user.tolist()],
                "task": np.where(search, "search", "recommendation"),
                "query": [f"c{n % CATEGORIES}" for n in target.tolist()],
                "history": history.group_by("row", maintain_order=True).agg(pl.col("item_id").filter("known"))[
                    "item_id"
                ],
                "targets": ids.gather(target).reshape((-1, 1)).arr.to_list(),
                "timestamp": pl.Series([datetime(2024, 1, 1, tzinfo=UTC)] * len(user), dtype=pl.Datetime("ms", "UTC")),
            }
        ).with_columns(query=pl.when(pl.Series(search)).then("query"), negatives=pl.lit([], pl.List(pl.String)))

    return items, split


def untrained(config: Config, items: pl.DataFrame) -> Tuned:
    """The demo backbone with a random row for every item."""
    model, tokenizer = backbone.load(config.backbone)
    count = len(items)
    ids = ItemIds(
        item_id=items["item_id"].to_list(), codes=np.arange(count, dtype=np.int32)[:, None], level_sizes=(count,),
        strategy="atomic", generation=np.zeros(count, np.int32), active=np.ones(count, bool),
    )  # fmt: skip
    rows = 0.1 * torch.randn(count, model.get_input_embeddings().embedding_dim)
    first = backbone.add_item_tokens(model, tokenizer, ids.tokens, rows, rows)
    model.to(backbone.best_device())
    return Tuned(
        model, tokenizer, ids, first, Prompter(tokenizer, ids.token_ids(first), ids.index, config.prompts, HISTORY)
    )


if __name__ == "__main__":
    main()

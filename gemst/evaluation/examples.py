"""Worked examples: what the model answered, in titles."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

_HISTORY = 6  # newest events shown


@dataclass(frozen=True)
class Example:
    """One test example in titles; `places` are the ranks of the targets found."""

    query: str | None
    history: list[str]  # oldest first
    targets: list[str]
    answer: list[tuple[str, bool]]  # title, whether it is a target; best first
    places: list[int]


def worked(
    test: pl.DataFrame, rankings: pl.DataFrame, items: pl.DataFrame, task: str, count: int = 10
) -> list[Example]:
    """`count` examples of a task, evenly spaced over the test set: nobody picked the good ones.

    `rankings` (row, item_id, rank) is the model's; its first ten ranks are shown.
    """
    rows = test.with_row_index("row").filter(pl.col("task") == task)
    if not len(rows):
        return []
    at = np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int))
    chosen = rows[at]
    ranked = rankings.join(chosen.select("row").cast({"row": rankings.schema["row"]}), on="row", how="semi")
    answers = {key[0]: part.sort("rank") for key, part in ranked.group_by("row")}
    shown = pl.concat([chosen["history"].explode(), chosen["targets"].explode(), ranked["item_id"]]).unique()
    titles = dict(items.filter(pl.col("item_id").is_in(shown.implode())).select("item_id", "title").iter_rows())
    examples = []
    for line in chosen.to_dicts():
        targets = set(line["targets"])
        answer = answers.get(line["row"], ranked.clear())
        found = answer.filter(pl.col("item_id").is_in(list(targets)))["rank"].to_list()
        examples.append(
            Example(
                line["query"],
                [titles.get(item, item) for item in line["history"][-_HISTORY:]],
                [titles.get(item, item) for item in line["targets"]],
                [(titles.get(item, item), item in targets) for item in answer["item_id"].head(10)],
                found,
            )
        )
    return examples

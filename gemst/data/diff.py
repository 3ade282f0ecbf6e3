"""What changed between two versions of the canonical tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from gemst.data.rules import profile
from gemst.data.tables import TASKS, read_events, read_items

_EVENT = ["user_id", "item_id", "timestamp", "task", "query", "request_id"]


def diff(before: Path, after: Path) -> dict[str, Any]:
    """Compare two folders with items.parquet and events.parquet.

    Returns sizes (rows of name, before, after), changes (counts: new, gone and changed rows; events of new items and
    new users) and drift (Jensen-Shannon divergence in bits, 0 = equal to 1 = disjoint, of item popularity, queries
    and tasks). Raises GemstError when a table is missing or damaged.
    """
    old_items, new_items = (read_items(folder / "items.parquet") for folder in (before, after))
    old, new = (read_events(folder / "events.parquet") for folder in (before, after))
    measures = [_measures(old_items, old), _measures(new_items, new)]
    both = old_items.join(new_items, on="item_id", suffix="_new")
    changed = pl.any_horizontal(
        pl.col(name).ne_missing(pl.col(f"{name}_new")) for name in ("title", "text", "categories")
    )
    fresh_items = new_items.join(old_items, on="item_id", how="anti")
    fresh_users = new.select("user_id").unique().join(old, on="user_id", how="anti")
    return {
        "sizes": [
            {"name": name, "before": measures[0].get(name), "after": measures[1].get(name)} for name in measures[1]
        ],
        "changes": {
            "new items": len(fresh_items),
            "gone items": old_items.join(new_items, on="item_id", how="anti").height,
            "changed items": both.filter(changed).height,
            "new users": len(fresh_users),
            "gone users": old.select("user_id").unique().join(new, on="user_id", how="anti").height,
            "new events": new.join(old, on=_EVENT, how="anti", nulls_equal=True).height,
            "gone events": old.join(new, on=_EVENT, how="anti", nulls_equal=True).height,
            "events of new items": new.join(fresh_items, on="item_id", how="semi").height,
            "events of new users": new.join(fresh_users, on="user_id", how="semi").height,
        },
        "drift": {
            name: divergence(old[name].drop_nulls(), new[name].drop_nulls()) for name in ("item_id", "query", "task")
        },
    }


def divergence(left: pl.Series, right: pl.Series) -> float:
    """Jensen-Shannon divergence of two samples' value distributions, in bits: 0 when equal, 1 when they share no value.

    >>> divergence(pl.Series(["a", "b"]), pl.Series(["a", "b", "b", "a"]))
    0.0
    >>> divergence(pl.Series(["a"]), pl.Series(["b"]))
    1.0
    """
    if left.is_empty() or right.is_empty():
        return 0.0 if left.is_empty() and right.is_empty() else 1.0
    p, q = (
        pl.DataFrame({"value": values}).group_by("value").agg(share=pl.len() / len(values)) for values in (left, right)
    )
    shares = p.join(q, on="value", how="full", coalesce=True, suffix="_right").fill_null(0.0)
    a, b = pl.col("share"), pl.col("share_right")
    middle = (a + b) / 2
    terms = [pl.when(side > 0).then(side * (side / middle).log(2)).otherwise(0.0).sum() for side in (a, b)]
    return round(float(shares.select((terms[0] + terms[1]) / 2).item()), 6) + 0.0


def lines(difference: dict[str, Any]) -> list[str]:
    """The difference as lines of text."""
    sizes = [f"{row['name']:<24} {_text(row['before']):>24} -> {_text(row['after'])}" for row in difference["sizes"]]
    changes = [f"{name:<24} {count:>24,}" for name, count in difference["changes"].items()]
    drift = [
        f"{'drift of ' + name:<24} {value:>24.4f} bits (0 equal, 1 disjoint)"
        for name, value in difference["drift"].items()
    ]
    return [*sizes, "", *changes, "", *drift]


def _measures(items: pl.DataFrame, events: pl.DataFrame) -> dict[str, Any]:
    tasks = dict(events["task"].value_counts().iter_rows())
    return {**profile(items, events), **{f"{task} events": tasks.get(task, 0) for task in TASKS}}


def _text(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int | float) else str(value)

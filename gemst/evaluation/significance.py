"""Is one ranker better than another? Paired bootstrap over users, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from gemst.errors import GemstError
from gemst.evaluation.metrics import harmonic_mean
from gemst.prompts import TASKS

JOINT = "joint"
_KEY = ("user_id", "task", "timestamp", "row")
_CELLS = 8_000_000  # of a block of resampling weights
_LEVEL = 0.95

Floats = NDArray[np.float64]


def paired_bootstrap(
    a: pl.DataFrame,
    b: pl.DataFrame,
    *,
    metrics: Sequence[str] = ("ndcg@10", "hit@10"),
    rankers: tuple[str, str] = ("model", "model"),
    protocol: str = "full",
    resamples: int = 2000,
    seed: int = 7,
) -> pl.DataFrame:
    """Is `b` better than `a`? Ranker `rankers[0]` of per-query table `a` against `rankers[1]` of `b`, query by query.

    Users are resampled, not queries: one user's queries are not independent, and both tasks of a user stay together.
    Returns one line per task and metric, and per metric the joint score (harmonic mean of the tasks), with columns

        task, metric, queries, a, b (means), difference (b - a), difference_low, difference_high, ratio (b / a),
        ratio_low, ratio_high (95 % percentile intervals; null where a is 0), p (two-sided, of no difference).

    Raises GemstError when the frames do not hold the same queries.
    """
    first, second = (
        frame.filter((pl.col("ranker") == ranker) & (pl.col("protocol") == protocol))
        for frame, ranker in zip((a, b), rankers, strict=True)
    )
    pairs = _paired(first, second, metrics)
    users = pairs["user_id"].rank("dense").cast(pl.Int64).to_numpy() - 1
    count = int(users.max()) + 1
    weights = _Resamples(count, resamples, seed)
    lines = []
    for metric in metrics:
        sides = [pairs[metric].to_numpy(), pairs[f"{metric}_b"].to_numpy()]
        tasks = [task for task in TASKS if (pairs["task"] == task).any()]
        means, drawn = [], []
        for task in tasks:
            inside = (pairs["task"] == task).to_numpy()
            queries = np.bincount(users[inside], minlength=count).astype(float)
            sums = [np.bincount(users[inside], side[inside], minlength=count) for side in sides]
            means.append([float(side[inside].mean()) for side in sides])
            drawn.append(weights.means(sums, queries))
            lines.append({"task": task, "metric": metric, "queries": int(inside.sum()), **_line(means[-1], drawn[-1])})
        if len(tasks) > 1:
            joint = [harmonic_mean([mean[side] for mean in means]) for side in (0, 1)]
            joint_drawn = len(tasks) / (1 / np.maximum(np.stack(drawn), 1e-12)).sum(axis=0)
            lines.append({"task": JOINT, "metric": metric, "queries": len(pairs), **_line(joint, joint_drawn)})
    return pl.DataFrame(lines)


def intervals(per_query: pl.DataFrame, metric: str = "ndcg@10", resamples: int = 2000, seed: int = 7) -> pl.DataFrame:
    """Mean and 95 % bootstrap interval over users of every ranker, per protocol and task.

    Returns protocol, ranker, task, mean, low, high, in the order of `per_query`.
    """
    lines = []
    for (protocol, ranker, task), part in per_query.group_by("protocol", "ranker", "task", maintain_order=True):
        users = part["user_id"].rank("dense").cast(pl.Int64).to_numpy() - 1
        values = part[metric].to_numpy()
        weights = _Resamples(int(users.max()) + 1, resamples, seed)
        drawn = weights.means([np.bincount(users, values)], np.bincount(users).astype(float))[0]
        low, high = _interval(drawn)
        line = {"protocol": protocol, "ranker": ranker, "task": task}
        lines.append({**line, "mean": float(values.mean()), "low": low, "high": high})
    return pl.DataFrame(lines)


class _Resamples:
    """The same bootstrap draws of `users`, replayed for every quantity."""

    def __init__(self, users: int, resamples: int, seed: int) -> None:
        self.users, self.resamples, self.seed = users, resamples, seed

    def means(self, sums: Sequence[NDArray[Any]], queries: Floats) -> Floats:
        """Resampled means (len(sums), resamples) of per-user sums (users,) over per-user query counts (users,)."""
        rng = np.random.default_rng(self.seed)
        table = np.stack([*sums, queries], axis=1)
        step = max(1, _CELLS // self.users)
        totals = []
        for start in range(0, self.resamples, step):
            draws = min(step, self.resamples - start)
            picks = rng.integers(0, self.users, (draws, self.users)) + np.arange(draws)[:, None] * self.users
            weights = np.bincount(picks.ravel(), minlength=draws * self.users).reshape(draws, self.users)
            totals.append(weights @ table)
        total = np.concatenate(totals)
        means: Floats = (total[:, :-1] / np.maximum(total[:, -1:], 1)).T
        return means


def _line(means: Sequence[float], drawn: Floats) -> dict[str, float | None]:
    """`means` of a and b, `drawn` (2, resamples)."""
    first, second = means
    differences = drawn[1] - drawn[0]
    low, high = _interval(differences)
    # Both tails with the +1 of a finite number of resamples; ties count on both sides.
    tails = min((differences <= 0).sum(), (differences >= 0).sum())
    line: dict[str, float | None] = {
        "a": first, "b": second, "difference": second - first, "difference_low": low, "difference_high": high,
        "ratio": None, "ratio_low": None, "ratio_high": None,
        "p": min(1.0, 2 * (tails + 1) / (len(differences) + 1)),
    }  # fmt: skip
    if first > 0 and (drawn[0] > 0).all():
        low, high = _interval(drawn[1] / drawn[0])
        line |= {"ratio": second / first, "ratio_low": low, "ratio_high": high}
    return line


def _interval(drawn: Floats) -> tuple[float, float]:
    low, high = np.quantile(drawn, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(low), float(high)


def _paired(a: pl.DataFrame, b: pl.DataFrame, metrics: Sequence[str]) -> pl.DataFrame:
    """Both frames side by side, `_b` after b's metrics."""
    for name, frame in (("first", a), ("second", b)):
        missing = [column for column in (*_KEY, *metrics) if column not in frame.columns]
        if missing:
            raise GemstError(
                f"the {name} run's per-query table has no column {', '.join(missing)}", "Evaluate it again"
            )
        if not len(frame):
            raise GemstError(
                f"the {name} run's per-query table has no line of the ranker and protocol asked for",
                "Evaluate it again",
            )
    pairs = a.select(*_KEY, *metrics).join(b.select(*_KEY, *metrics), on=_KEY, how="inner", suffix="_b").sort("row")
    if not len(pairs) == len(a) == len(b):
        raise GemstError(
            f"the two runs were not tested on the same queries ({len(a)} and {len(b)}, {len(pairs)} in common)",
            "Compare runs made from the same data and split parameters",
        )
    return pairs

"""Is one ranker better than another? Paired bootstrap over users and seeds, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
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


def read_scores(path: Path) -> pl.DataFrame:
    """A per-query table. Raises GemstError when it is damaged."""
    try:
        return pl.read_parquet(path)
    except pl.exceptions.PolarsError as error:
        raise GemstError(f"{path} cannot be read: {str(error).splitlines()[0]}", "Evaluate that run again") from None


def check_same_task(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Raise GemstError when two runs' metrics.json tell of the same queries under other rules.

    They may have ranked other catalogues, or only one of them left out what users had met.
    """
    items = [one["counts"]["items"] for one in (a, b)]
    if items[0] != items[1]:
        raise GemstError(
            f"the runs ranked {items[0]:,} and {items[1]:,} items: their scores are of different tasks",
            "Compare runs made from the same items",
        )
    if a.get("exclude_seen", True) != b.get("exclude_seen", True):  # older runs do not tell: the default
        raise GemstError(
            "one run left out the items that users had met (evaluation.exclude_seen), the other did not",
            "Evaluate both with the same setting",
        )


def paired_bootstrap(
    a: pl.DataFrame | Sequence[pl.DataFrame],
    b: pl.DataFrame | Sequence[pl.DataFrame],
    *,
    metrics: Sequence[str] = ("ndcg@10", "hit@10"),
    rankers: tuple[str, str] = ("model", "model"),
    protocol: str = "full",
    resamples: int = 2000,
    seed: int = 7,
) -> pl.DataFrame:
    """Is `b` better than `a`? Ranker `rankers[0]` of per-query table `a` against `rankers[1]` of `b`, query by query.

    Each side may be several runs, such as a method's seeds: its score is the mean of theirs. Users are resampled, not
    queries: one user's queries are not independent, and both tasks of a user stay together. Seeds are resampled with
    them, in pairs where both sides have as many; a few seeds tell their spread only roughly, one does not tell it.
    Returns one line per task and metric, and per metric the joint score (harmonic mean of the tasks), with columns

        task, metric, queries, a, b (means), difference (b - a), difference_low, difference_high, ratio (b / a),
        ratio_low, ratio_high (95 % percentile intervals; null where a is 0), p (two-sided, of no difference).

    Raises GemstError when the frames do not hold the same queries, or not the columns it takes.
    """
    given = [[side] if isinstance(side, pl.DataFrame) else list(side) for side in (a, b)]
    pairs, columns = _paired(given, rankers, protocol, metrics)
    users = pairs["user_id"].rank("dense").cast(pl.Int64).to_numpy() - 1
    count = int(users.max()) + 1
    weights = _Resamples(count, resamples, seed)
    runs, split = len(columns), len(given[0])
    seeds = _seed_draws(split, runs - split, resamples, seed)
    lines = []
    for metric in metrics:
        values = [pairs[f"{metric}{column}"].to_numpy() for column in columns]
        tasks = [task for task in TASKS if (pairs["task"] == task).any()]
        means, drawn = np.empty((len(tasks), runs)), np.empty((len(tasks), runs, resamples))
        for at, task in enumerate(tasks):
            inside = (pairs["task"] == task).to_numpy()
            queries = np.bincount(users[inside], minlength=count).astype(float)
            sums = [np.bincount(users[inside], value[inside], minlength=count) for value in values]
            means[at] = [value[inside].mean() for value in values]
            drawn[at] = weights.means(sums, queries)
            line = _line(_of_sides(means[at], split), _drawn_sides(drawn[at], split, seeds))
            lines.append({"task": task, "metric": metric, "queries": int(inside.sum()), **line})
        if len(tasks) > 1:
            joint = np.array([harmonic_mean(run.tolist()) for run in means.T])
            joint_drawn = len(tasks) / (1 / np.maximum(drawn, 1e-12)).sum(axis=0)
            line = _line(_of_sides(joint, split), _drawn_sides(joint_drawn, split, seeds))
            lines.append({"task": JOINT, "metric": metric, "queries": len(pairs), **line})
    return pl.DataFrame(lines)


def _of_sides(runs: Floats, split: int) -> Floats:
    """Means of the first `split` runs and of the others: (runs,) -> (2,)."""
    return np.array([runs[:split].mean(), runs[split:].mean()])


def _seed_draws(first: int, second: int, resamples: int, seed: int) -> list[NDArray[np.int64]]:
    """Which of its runs each side takes in each resample, (runs of the side, resamples); the same where both have as
    many."""
    rng = np.random.default_rng([seed, 1])
    draws = [rng.integers(0, runs, (runs, resamples)) for runs in (first, second)]
    return [draws[0], draws[0]] if first == second else draws


def _drawn_sides(runs: Floats, split: int, seeds: Sequence[NDArray[np.int64]]) -> Floats:
    """Resampled means of both sides over the runs they drew: (runs, resamples) -> (2, resamples)."""
    sides = zip((runs[:split], runs[split:]), seeds, strict=True)
    return np.stack([np.take_along_axis(side, draws, axis=0).mean(axis=0) for side, draws in sides])


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
        """Resampled means (len(sums), resamples) of per-user sums (users,) over per-user query counts (users,).

        NaN where a draw holds no query: it says nothing of a task that few users have.
        """
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
        held = total[:, -1:]
        means: Floats = np.divide(total[:, :-1], held, out=np.full_like(total[:, :-1], np.nan), where=held > 0).T
        return means


def _line(means: Floats, drawn: Floats) -> dict[str, float | None]:
    """`means` (2,) of a and b, `drawn` (2, resamples)."""
    first, second = means.tolist()
    drawn = drawn[:, ~np.isnan(drawn).any(axis=0)]
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
    low, high = np.nanquantile(drawn, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(low), float(high)


def _paired(
    given: Sequence[Sequence[pl.DataFrame]], rankers: Sequence[str], protocol: str, metrics: Sequence[str]
) -> tuple[pl.DataFrame, list[str]]:
    """Both sides' runs beside each other, and what is appended to a metric's name for each run, first side first."""
    pairs: pl.DataFrame | None = None
    columns: list[str] = []
    lengths: list[int] = []
    for side, runs, ranker in zip(("first", "second"), given, rankers, strict=True):
        for frame in runs:
            part = _lines(frame, side, ranker, protocol, metrics)
            columns.append(f"/{len(columns)}")
            lengths.append(len(part))
            part = part.rename({metric: f"{metric}{columns[-1]}" for metric in metrics})
            if pairs is not None and any(pairs.schema[key] != part.schema[key] for key in _KEY):
                raise GemstError(
                    f"the {side} run's per-query table has other types of {', '.join(_KEY)} than the one before it",
                    "Evaluate both with one version of gemst",
                )
            pairs = part if pairs is None else pairs.join(part, on=_KEY, how="inner")
    assert pairs is not None
    if set(lengths) != {len(pairs)}:
        raise GemstError(
            f"the runs were not tested on the same queries ({' and '.join(map(str, lengths))}, {len(pairs)} in common)",
            "Compare runs made from the same data and split parameters",
        )
    return pairs.sort("row"), columns


def _lines(frame: pl.DataFrame, side: str, ranker: str, protocol: str, metrics: Sequence[str]) -> pl.DataFrame:
    """A per-query table's lines of one ranker and protocol, key and `metrics` alone."""
    missing = [name for name in ("ranker", "protocol", *_KEY, *metrics) if name not in frame.columns]
    if missing:
        raise GemstError(f"the {side} run's per-query table has no column {', '.join(missing)}", "Evaluate it again")
    lines = frame.filter((pl.col("ranker") == ranker) & (pl.col("protocol") == protocol)).select(*_KEY, *metrics)
    if not len(lines):
        raise GemstError(
            f"the {side} run's per-query table has no line of the ranker and protocol asked for", "Evaluate it again"
        )
    return lines

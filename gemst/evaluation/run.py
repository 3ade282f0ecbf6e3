"""Evaluate a model next to the reference rankers: the same examples, the same exclusions, the same metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import polars as pl

from gemst.evaluation.metrics import METRICS, harmonic_mean, relevant_items, table_of_metrics
from gemst.evaluation.protocols import BM25, FULL, candidates, left_out, met_items, seen_items
from gemst.evaluation.references import all_references
from gemst.evaluation.significance import intervals, paired_bootstrap
from gemst.evaluation.slices import SLICES, slice_columns
from gemst.prompts import TASKS

if TYPE_CHECKING:
    from gemst.config import Config

MODEL = "model"
HEADLINE = "ndcg@10"

Rank = Callable[[pl.DataFrame, int, pl.DataFrame | None], pl.DataFrame]
Rerank = Callable[[pl.DataFrame, pl.Series], pl.DataFrame]


@dataclass(frozen=True)
class Evaluation:
    """What was measured."""

    metrics: dict[str, Any]  # metrics.json
    per_query: pl.DataFrame  # one line per ranker, protocol and example; see `evaluate`
    rankings: pl.DataFrame  # the model's full ranking: row, item_id, rank, score


def evaluate(
    config: Config,
    items: pl.DataFrame,
    train: pl.DataFrame,
    valid: pl.DataFrame,
    test: pl.DataFrame,
    rank: Rank,
    *,
    rerank: Rerank | None = None,
    drift: dict[str, float] | None = None,
) -> Evaluation:
    """Measure a model and all references on the test examples.

    `rank(examples, k, seen)` returns row, item_id, rank, score as `Reference.rank` does; `rerank(examples, candidates)`
    likewise for given candidates, and without it the model is left out of the sampled protocols. `drift` goes into the
    metrics as it is.

    `metrics` holds model, references (name -> task -> metric, and joint: the harmonic mean of both tasks' NDCG@10),
    protocols (the same per sampled protocol), slices (slice -> label -> ranker -> task -> NDCG@10, queries), intervals
    (ranker -> task -> 95 % interval of NDCG@10), paired (reference -> task -> the model's difference from it), drift,
    counts, exclude_seen and seconds. `per_query` has ranker, protocol, row, user_id, task, timestamp, the slice labels
    and every metric. Equal inputs give equal metrics; seconds apart.
    """
    metrics_at = _cutoffs(config)
    began = time.perf_counter()
    met = met_items(test, [train, valid])
    unwanted = left_out(test, met)
    seen = unwanted if config.evaluation.exclude_seen else None
    relevant = relevant_items(test)
    labels = (
        test.select("user_id", "task", "timestamp")
        .with_row_index("row")
        .join(slice_columns(test, train, met), on="row")
    )
    rankings, model_seconds = _timed(lambda: rank(test, max(metrics_at), seen))
    seconds: dict[str, float] = {MODEL: model_seconds}
    references, seconds["references_fit"] = _timed(lambda: all_references(items, train, valid, config))
    measured = [(MODEL, FULL, rankings, relevant)]
    for reference in references:
        listed, seconds[reference.name] = _timed(partial(reference.rank, test, max(metrics_at), seen))
        measured.append((reference.name, FULL, listed, relevant))
    for protocol in config.evaluation.protocols:
        bm25 = next(reference for reference in references if reference.name == "bm25")
        pool = candidates(protocol, test, items, unwanted, config.seed, bm25 if protocol == BM25 else None)
        rerankers = ([(MODEL, rerank)] if rerank else []) + [(one.name, one.rerank) for one in references]
        asked = relevant.filter((pool.list.len() > 0).gather(relevant["row"]))
        measured += [(name, protocol, reorder(test, pool), asked) for name, reorder in rerankers]
    tables = [
        table_of_metrics(listed, wanted, metrics_at)
        .with_columns(ranker=pl.lit(name), protocol=pl.lit(protocol))
        .join(labels, on="row", how="left", maintain_order="left")
        for name, protocol, listed, wanted in measured
    ]
    columns = ["ranker", "protocol", *labels.columns, *(f"{metric}@{k}" for k in metrics_at for metric in METRICS)]
    per_query = pl.concat(tables).select(columns)
    seconds["total"] = time.perf_counter() - began
    means = summary(per_query)
    metrics = {
        **_split(means[FULL]),
        "protocols": {
            protocol: _split(means[protocol]) for protocol in config.evaluation.protocols if protocol in means
        },
        "slices": _slices(per_query),
        "intervals": _intervals(per_query, config),
        "paired": _paired(per_query, config),
        "drift": drift or {},
        "counts": _counts(items, train, valid, test, labels),
        "exclude_seen": config.evaluation.exclude_seen,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }
    return Evaluation(metrics, per_query, rankings)


def joint_score(config: Config, train: pl.DataFrame, valid: pl.DataFrame, test: pl.DataFrame, rank: Rank) -> float:
    """What `evaluate` calls the model's joint score, without anything beside it."""
    seen = seen_items(test, [train, valid]) if config.evaluation.exclude_seen else None
    metrics_at = _cutoffs(config)
    scores = table_of_metrics(rank(test, max(metrics_at), seen), relevant_items(test), metrics_at)
    tasks = test.select("task").with_row_index("row")
    per_query = scores.join(tasks, on="row", how="left").with_columns(ranker=pl.lit(MODEL), protocol=pl.lit(FULL))
    return float(summary(per_query)[FULL][MODEL]["joint"])


def _cutoffs(config: Config) -> tuple[int, ...]:
    """The metrics' cut-offs: the headline's is always one. The largest also widens a beam search."""
    return tuple(sorted({*config.evaluation.ks, int(HEADLINE.split("@")[1])}))


def summary(per_query: pl.DataFrame) -> dict[str, dict[str, dict[str, Any]]]:
    """Means: protocol -> ranker -> task -> metric, and joint over the tasks that were measured (one or both)."""
    names = [name for name in per_query.columns if name.split("@")[0] in METRICS]
    means = per_query.group_by("protocol", "ranker", "task", maintain_order=True).agg(pl.col(names).mean())
    result: dict[str, dict[str, dict[str, Any]]] = {}
    for line in means.to_dicts():
        by_task = result.setdefault(line["protocol"], {}).setdefault(line["ranker"], {})
        by_task[line["task"]] = {name: line[name] for name in names}
    for rankers in result.values():
        for by_task in rankers.values():
            by_task["joint"] = harmonic_mean([by_task[task][HEADLINE] for task in TASKS if task in by_task])
    return result


def _split(means: dict[str, dict[str, Any]]) -> dict[str, Any]:
    references = {name: value for name, value in means.items() if name != MODEL}
    return ({MODEL: means[MODEL]} if MODEL in means else {}) | {"references": references}


def _slices(per_query: pl.DataFrame) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name in SLICES:
        means = (
            per_query.filter((pl.col("protocol") == FULL) & pl.col(name).is_not_null())
            .group_by(name, "ranker", "task", maintain_order=True)
            .agg(pl.col(HEADLINE).mean(), queries=pl.len())
        )
        for line in means.to_dicts():
            into = result.setdefault(name, {}).setdefault(line[name], {}).setdefault(line["ranker"], {})
            into[line["task"]] = {HEADLINE: line[HEADLINE], "queries": line["queries"]}
    return result


def _intervals(per_query: pl.DataFrame, config: Config) -> dict[str, Any]:
    full = per_query.filter(pl.col("protocol") == FULL)
    result: dict[str, Any] = {}
    for line in intervals(full, HEADLINE, config.evaluation.bootstrap, config.seed).to_dicts():
        result.setdefault(line["ranker"], {})[line["task"]] = [line["low"], line["high"]]
    return result


def _paired(per_query: pl.DataFrame, config: Config) -> dict[str, Any]:
    """The model against each reference, reference -> task or joint -> difference, its interval, ratio, p."""
    result: dict[str, Any] = {}
    for name in per_query["ranker"].unique(maintain_order=True).to_list():
        if name != MODEL:
            lines = paired_bootstrap(
                per_query, per_query, metrics=[HEADLINE], rankers=(name, MODEL),
                resamples=config.evaluation.bootstrap, seed=config.seed,
            )  # fmt: skip
            wanted = ("difference", "difference_low", "difference_high", "ratio", "p")
            result[name] = {line["task"]: {key: line[key] for key in wanted} for line in lines.to_dicts()}
    return result


def _counts(
    items: pl.DataFrame, train: pl.DataFrame, valid: pl.DataFrame, test: pl.DataFrame, labels: pl.DataFrame
) -> dict[str, int]:
    tables: Sequence[tuple[str, pl.DataFrame]] = (("train", train), ("valid", valid), ("test", test))
    counts = {name: len(table) for name, table in tables} | {"items": len(items)}
    counts |= {f"test_{task}": int((test["task"] == task).sum()) for task in TASKS}
    return counts | {
        "test_unseen_items": int((labels["item"] == "unseen").sum()),
        "test_met_again": int((labels["target"] == "again").sum()),
    }


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    return work(), time.perf_counter() - began

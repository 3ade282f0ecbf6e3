"""Hit, NDCG, MRR and MAP at k, for queries with one or many relevant items."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

METRICS = ("hit", "ndcg", "mrr", "map")


def table_of_metrics(ranked: pl.DataFrame, relevant: pl.DataFrame, ks: Sequence[int]) -> pl.DataFrame:
    """Score every query of `relevant` at every cut-off of `ks`.

    `ranked` has columns row, item_id, rank (1 is best; an item listed twice counts at its best rank only);
    `relevant` has columns row, item_id. Returns one line per row of `relevant`, sorted by row, with columns row,
    then hit@k, ndcg@k, mrr@k, map@k (Float64, 0 to 1) for each k. A query that nothing was ranked for scores 0.

    With R relevant items, of which those at ranks r_1 < r_2 < ... <= k were found:

        hit@k  = 1 if any was found
        mrr@k  = 1 / r_1
        ndcg@k = sum_j 1 / log2(r_j + 1)  /  sum_{i=1}^{min(R, k)} 1 / log2(i + 1)
        map@k  = sum_j (j / r_j)  /  R

    Both denominators count ALL relevant items, found or not (trec_eval's definitions). Raises ValueError when a rank
    or a k is below 1.

    One of three targets found, in first place, is far from a perfect ranking:

    >>> ranked = pl.DataFrame({"row": [0, 0], "item_id": ["a", "x"], "rank": [1, 2]})
    >>> relevant = pl.DataFrame({"row": [0, 0, 0], "item_id": ["a", "b", "c"]})
    >>> {name: round(value, 4) for name, value in table_of_metrics(ranked, relevant, [10]).row(0, named=True).items()}
    {'row': 0, 'hit@10': 1.0, 'ndcg@10': 0.4693, 'mrr@10': 1.0, 'map@10': 0.3333}

    Two of two found, at ranks 2 and 3: MAP is (1/2 + 2/3) / 2.

    >>> ranked = pl.DataFrame({"row": [0, 0, 0], "item_id": ["x", "a", "b"], "rank": [1, 2, 3]})
    >>> relevant = pl.DataFrame({"row": [0, 0], "item_id": ["a", "b"]})
    >>> {name: round(value, 4) for name, value in table_of_metrics(ranked, relevant, [2, 3]).row(0, named=True).items()}
    ... # doctest: +NORMALIZE_WHITESPACE
    {'row': 0, 'hit@2': 1.0, 'ndcg@2': 0.3869, 'mrr@2': 0.5, 'map@2': 0.25,
     'hit@3': 1.0, 'ndcg@3': 0.6934, 'mrr@3': 0.5, 'map@3': 0.5833}
    """
    if not ks or min(ks) < 1:
        raise ValueError(f"cut-offs must be at least 1, got {tuple(ks)}")
    relevant = relevant.select("row", "item_id").drop_nulls().unique()
    queries = relevant.group_by("row").len("relevant").sort("row")
    hits = (
        ranked.select("row", "item_id", pl.col("rank").cast(pl.Int64))
        .join(relevant.cast({"row": ranked.schema["row"]}), on=["row", "item_id"], how="semi")
        .group_by("row", "item_id")
        .agg(pl.col("rank").min())
        .sort("row", "rank")
        .cast({"row": relevant.schema["row"]})
        .with_columns(found=pl.int_range(1, pl.len() + 1).over("row"))
    )
    if len(ranked) and ranked["rank"].cast(pl.Int64).min() < 1:  # type: ignore[operator]
        raise ValueError("ranks start at 1")
    ideal = np.cumsum(1 / np.log2(np.arange(2, max(ks) + 2)))
    at = pl.col("rank")
    sums = hits.group_by("row").agg(
        expression
        for k in ks
        for expression in (
            (at <= k).any().cast(pl.Float64).alias(f"hit@{k}"),
            (1 / (at.filter(at <= k) + 1).log(2)).sum().alias(f"ndcg@{k}"),
            (1 / at.filter(at <= k).min()).alias(f"mrr@{k}"),
            (pl.col("found") / at).filter(at <= k).sum().alias(f"map@{k}"),
        )
    )
    names = [f"{metric}@{k}" for k in ks for metric in METRICS]
    table = queries.join(sums, on="row", how="left", maintain_order="left").with_columns(pl.col(names).fill_null(0.0))
    total = table["relevant"].to_numpy()
    return table.with_columns(
        column
        for k in ks
        for column in (
            pl.col(f"ndcg@{k}") / pl.Series(ideal[np.minimum(total, k) - 1]),
            pl.col(f"map@{k}") / pl.Series(total),
        )
    ).select("row", *names)


def relevant_items(examples: pl.DataFrame) -> pl.DataFrame:
    """The targets of `examples` as columns row (position in `examples`, UInt32), item_id."""
    return (
        examples.select(item_id="targets")
        .with_row_index("row")
        .explode("item_id", empty_as_null=False)
        .drop_nulls("item_id")
    )


def harmonic_mean(values: Sequence[float]) -> float:
    """Harmonic mean of non-negative values; 0 when any of them is 0 or there are none.

    >>> round(harmonic_mean([0.1, 0.3]), 4)
    0.15
    """
    if not values or min(values) <= 0:
        return 0.0
    return len(values) / sum(1 / value for value in values)

"""Reference rankers: what a model has to beat, in the same table, by the same protocol.

Each has `.fit(train, items)`, `.rank(examples, k, seen)` and `.rerank(examples, candidates)`; see `base.Reference`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import polars as pl

    from gemst.config import Config
    from gemst.evaluation.references.base import Reference

NAMES = ("popularity", "co-visits", "bm25", "lookup", "query-co-visits", "counts", "dense")


def all_references(items: pl.DataFrame, train: pl.DataFrame, valid: pl.DataFrame, config: Config) -> list[Reference]:
    """Every reference ranker, fitted on the train examples and the items, in the order of `NAMES`.

    `counts` alone has weights, which it fits on `valid`.
    """
    from gemst.evaluation.references.bm25 import BM25
    from gemst.evaluation.references.counts import Counts
    from gemst.evaluation.references.dense import Dense
    from gemst.evaluation.references.popularity import Popularity
    from gemst.evaluation.references.query_covisits import QueryCoVisits

    hybrid = QueryCoVisits().fit(train, items)
    others: list[Reference] = [
        reference.fit(train, items) for reference in (
            Popularity(), BM25(), Counts(valid, config.evaluation.exclude_seen), Dense(config.item_ids.encoder),
        )
    ]  # fmt: skip
    by_name = {reference.name: reference for reference in (hybrid, hybrid.visits, hybrid.lookup, *others)}
    return [by_name[name] for name in NAMES]

"""Reference rankers: what a model has to beat, in the same table, by the same protocol.

Each has `.fit(train, items)`, `.rank(examples, k, seen)` and `.rerank(examples, candidates)`; see `base.Reference`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import polars as pl

    from gemst.config import Config
    from gemst.evaluation.references.base import Reference

NAMES = ("popularity", "co-visits", "bm25", "lookup", "dense")


def all_references(items: pl.DataFrame, train: pl.DataFrame, config: Config) -> list[Reference]:
    """Every reference ranker, fitted on the train examples and the items, in the order of `NAMES`."""
    from gemst.evaluation.references.bm25 import BM25
    from gemst.evaluation.references.covisits import CoVisits
    from gemst.evaluation.references.dense import Dense
    from gemst.evaluation.references.lookup import Lookup
    from gemst.evaluation.references.popularity import Popularity

    references: list[Reference] = [Popularity(), CoVisits(), BM25(), Lookup(), Dense(config.item_ids.encoder)]
    return [reference.fit(train, items) for reference in references]

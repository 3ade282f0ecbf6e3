"""BM25 over item text (bm25s, Lucene's variant)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
from scipy import sparse

from gemst.evaluation.references.base import Floats, Reference
from gemst.evaluation.references.texts import documents

_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = rf"[{_HAN}]|[^\W{_HAN}]{{2,}}"  # a Chinese character counts as a word, as in data/bm25.py


class BM25(Reference):
    """Scores an item by BM25 of its text: against the query, or, where there is none, against the history's texts.

    bm25s builds the index, a sparse (terms, items) matrix of ready term scores; a block of queries is then one sparse
    product instead of a loop.
    """

    name = "bm25"

    def _fit(self, events: pl.DataFrame, items: pl.DataFrame) -> None:
        import bm25s

        texts = documents(items).to_list()
        tokens = _tokens(texts)
        self._terms: dict[str, int] = tokens.vocab
        if not any(tokens.ids):  # nothing but stop words: every score is 0 and popularity decides
            self._weights = sparse.csr_array((max(1, len(self._terms)), len(texts)), dtype=np.float32)
        else:
            index = bm25s.BM25()
            index.index(tokens, show_progress=False)
            self._terms = index.vocab_dict
            parts = (index.scores["data"], index.scores["indices"], index.scores["indptr"])
            self._weights = sparse.csc_array(parts, shape=(len(texts), len(parts[2]) - 1)).T.tocsr()
        self._documents = self._counts(texts)

    def scores(self, examples: pl.DataFrame) -> Floats:
        searches = examples["query"].is_not_null().to_numpy()
        distinct = examples["query"].cast(pl.String).drop_nulls().unique(maintain_order=True)
        at = examples["query"].cast(pl.String).drop_nulls().replace_strict(distinct, np.arange(len(distinct)))
        scores = np.zeros((len(examples), len(self.item_ids)), np.float32)
        if len(distinct):
            scores[searches] = (self._counts(distinct.to_list()) @ self._weights).toarray()[at.to_numpy()]
        if not searches.all():
            history = self.histories(examples.filter(~searches))
            scores[~searches] = (history @ self._documents @ self._weights).toarray()
        return scores

    def _counts(self, texts: list[str]) -> sparse.csr_array:
        """Term counts (texts, terms); unknown terms are left out."""
        tokens = _tokens(texts)
        words = list(tokens.vocab)
        known = np.full(max(tokens.vocab.values(), default=0) + 1, -1)
        known[list(tokens.vocab.values())] = [self._terms.get(word, -1) for word in words]
        columns = known[_flat(tokens.ids)]
        rows = np.repeat(np.arange(len(texts)), [len(ids) for ids in tokens.ids])
        kept = columns >= 0
        shape = (len(texts), self._weights.shape[0])
        return sparse.coo_array((np.ones(kept.sum(), np.float32), (rows[kept], columns[kept])), shape=shape).tocsr()


def _tokens(texts: list[str]) -> Any:
    import bm25s

    return bm25s.tokenize(texts, token_pattern=_WORD, stopwords="english", show_progress=False)


def _flat(ids: Sequence[Sequence[int]]) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.fromiter((token for tokens in ids for token in tokens), np.int64)

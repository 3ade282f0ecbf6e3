"""Ranking: constrained decoding over the trie of item IDs, and scores for given candidates (docs/item-ids.md).

The score of an item is the log probability of its ID: the sum over levels of the log softmax over that level's tokens.
The trie decides what may be returned; it never renormalises a score. A model with a memory mixes the log's counts in
(docs/memory.md).
"""

from gemst.ranking.ranker import rank
from gemst.ranking.scorer import score

__all__ = ["rank", "score"]

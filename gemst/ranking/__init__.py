"""Ranking: constrained decoding over the trie of item IDs, and scores for given candidates (docs/item-ids.md).

The score of an item is the log probability of its ID: the sum over levels of the log softmax over that level's tokens.
The trie decides what may be returned; it never renormalises a score.
"""

from gemst.ranking.ranker import rank
from gemst.ranking.scorer import score

__all__ = ["rank", "score"]

"""History and query to token ids: the one place where user text meets item tokens.

A prompt is prefix(task) + ID tokens of the history, oldest first + suffix(task, query); the model continues it with the
ID tokens of the next item. Query text is data: it is encoded with special tokens off, so a query that spells an item
token stays text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from gemst.backbone import context_length, encode_text
from gemst.config import Config, Prompts
from gemst.errors import GemstError
from gemst.item_ids.ids import rows_by

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from gemst.item_ids import ItemIds

RECOMMENDATION, SEARCH = "recommendation", "search"
TASKS = (RECOMMENDATION, SEARCH)
LONGEST_QUERY = 256  # tokens; what a longer query, or a pasted page, says beyond them is not read
_SHORTEST_QUERY = 8  # tokens a context must leave for it

# style -> (prefix, recommendation suffix, search suffix). `paper` is the released code's text.
_STYLES = {
    # One token an event, and the query's own: a recommendation follows the history itself.
    "compact": ("History:", "", " {q}"),
    "paper": (
        "Below is the user's interaction history: ",
        ". Please recommend the next item the user is likely to click.",
        ". The user's search query is: {q}. Please predict the next item the user might click.",
    ),
}


class Prompter:
    """Builds prompts for one model.

    `token_ids` (items, levels) int64 holds each item's vocabulary ids, padded with -1; `index` maps item_id to its row.
    `context` is the most tokens the backbone takes, if it has a limit: queries are cut to what histories leave of it.
    Raises GemstError when they leave nothing.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        token_ids: NDArray[np.int64],
        index: dict[str, int],
        style: Prompts,
        max_history: int,
        context: int | None = None,
    ) -> None:
        self.tokenizer, self.token_ids, self.index, self.max_history = tokenizer, token_ids, index, max_history
        prefix, self._recommend, self._search = _STYLES[style.style]
        self.prefix: list[int] = encode_text(tokenizer, [prefix])[0]
        before, self._after = self._search.split("{q}")
        around = sum(map(len, encode_text(tokenizer, [before, self._after])))
        self.longest_query = LONGEST_QUERY
        if context is not None:
            taken = len(self.prefix) + around + (max_history + 1) * token_ids.shape[1]
            self.longest_query = min(LONGEST_QUERY, context - taken)
            if self.longest_query < _SHORTEST_QUERY:
                raise GemstError(
                    f"data.max_history = {max_history} items make {taken} tokens, and the backbone takes {context}",
                    "Lower data.max_history",
                )
        self.longest_suffix = self.longest_query + around

    def suffixes(self, queries: list[str | None]) -> list[list[int]]:
        """Token ids after the history, one list per query; None stands for a recommendation.

        A query of more than `longest_query` tokens is cut, the template's words after it are not.
        """
        distinct = list(dict.fromkeys(queries))
        texts = [self._recommend if query is None else self._search.replace("{q}", query) for query in distinct]
        encoded = dict(zip(distinct, encode_text(self.tokenizer, texts), strict=True))
        end = encode_text(self.tokenizer, [self._after])[0]
        for query, tokens in encoded.items():
            if len(tokens) > self.longest_suffix:
                encoded[query] = tokens[: self.longest_suffix - len(end)] + end
        return [encoded[query] for query in queries]

    def encode(self, examples: pl.DataFrame) -> list[list[int]]:
        """Prompts of `examples` (columns history, query), one token-id list per row.

        Only the last `max_history` known items of a history are kept; items without an ID are left out.
        """
        rows = self.history_rows(examples["history"])
        suffixes = self.suffixes(examples["query"].to_list())
        return [
            self.prefix + self.item_tokens(history) + suffix for history, suffix in zip(rows, suffixes, strict=True)
        ]

    def history_rows(self, history: pl.Series) -> list[NDArray[np.int64]]:
        """Item rows of a list[str] column, unknown items dropped, cut to the last `max_history`."""
        flat = pl.DataFrame({"row": np.arange(len(history)), "item_id": history})
        flat = flat.explode("item_id", empty_as_null=True)
        rows = rows_by(self.index, flat["item_id"])
        known = rows >= 0
        lengths = np.bincount(flat["row"].to_numpy()[known], minlength=len(history))
        parts = np.split(rows[known], np.cumsum(lengths)[:-1]) if len(history) else []
        return [part[-self.max_history :] for part in parts]

    def item_tokens(self, rows: NDArray[np.int64]) -> list[int]:
        """ID tokens of item rows, concatenated, padding removed."""
        tokens = self.token_ids[rows].ravel()
        ids: list[int] = tokens[tokens >= 0].tolist()
        return ids


def make_prompter(
    config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: ItemIds, first: int
) -> Prompter:
    """The prompter of `config` for a model whose item tokens begin at the vocabulary id `first`."""
    token_ids, context = ids.token_ids(first), context_length(model)
    return Prompter(tokenizer, token_ids, ids.index, config.prompts, config.data.max_history, context)

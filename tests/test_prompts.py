"""What of a history and of a query reaches the model."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from gemst.backbone import encode_text
from gemst.config import Prompts
from gemst.errors import GemstError
from gemst.prompts import LONGEST_QUERY, Prompter
from tests.ranking.tiny import tokenizer

FIRST = 20
INDEX = {f"i{row}": row for row in range(9)}


def prompter(max_history: int = 3, style: str = "compact", context: int | None = None) -> Prompter:
    token_ids = np.arange(FIRST, FIRST + 9)[:, None].astype(np.int64)
    return Prompter(tokenizer(), token_ids, INDEX, Prompts.model_validate({"style": style}), max_history, context)


def test_the_newest_known_items_of_a_history_are_kept_oldest_first() -> None:
    made = prompter()
    histories = [["i0", "i1", "i2", "i3", "gone", "i4"], ["i7"], ["gone"], [], None]
    asked = pl.DataFrame({"history": histories, "query": [None] * 5}, schema_overrides={"query": pl.String})
    items = [[token - FIRST for token in tokens if token >= FIRST] for tokens in made.encode(asked)]
    assert items == [[2, 3, 4], [7], [], [], []]


@pytest.mark.parametrize("style", ["compact", "paper"])
def test_a_pasted_page_is_cut_and_the_words_after_it_are_not(style: str) -> None:
    made = prompter(style=style)
    short, page, none = made.suffixes(["film film film", "film " * 5000, None])
    after = " . Please predict the next item the user might click ." if style == "paper" else ""
    end = encode_text(made.tokenizer, [after])[0]
    assert len(page) == made.longest_suffix == LONGEST_QUERY + len(short) - 3
    assert (
        page
        == short[: len(short) - len(end)] + short[-len(end) - 1 : len(short) - len(end)] * (LONGEST_QUERY - 3) + end
    )
    assert none == made.suffixes([None])[0]


def test_a_query_takes_what_histories_leave_of_the_context() -> None:
    made = prompter(max_history=40, context=100)
    asked = pl.DataFrame({"history": [["i0", "i1"] * 30], "query": ["film " * 500]})
    (prompt,) = made.encode(asked)
    assert len(prompt) + 1 == 100  # the next item's token is the last one
    with pytest.raises(GemstError, match=r"data\.max_history = 95 items make 98 tokens, and the backbone takes 100"):
        prompter(max_history=95, context=100)

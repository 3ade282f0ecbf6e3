"""Input and output rows of items that nobody has clicked yet, in closed form, for a model that is not trained again.

The input row is placed by the item's text. The output row is a ridge regression on the model's own states: in the
states of today's log and of other items' titles the item's logit is that of an item hardly ever clicked, in the states
that ask for its own title it is the highest one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl
import torch
from torch import Tensor

from gemst.prompts import SEARCH, TASKS
from gemst.tuning.rows import item_texts

if TYPE_CHECKING:
    from gemst.backbone import Tuned

_SAMPLE = 256  # contexts of each kind
_HISTORY = 10  # newest items of a history
_PASTS = 4  # histories before which a new item's title is asked for, beside none
_UNPOPULAR = 0.1  # share of trained items below a new one where nobody asks for it
_RIDGE = 0.01  # share of the states' mean energy per dimension
_BATCH = 32


def make(tuned: Tuned, items: pl.DataFrame, events: pl.DataFrame, new: list[str], own: bool) -> tuple[Tensor, Tensor]:
    """Input and output rows, each (len(new), d), of the items `new` of the catalogue `items`.

    `events` is a log: whose histories and which queries the model meets. With `own`, histories are of a task's own
    events, as `data.history: own` makes them.
    """
    from gemst import backbone

    ids = tuned.ids
    known = pl.DataFrame({"item_id": ids.item_id}).with_row_index("row")  # one that comes back has its trained rows
    listed = known.join(items, on="item_id", how="inner", maintain_order="left")
    fresh = pl.DataFrame({"item_id": new}).join(items, on="item_id", how="left", maintain_order="left")
    tokens = torch.from_numpy(listed["row"].to_numpy().astype("int64")) + tuned.first
    inputs, head = backbone.vocabulary(tuned.model).detach(), backbone.output_head(tuned.model).weight.detach()
    words = [backbone.text_rows(tuned.model, tuned.tokenizer, item_texts(table)) for table in (listed, fresh)]

    trained = head[tokens].double()
    browsed, searched = (histories(events.filter(task=task) if own else events, listed["item_id"]) for task in TASKS)
    around = _contexts(tuned, events, listed["title"], browsed, searched)
    asked = torch.stack(
        [_answers(tuned, fresh["title"], None if turn is None else _drawn(searched, len(fresh), turn))
         for turn in (None, *range(_PASTS))], dim=1,
    )  # fmt: skip
    low = torch.cat([(some @ trained.T).quantile(_UNPOPULAR, dim=1) for some in around.split(_BATCH)])
    outputs = answer(trained, around, low, asked)
    return place(inputs[tokens], *words), outputs.to(head.dtype)


def histories(events: pl.DataFrame, item_ids: pl.Series) -> pl.Series:
    """The newest `_HISTORY` events of every user, items of `item_ids` alone; one empty history where there is none."""
    past = (
        events.filter(pl.col("item_id").is_in(item_ids.implode()))
        .sort("user_id", "timestamp", maintain_order=True)
        .group_by("user_id", maintain_order=True)
        .agg(pl.col("item_id").tail(_HISTORY))["item_id"]
    )
    return past if len(past) else pl.Series([[]], dtype=pl.List(pl.String))


def _contexts(tuned: Tuned, events: pl.DataFrame, titles: pl.Series, browsed: pl.Series, searched: pl.Series) -> Tensor:
    """States (n, d) of what the model is asked: histories; queries and titles, after a history and after none.

    `browsed` and `searched` are histories as recommendation and search have them.
    """
    queries = events.filter(task=SEARCH)["query"].drop_nulls()
    nothing = pl.Series([None] * _SAMPLE, dtype=pl.String)
    states = [_answers(tuned, nothing, _drawn(browsed, _SAMPLE, 0))]
    for number, text in enumerate((queries, titles)):
        if len(text):
            drawn = text.sample(_SAMPLE, with_replacement=True, seed=number)
            states += [_answers(tuned, drawn), _answers(tuned, drawn, _drawn(searched, _SAMPLE, number))]
    return torch.cat(states)


def _drawn(pasts: pl.Series, count: int, seed: int) -> pl.Series:
    return pasts.sample(count, with_replacement=True, seed=seed)


@torch.inference_mode()
def _answers(tuned: Tuned, queries: pl.Series, histories: pl.Series | None = None) -> Tensor:
    """States (len(queries), d) float64 that predict the ID for a query, or for none (null), after a history if any."""
    from gemst.ranking.context import encode
    from gemst.ranking.ranker import batches

    past = pl.lit([], dtype=pl.List(pl.String)) if histories is None else histories.alias("history")
    prompts = tuned.prompter.encode(pl.DataFrame({"query": queries}).select("query", past.alias("history")))
    states = torch.zeros(len(prompts), tuned.model.config.hidden_size, dtype=torch.float64)
    for batch in batches(prompts, _BATCH):
        found = encode(tuned.model, [prompts[row] for row in batch], branches=False).states
        states[torch.from_numpy(batch)] = found.double().cpu()
    return states


def place(trained: Tensor, known: Tensor, new: Tensor) -> Tensor:
    """Rows (m, d): the mean of the `trained` rows, moved the way `new` (m, d) differ from the mean of `known`.

    All of them lie as far from the mean as trained rows do on average, so that they neither drown nor drown others.
    """
    mean = trained.mean(0)
    away = new.clone() - known.mean(0)
    length = (trained - mean).norm(dim=1).mean()
    return mean + away * (length / away.norm(dim=1, keepdim=True).clamp(min=1e-12))


def answer(trained: Tensor, around: Tensor, low: Tensor, asked: Tensor) -> Tensor:
    """Output rows (m, d): ridge regression around the mean `trained` row (items, d).

    All of them have the logits `low` (n,) in the states `around` (n, d), as nearly as can be; row i moves from there,
    along the directions that cost least in those states, until in its own states `asked[i]` (k, d) it has the highest
    logit of the trained rows.
    """
    mean = trained.mean(0)
    gram = around.T @ around
    gram.diagonal().add_(_RIDGE * gram.trace() / len(gram))
    factor = torch.linalg.cholesky(gram)
    quiet = mean + torch.cholesky_solve((around.T @ (low - around @ mean))[:, None], factor)[:, 0]
    best = torch.cat([(some @ trained.T).amax(-1) for some in asked.split(_BATCH)])  # never (m, k, items) at once
    lacking = best - asked @ quiet
    moves = torch.cholesky_solve(asked.flatten(0, 1).T, factor).T.view_as(asked)  # (m, k, d)
    inner = asked @ moves.mT
    inner.diagonal(dim1=-2, dim2=-1).add_(_RIDGE * inner.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True))
    return quiet + (moves.mT @ torch.linalg.solve(inner, lacking[..., None]))[..., 0]

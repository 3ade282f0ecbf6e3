"""What validation ranks with, and the one score it makes of two tasks."""

from __future__ import annotations

import polars as pl
import pytest
import torch

from gemst import ranking
from gemst.backbone import output_head
from gemst.config import Config
from gemst.tuning.model import ItemModel
from gemst.tuning.parallel import Processes
from gemst.tuning.validation import Validation
from tests.tuning.conftest import ITEMS, llama


def bare(precision: str, items: ItemModel | None = None) -> Validation:
    """One without users."""
    made = Validation.__new__(Validation)
    made.config = Config.model_validate({"tuning": {"precision": precision}})
    made.items, made.processes = items, Processes(made.config.tuning)
    made.tuned = made.examples = made.seen = None
    return made


def test_rows_are_ranked_as_they_will_be_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also under bf16: what turns them out of their base is no part of the model."""
    spread = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    items = ItemModel(llama(20 + ITEMS), 20, (ITEMS,), False, spread @ spread.t() + torch.eye(32))

    class Ranked(Exception):
        pass

    def rank(*_: object) -> None:
        assert torch.is_autocast_enabled("cpu")
        raise Ranked

    monkeypatch.setattr(ranking, "rank", rank)
    with pytest.raises(Ranked):
        bare("bf16-autocast", items)._scores()
    assert torch.equal(output_head(items.model).weight[20:], items.rows_out())


def test_a_task_that_fails_is_worth_nothing_in_the_joint_score(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the evaluation's."""
    validation = bare("fp32")
    for search, joint in ((0.0, 0.0), (0.1, 0.15)):
        scores = pl.DataFrame({"task": ["recommendation", "search"], "ndcg@10": [0.3, search]})
        monkeypatch.setattr(validation, "_scores", lambda scores=scores: scores)
        told = validation()
        assert told["valid/joint"] == pytest.approx(joint, abs=0)
        assert (told["valid/ndcg10_recommendation"], told["valid/ndcg10_search"]) == (0.3, search)

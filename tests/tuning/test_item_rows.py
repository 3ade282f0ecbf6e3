"""Item-token rows before tuning: text, company and the fit, for both families; made for one set of IDs."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from gemst import backbone, item_ids
from gemst.config import Config
from gemst.errors import GemstError
from gemst.item_ids import ItemIds
from gemst.tuning import item_rows
from gemst.tuning.null_space import fingerprint
from gemst.tuning.rows import by_token, start_rows
from tests.ranking.tiny import FAMILIES, tokenizer
from tests.tuning.test_append import catalogue

ITEMS, MET = 16, 12  # the last items were never met


def configured(folder: Path, strategy: str = "atomic", **rows: object) -> Config:
    return Config.model_validate(
        {
            "backbone": {"name": str(folder / "backbone")},
            "item_ids": {"strategy": strategy, "levels": 2, "codebook_size": 6, "embedding": "column"},
            "item_rows": {"tokens": 4000, **rows},
            "tuning": {"batch_tokens": 400, "chain_items": 12, "precision": "fp32"},
        }
    )


def logs() -> pl.DataFrame:
    """Users who go around a ring of items: the next one follows from the last."""
    rng, rows = np.random.default_rng(0), []
    for user in range(30):
        at = int(rng.integers(MET))
        past = [(at + step) % MET for step in range(15)]
        for step in range(1, 15):
            rows.append(
                {
                    "user_id": f"u{user:02}", "task": ["recommendation", "search"][step % 2],
                    "query": ["", "old film"][step % 2] or None, "history": [f"i{one}" for one in past[:step]],
                    "targets": [f"i{past[step]}"], "timestamp": datetime(2024, 1, 1) + timedelta(minutes=step),
                }
            )  # fmt: skip
    return pl.DataFrame(rows).cast({"timestamp": pl.Datetime("ms")}).with_columns(clicked="timestamp")


def prepared(folder: Path, strategy: str, family: str) -> tuple[ItemIds, pl.DataFrame]:
    """A backbone and item IDs in `folder`; returns the IDs and the catalogue."""
    items, words = catalogue(ITEMS), tokenizer()
    torch.manual_seed(0)
    backbone.save(FAMILIES[family](len(words)).eval(), words, folder / "backbone")
    item_ids.build(items, logs(), configured(folder, strategy), folder / "item_ids")
    return item_ids.load(folder / "item_ids"), items


def of(folder: Path) -> str:
    """The backbone in `folder`, as rows name it."""
    return fingerprint(backbone.load(configured(folder).backbone)[0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("strategy", ["atomic", "rq-kmeans"])
def test_the_fit_gains_on_held_out_targets_and_never_loses(tmp_path, strategy, family) -> None:
    ids, items = prepared(tmp_path, strategy, family)
    manifest = item_rows.build(configured(tmp_path, strategy), ids, items, logs(), tmp_path / "rows")
    assert len(manifest["levels"]) == len(ids.level_sizes)
    gains = [gain["loss_before"] - gain["loss_after"] for gain in manifest["levels"]]
    assert min(gains) >= 0
    assert strategy != "atomic" or gains[0] > 0.05
    inputs, outputs, _ = item_rows.load(tmp_path / "rows", ids, of(tmp_path))
    assert len(inputs) == len(outputs) == len(ids.tokens)
    assert torch.isfinite(inputs).all()
    assert torch.isfinite(outputs).all()


def test_no_company_no_fit_no_popularity_is_the_text_alone(tmp_path) -> None:
    ids, items = prepared(tmp_path, "atomic", "llama")
    config = configured(tmp_path, behaviour=0.0, norm=1.5, tokens=0, popularity=False, scale=0.5)
    item_rows.build(config, ids, items, logs(), tmp_path / "rows")
    model, words = backbone.load(config.backbone)
    text = start_rows(model, words, ids, items)
    inputs, outputs, white = item_rows.load(tmp_path / "rows", ids, of(tmp_path))
    assert white is None
    torch.testing.assert_close(inputs, 1.5 * text)
    torch.testing.assert_close(outputs, 0.5 * text)


def test_items_in_the_same_company_start_closer_and_unmet_ones_stay_at_their_text(tmp_path) -> None:
    ids, items = prepared(tmp_path, "atomic", "llama")
    model, words = backbone.load(configured(tmp_path).backbone)
    angle = torch.arange(MET) % 3 * 2 * torch.pi / 3  # three crowds
    company = torch.zeros(ITEMS, 2)
    company[:MET] = torch.stack([angle.cos(), angle.sin()], 1)
    text, rows = (start_rows(model, words, ids, items, company, weight) for weight in (0.0, 0.5))
    near = torch.nn.functional.cosine_similarity
    met = torch.arange(MET)
    within, across = (met + 3) % MET, (met + 1) % MET
    moved = [float((near(rows[met], rows[other]) - near(text[met], text[other])).mean()) for other in (within, across)]
    assert moved[0] > moved[1] + 0.2
    torch.testing.assert_close(near(rows[MET:], text[MET:]), torch.ones(ITEMS - MET))
    norms = rows.norm(dim=1)
    torch.testing.assert_close(norms, text.norm(dim=1).mean().expand_as(norms))


def test_a_token_stands_at_the_mean_of_its_items(tmp_path) -> None:
    ids, _ = prepared(tmp_path, "rq-kmeans", "llama")
    vectors = torch.arange(float(ITEMS))[:, None]
    found = by_token(ids, vectors)
    for code in np.unique(ids.codes[:, 0]):
        assert float(found[code]) == pytest.approx(float(np.flatnonzero(ids.codes[:, 0] == code).mean()))


def test_rows_of_other_item_ids_are_refused(tmp_path) -> None:
    ids, items = prepared(tmp_path, "atomic", "llama")
    item_rows.build(configured(tmp_path, tokens=0), ids, items, logs(), tmp_path / "rows")
    config = configured(tmp_path, "rq-kmeans")
    item_ids.build(items, logs(), config, tmp_path / "other")
    with pytest.raises(GemstError, match=r"made for other item IDs.*gemst item-rows"):
        item_rows.load(tmp_path / "rows", item_ids.load(tmp_path / "other"), of(tmp_path))


def test_rows_of_another_backbone_are_refused(tmp_path) -> None:
    ids, items = prepared(tmp_path, "atomic", "llama")
    item_rows.build(configured(tmp_path), ids, items, logs(), tmp_path / "rows")
    shallow = configured(tmp_path).backbone.model_copy(update={"num_layers": 1})
    with pytest.raises(GemstError, match=r"rows was made for another backbone.*Run `gemst item-rows`"):
        item_rows.load(tmp_path / "rows", ids, fingerprint(backbone.load(shallow)[0]))


def test_what_items_are_clicked_for_tells_them_apart_in_the_fit(tmp_path) -> None:
    ids, items = prepared(tmp_path, "atomic", "llama")
    asked = logs().with_columns(query=pl.when(pl.col("task") == "search").then(pl.col("targets").list.first()))
    vectors = item_rows.asked_of(ids, items, asked, 5)
    assert vectors.shape == (ITEMS, 5)
    text, company = torch.randn(ITEMS, 8), torch.randn(ITEMS, 4)
    without = item_rows.features_of(ids, text, company, vectors[:, :0])
    features = item_rows.features_of(ids, text, company, vectors)
    assert torch.equal(features[:, : without.shape[1]], without)
    assert float(features[:, without.shape[1] :].std()) == pytest.approx(0.5, rel=1e-3)
    losses = []
    for queries in (0, 5):
        config = configured(tmp_path, queries=queries)
        manifest = item_rows.build(config, ids, items, asked, tmp_path / f"rows-{queries}")
        losses.append(manifest["levels"][0]["loss_after"])
    assert losses[0] != losses[1]

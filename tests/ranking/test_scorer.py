"""score(): brute-force scores for given candidates, the unknown last."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch

from gemst.config import Ranking
from gemst.errors import GemstError
from gemst.ranking import rank, score
from tests.ranking.tiny import brute_force, examples, make_ids, make_tuned, random_ids


@pytest.mark.parametrize("sizes", [(23,), (4, 6), (3, 3, 3), (2, 2, 3, 3)])
def test_scores_are_those_of_brute_force_to_1e_5(family: str, sizes: tuple[int, ...]) -> None:
    ids = random_ids(20, sizes)
    tuned, asked = make_tuned(family, ids), examples(ids, 5)
    rng = np.random.default_rng(1)
    chosen = [rng.permutation(20)[:size] for size in (7, 20, 1, 0, 12)]
    candidates = pl.Series([[f"i{item}" for item in items] for items in chosen], dtype=pl.List(pl.String))
    scored = score(tuned, asked, candidates, Ranking(batch_size=2))
    truth = brute_force(tuned, asked)
    items = scored["item_id"].str.slice(1).cast(pl.Int64).to_numpy()
    np.testing.assert_allclose(scored["score"].to_numpy(), truth[scored["row"].to_numpy(), items], atol=1e-5, rtol=1e-5)
    for row, mine in enumerate(chosen):
        best = [f"i{item}" for item in mine[np.argsort(-truth[row, mine])]]
        assert scored.filter(pl.col("row") == row)["item_id"].to_list() == best


@pytest.mark.parametrize("other", ["granite", "gemma2", "gemma3", "phi", "mistral", "llama4"])
def test_families_with_scaled_capped_or_windowed_layers_get_their_own_scores(other: str) -> None:
    ids = random_ids(20, (3, 3, 3))
    tuned, asked = make_tuned(other, ids), examples(ids, 4)
    scored = score(tuned, asked, pl.Series([ids.item_id] * 4))
    items = scored["item_id"].str.slice(1).cast(pl.Int64).to_numpy()
    truth = brute_force(tuned, asked)[scored["row"].to_numpy(), items]
    np.testing.assert_allclose(scored["score"].to_numpy(), truth, atol=1e-5, rtol=1e-5)


def test_backbones_that_cannot_branch_are_refused_by_name() -> None:
    ids = random_ids(20, (3, 3, 3))
    candidates = pl.Series([ids.item_id])
    with pytest.raises(GemstError, match=r"cannot be decoded with BloomForCausalLM.*or atomic IDs"):
        score(make_tuned("bloom", ids), examples(ids, 1), candidates)
    long = pl.DataFrame({"history": [ids.item_id[:15]], "query": [None]}, schema_overrides={"query": pl.String})
    with pytest.raises(GemstError, match=r"do not fit the backbone's sliding window of 24.*data.max_history"):
        score(make_tuned("mistral", ids), long, candidates)


def test_wrong_calls_and_broken_weights_are_errors_and_a_candidate_counts_once() -> None:
    ids = random_ids(20, (20,))
    tuned, asked = make_tuned("llama", ids), examples(ids, 2)
    with pytest.raises(GemstError, match="1 lists of candidates for 2 examples"):
        score(tuned, asked, pl.Series([["i1"]]))
    assert score(tuned, asked, pl.Series([["i1", "i2", "i1"], ["i1"]])).group_by("row").len().sort("row")[
        "len"
    ].to_list() == [2, 1]
    with torch.no_grad():
        tuned.model.get_output_embeddings().weight[tuned.first + 3] = torch.nan
    with pytest.raises(GemstError, match="scores are not numbers"):
        score(tuned, asked, pl.Series([["i1"], ["i2"]]))
    with pytest.raises(GemstError, match="scores are not numbers"):
        rank(tuned, asked, 5, Ranking())


def test_it_agrees_with_rank() -> None:
    ids = random_ids(20, (3, 3, 3))
    tuned, asked = make_tuned("t5", ids), examples(ids, 4)
    whole = rank(tuned, asked, 20, Ranking(beams=40))
    scored = score(tuned, asked, pl.Series([ids.item_id] * 4))
    assert whole.drop("score").equals(scored.drop("score"))
    np.testing.assert_allclose(whole["score"].to_numpy(), scored["score"].to_numpy(), atol=1e-5)


def test_unknown_and_retired_candidates_come_last() -> None:
    active = np.array([True, False, True, True])
    ids = make_ids(random_ids(4, (2, 2)).codes, (2, 2), active)
    tuned = make_tuned("llama", ids)
    scored = score(tuned, examples(ids, 1), pl.Series([["new", "i1", "i3", "i0"]]))
    assert set(scored["item_id"][:2]) == {"i3", "i0"}
    assert scored["item_id"][2:].to_list() == ["new", "i1"]
    assert scored["rank"].to_list() == [1, 2, 3, 4]
    assert scored["score"][2:].to_list() == [-np.inf, -np.inf]

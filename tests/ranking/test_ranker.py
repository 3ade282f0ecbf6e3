"""rank(): only catalogue items, none twice, true scores, nothing that was to be left out."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from gemst.config import Ranking
from gemst.errors import GemstError
from gemst.ranking import rank
from tests.ranking.tiny import brute_force, examples, make_ids, make_tuned, random_ids


def expected(scores: np.ndarray, k: int) -> list[list[str]]:
    return [[f"i{item}" for item in np.argsort(-row, kind="stable")[:k] if np.isfinite(row[item])] for row in scores]


def lists(ranked: pl.DataFrame, n: int) -> list[list[str]]:
    by_row = dict(ranked.group_by("row", maintain_order=True).agg("item_id").iter_rows())
    return [by_row.get(row, []) for row in range(n)]


def assert_scores(ranked: pl.DataFrame, scores: np.ndarray) -> None:
    items = ranked["item_id"].str.slice(1).cast(pl.Int64).to_numpy()
    np.testing.assert_allclose(
        ranked["score"].to_numpy(), scores[ranked["row"].to_numpy(), items], atol=2e-5, rtol=1e-5
    )


@pytest.mark.parametrize("sizes", [(23,), (3, 9), (9, 3), (3, 4, 4), (2, 3, 2, 3)])
def test_with_enough_beams_the_ranking_is_that_of_brute_force(family: str, sizes: tuple[int, ...]) -> None:
    ids = random_ids(21, sizes)
    tuned, asked = make_tuned(family, ids), examples(ids, 7)
    ranked = rank(tuned, asked, 10, Ranking(beams=64, batch_size=3))
    scores = brute_force(tuned, asked)
    assert_scores(ranked, scores)
    assert lists(ranked, 7) == expected(scores, 10)
    assert ranked.schema == {"row": pl.UInt32, "item_id": pl.String, "rank": pl.UInt16, "score": pl.Float32}
    assert ranked.sort("row", "rank").equals(ranked)


@given(data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_trie_any_beams_every_item_is_real_once_and_truly_scored(data: st.DataObject) -> None:
    family = data.draw(st.sampled_from(["llama", "t5"]))
    sizes = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    n = data.draw(st.integers(1, min(int(np.prod(sizes)), 16)))
    ids = random_ids(n, sizes, data.draw(st.integers(0, 99)))
    if len(sizes) == 1:
        ids = make_ids(np.arange(n)[:, None], (n,))
    tuned, asked = make_tuned(family, ids, data.draw(st.integers(0, 99))), examples(ids, 3)
    k, beams = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 8))
    ranked = rank(tuned, asked, k, Ranking(beams=beams, batch_size=2))
    assert_scores(ranked, brute_force(tuned, asked))
    for found in lists(ranked, 3):
        assert len(found) == len(set(found)) == min(k, n)
        assert set(found) <= set(ids.item_id)


@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_seen_items_are_left_out_and_never_cost_a_place(data: st.DataObject) -> None:
    ids = random_ids(14, (3, 3, 3), 1)
    tuned, asked = make_tuned(data.draw(st.sampled_from(["llama", "t5"])), ids), examples(ids, 2)
    left_out = data.draw(st.lists(st.lists(st.integers(0, 13), max_size=14), min_size=2, max_size=2))
    seen = pl.DataFrame(
        [(row, f"i{item}") for row, items in enumerate(left_out) for item in items] + [(0, "nobody knows it")],
        schema={"row": pl.UInt32, "item_id": pl.String}, orient="row",
    )  # fmt: skip
    ranked = rank(tuned, asked, 5, Ranking(beams=1), seen)
    for found, gone in zip(lists(ranked, 2), left_out, strict=True):
        assert not set(found) & {f"i{item}" for item in gone}
        assert len(found) == min(5, 14 - len(set(gone)))
    wide = rank(tuned, asked, 5, Ranking(beams=14), seen)
    scores = brute_force(tuned, asked)
    for row, gone in enumerate(left_out):
        scores[row, gone] = -np.inf
    assert lists(wide, 2) == expected(scores, 5)


@pytest.mark.parametrize("sizes", [(8,), (3, 4)])
def test_atomic_and_semantic_seen_and_retired_items_never_come_out(sizes: tuple[int, ...]) -> None:
    active = np.ones(8, bool)
    active[[2, 5]] = False
    ids = make_ids(random_ids(8, sizes).codes, sizes, active)
    tuned, asked = make_tuned("llama", ids), examples(ids, 2)
    seen = pl.DataFrame({"row": [1, 1], "item_id": ["i0", "i0"]}, schema_overrides={"row": pl.UInt32})
    first, second = lists(rank(tuned, asked, 8, Ranking(), seen), 2)
    assert set(first) == {f"i{row}" for row in range(8)} - {"i2", "i5"}
    assert set(second) == {f"i{row}" for row in range(8)} - {"i0", "i2", "i5"}


def test_no_examples_give_an_empty_ranking() -> None:
    ids = random_ids(5, (3, 3))
    ranked = rank(make_tuned("llama", ids), examples(ids, 1).clear(), 3, Ranking())
    assert ranked.is_empty()
    assert ranked.columns == ["row", "item_id", "rank", "score"]


@pytest.mark.parametrize(("family", "sizes"), [("llama", (5,)), ("llama", (3, 3)), ("t5", (3, 3))])
def test_a_catalogue_of_which_nothing_is_left_gives_an_empty_ranking(family: str, sizes: tuple[int, ...]) -> None:
    ids = random_ids(5, sizes)
    tuned = make_tuned(family, ids)
    gone = tuned.only(pl.Series(["another"]))
    assert rank(gone, examples(ids, 2), 3, Ranking()).is_empty()
    one = tuned.only(pl.Series([ids.item_id[2], "another"]))
    assert rank(one, examples(ids, 2), 3, Ranking())["item_id"].to_list() == [ids.item_id[2]] * 2


def test_bfloat16_models_rank_too(family: str) -> None:
    ids = random_ids(12, (3, 3, 3))
    tuned, asked = make_tuned(family, ids), examples(ids, 3)
    whole = brute_force(tuned, asked)
    tuned.model.to(torch.bfloat16)
    ranked = rank(tuned, asked, 12, Ranking())
    assert [len(found) for found in lists(ranked, 3)] == [12, 12, 12]
    items = ranked["item_id"].str.slice(1).cast(pl.Int64).to_numpy()
    np.testing.assert_allclose(ranked["score"].to_numpy(), whole[ranked["row"].to_numpy(), items], atol=0.1)
    assert whole.std() > 0.3  # else any order would pass


def test_requests_in_many_threads_are_ranked_as_in_one(family: str) -> None:
    ids = random_ids(12, (3, 3, 3))
    tuned, asked = make_tuned(family, ids), examples(ids, 4)
    alone = [rank(tuned, asked[row], 5, Ranking()) for row in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            for one, other in zip(
                pool.map(lambda row: rank(tuned, asked[row], 5, Ranking()), range(4)), alone, strict=True
            ):
                assert_frame_equal(one, other)


def test_what_the_first_request_made_of_the_trie_serves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = random_ids(12, (3, 4))
    tuned, asked = make_tuned("llama", ids), examples(ids, 2)
    first = rank(tuned, asked, 5, Ranking())
    monkeypatch.setattr("gemst.ranking.beams.TrieWalk", None)
    assert_frame_equal(rank(tuned, asked, 5, Ranking()), first)


@pytest.mark.parametrize("kind", ["bloom", "lfm2", "gpt_neo", "mamba", "openai_gpt"])
def test_a_family_without_branches_is_refused_by_name(kind: str) -> None:
    ids = random_ids(12, (3, 4))
    tuned = make_tuned(kind, ids)
    with pytest.raises(GemstError, match=r"semantic item IDs cannot be decoded with .*(ForCausalLM|HeadModel)"):
        rank(tuned, examples(ids, 2), 5, Ranking())
    atomic = random_ids(12, (12,))
    tuned, asked = make_tuned(kind, atomic), examples(atomic, 3)
    assert_scores(rank(tuned, asked, 5, Ranking()), brute_force(tuned, asked))

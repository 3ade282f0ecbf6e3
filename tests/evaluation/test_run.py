"""The evaluation as a whole, on a small catalogue with a stand-in encoder."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from gemst.config import Config
from gemst.evaluation import protocols
from gemst.evaluation import run as run_module
from gemst.evaluation.references.base import Reference
from gemst.evaluation.references.bm25 import BM25
from gemst.evaluation.references.lookup import Lookup
from gemst.evaluation.references.popularity import Popularity
from gemst.evaluation.run import evaluate, joint_score

GENRES = ("comedy", "drama", "horror")


@pytest.fixture(autouse=True)
def without_the_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    def some(items: pl.DataFrame, train: pl.DataFrame, valid: pl.DataFrame, config: Config) -> list[Reference]:
        return [one.fit(train, items) for one in (Popularity(), BM25(), Lookup())]

    monkeypatch.setattr(run_module, "all_references", some)


@pytest.fixture
def items() -> pl.DataFrame:
    return pl.DataFrame(
        {
            "item_id": [f"i{n}" for n in range(150)],
            "title": [f"Film {n} (199{n % 10})" for n in range(150)],
            "text": [None] * 150,
            "categories": [[GENRES[n % 3]] for n in range(150)],
        },
        schema_overrides={"text": pl.String},
    )


def splits(users: int = 25) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for user in range(users):
        path = [f"i{n}" for n in rng.choice(150, 12, replace=False)]
        for at in range(1, 12):
            search = at % 2 == 0
            rows.append(
                {
                    "user_id": f"u{user:02d}", "task": "search" if search else "recommendation",
                    "query": GENRES[int(path[at][1:]) % 3] if search else None,
                    "history": path[:at], "targets": [path[at]],
                    "negatives": [f"i{n}" for n in rng.choice(150, 3)],
                    "timestamp": datetime(2024, 1, 1, tzinfo=UTC) + timedelta(hours=at), "at": at,
                }
            )  # fmt: skip
    table = pl.DataFrame(rows, schema_overrides={"query": pl.String, "timestamp": pl.Datetime("ms", "UTC")})
    return tuple(table.filter(pl.col("at").is_between(*span)).drop("at") for span in ((1, 7), (8, 9), (10, 11)))  # type: ignore[return-value]


def config(**evaluation: Any) -> Config:
    return Config.model_validate({"data": {"negatives": "shown"}, "evaluation": evaluation})


def oracle(examples: pl.DataFrame, k: int, seen: pl.DataFrame | None) -> pl.DataFrame:
    """Finds the target of every search, in second place; never that of a recommendation."""
    first = examples.with_row_index("row").select(
        "row", item_id=pl.lit("nowhere"), rank=pl.lit(1, pl.UInt16), score=pl.lit(0.0, pl.Float32)
    )
    second = (
        examples.with_row_index("row")
        .filter(pl.col("task") == "search")
        .select(
            "row", item_id=pl.col("targets").list.first(), rank=pl.lit(2, pl.UInt16), score=pl.lit(-1.0, pl.Float32)
        )
    )
    return pl.concat([first, second]).sort("row", "rank")


def test_the_model_and_the_references_stand_in_one_table(items: pl.DataFrame) -> None:
    train, valid, test = splits()
    result = evaluate(config(), items, train, valid, test, oracle, drift={"rise": 0.01})
    assert result.metrics["model"]["search"]["ndcg@10"] == pytest.approx(1 / np.log2(3))
    assert result.metrics["model"]["search"]["mrr@5"] == 0.5
    assert result.metrics["model"]["search"]["hit@1"] == 0.0
    assert result.metrics["model"]["recommendation"]["hit@20"] == 0.0
    assert result.metrics["model"]["joint"] == 0.0
    assert set(result.metrics["references"]) == {"popularity", "bm25", "lookup"}
    assert result.metrics["drift"] == {"rise": 0.01}
    assert result.metrics["counts"]["test_search"] == result.metrics["counts"]["test_recommendation"] == 25
    assert len(result.per_query) == 4 * 50
    searches = result.per_query.filter((pl.col("ranker") == "model") & (pl.col("task") == "search"))
    assert len(searches) == 25
    assert searches["query"].str.starts_with("seen ").all()
    assert result.rankings.equals(oracle(test, 20, None))


def test_metrics_are_the_means_of_the_per_query_table(items: pl.DataFrame) -> None:
    result = evaluate(config(), items, *splits(), oracle)
    for name, by_task in result.metrics["references"].items():
        for task in ("recommendation", "search"):
            part = result.per_query.filter((pl.col("ranker") == name) & (pl.col("task") == task))
            assert by_task[task]["ndcg@10"] == pytest.approx(part["ndcg@10"].mean())
    by_length = result.metrics["slices"]["history"]["0-10"]["popularity"]
    assert by_length["search"]["queries"] == 25


@pytest.mark.parametrize("exclude", [True, False])
def test_seen_items_are_kept_from_model_and_references_alike(items: pl.DataFrame, exclude: bool) -> None:
    train, valid, test = splits()
    given: list[pl.DataFrame | None] = []

    def spy(examples: pl.DataFrame, k: int, seen: pl.DataFrame | None) -> pl.DataFrame:
        given.append(seen)
        return oracle(examples, k, seen)

    result = evaluate(config(exclude_seen=exclude), items, train, valid, test, spy)
    assert (given[0] is not None) is exclude
    if exclude:
        assert given[0] is not None
        past = valid.filter(pl.col("user_id") == "u00")["targets"].explode().to_list()
        assert set(past) <= set(given[0].filter(pl.col("row") == 0)["item_id"])
    other = evaluate(config(exclude_seen=not exclude), items, train, valid, test, oracle)
    assert result.metrics["references"]["popularity"] != other.metrics["references"]["popularity"]


@pytest.mark.parametrize("exclude", [True, False])
def test_the_joint_score_is_that_of_evaluate_from_an_equally_long_ranking(items: pl.DataFrame, exclude: bool) -> None:
    """Beam search is as wide as the ranking is long: a shorter one is another ranking."""
    train, valid, test = splits()
    ranker, asked = BM25().fit(train, items), []

    def rank(examples: pl.DataFrame, k: int, seen: pl.DataFrame | None) -> pl.DataFrame:
        asked.append(k)
        return ranker.rank(examples.with_columns(query=pl.coalesce("query", pl.lit(GENRES[0]))), k, seen)

    chosen = config(exclude_seen=exclude, ks=[1, 5])
    longer = config(exclude_seen=exclude, ks=[50])
    for settings in (chosen, longer):
        joint = evaluate(settings, items, train, valid, test, rank).metrics["model"]["joint"]
        assert joint > 0
        assert joint_score(settings, train, valid, test, rank) == joint
    assert asked == [10, 10, 50, 50]


def test_equal_inputs_give_equal_metrics(items: pl.DataFrame) -> None:
    ranker = BM25().fit(splits()[0], items)
    first, second = (
        evaluate(config(protocols=["uniform99"]), items, *splits(), ranker.rank, rerank=ranker.rerank) for _ in range(2)
    )
    assert first.per_query.equals(second.per_query)
    assert {**first.metrics, "seconds": 0} == {**second.metrics, "seconds": 0}


def test_sampled_candidates_are_unseen_whatever_is_left_out_of_the_full_ranking(items: pl.DataFrame) -> None:
    train, valid, test = splits()
    pools: list[pl.Series] = []

    def spy(examples: pl.DataFrame, pool: pl.Series) -> pl.DataFrame:
        pools.append(pool)
        return BM25().fit(train, items).rerank(examples, pool)

    for exclude in (True, False):
        evaluate(config(protocols=["uniform99"], exclude_seen=exclude), items, train, valid, test, oracle, rerank=spy)
    assert pools[0].to_list() == pools[1].to_list()
    met = protocols.seen_items(test, [train, valid]).group_by("row", maintain_order=True).agg("item_id")
    assert len(met)
    assert all(not set(pools[1][row]) & set(ids) for row, ids in met.rows())


def test_sampled_protocols_stand_beside_the_full_one(items: pl.DataFrame) -> None:
    train, valid, test = splits()
    ranker = BM25().fit(train, items)
    chosen = config(protocols=["uniform99", "bm25-99", "shown"])
    result = evaluate(chosen, items, train, valid, test, ranker.rank, rerank=ranker.rerank)
    protocols = result.metrics["protocols"]
    assert set(protocols) == {"uniform99", "bm25-99", "shown"}
    assert set(protocols["bm25-99"]["model"]) == {"search", "joint"}
    for measured in protocols.values():  # the model here IS the reference
        assert measured["model"] == measured["references"]["bm25"]
    full = result.metrics["model"]["search"]["ndcg@10"]
    assert protocols["uniform99"]["model"]["search"]["ndcg@10"] > full
    assert protocols["shown"]["model"]["search"]["hit@5"] == 1.0  # four candidates
    without = evaluate(chosen, items, train, valid, test, ranker.rank)
    assert "model" not in without.metrics["protocols"]["uniform99"]
    assert without.metrics["protocols"]["uniform99"]["references"] == protocols["uniform99"]["references"]


def test_a_tuned_model_is_measured_with_its_drift(items: pl.DataFrame, tmp_path: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from gemst.backbone import Tuned, add_item_tokens, load
    from gemst.evaluation.drift import drift
    from gemst.item_ids import ItemIds
    from gemst.prompts import Prompter
    from gemst.ranking import rank, score

    torch.manual_seed(0)
    words = ["<pad>", "</s>", "<unk>", *GENRES, *(f"word{n}" for n in range(40))]
    inner = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2,
        )
    ).eval()  # fmt: skip
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    codes = np.arange(150, dtype=np.int32)[:, None]
    ids = ItemIds(
        item_id=items["item_id"].to_list(), codes=codes, level_sizes=(150,), strategy="atomic",
        generation=np.zeros(150, np.int32), active=np.ones(150, bool),
    )  # fmt: skip
    rows = torch.randn(150, 16)
    first = add_item_tokens(model, tokenizer, ids.tokens, rows, rows)
    chosen = Config.model_validate(
        {"backbone": {"name": str(tmp_path)}, "evaluation": {"protocols": ["uniform99"], "drift_tokens": 400}}
    )
    prompter = Prompter(tokenizer, ids.token_ids(first), ids.index, chosen.prompts, 20)
    tuned = Tuned(model, tokenizer, ids, first, prompter)
    train, valid, test = splits()
    heldout = [" ".join(f"word{(n * 7 + text) % 40}" for n in range(60)) for text in range(10)]
    before, plain = load(chosen.backbone)
    results = [
        evaluate(
            chosen, items, train, valid, test,
            lambda examples, k, seen: rank(tuned, examples, k, chosen.ranking, seen),
            rerank=lambda examples, pool: score(tuned, examples, pool, chosen.ranking),
            drift=drift(before, model, plain, heldout, chosen.evaluation.drift_tokens),
        )
        for _ in range(2)
    ]  # fmt: skip
    metrics = results[0].metrics
    assert metrics["drift"]["rise"] == pytest.approx(0, abs=1e-6)  # item rows aside, the model is its backbone
    assert metrics["drift"]["item_mass"] > 0
    assert 0 < metrics["model"]["search"]["ndcg@20"] < 1
    assert metrics["protocols"]["uniform99"]["model"]["search"]["hit@20"] >= metrics["model"]["search"]["hit@20"]
    assert len(results[0].rankings) == 50 * 20
    seen = protocols.seen_items(test, [train, valid])
    assert not len(results[0].rankings.join(seen, on=["row", "item_id"]))
    assert {**metrics, "seconds": 0} == {**results[1].metrics, "seconds": 0}


def test_paired_differences_are_the_models_gain_over_each_reference(items: pl.DataFrame) -> None:
    result = evaluate(config(bootstrap=200), items, *splits(), oracle)
    searched = result.metrics["model"]["search"]["ndcg@10"]
    for name, by_task in result.metrics["references"].items():
        line = result.metrics["paired"][name]["search"]
        assert line["difference"] == pytest.approx(searched - by_task["search"]["ndcg@10"])
        assert line["difference_low"] <= line["difference"] <= line["difference_high"]
        low, high = result.metrics["intervals"][name]["search"]
        assert low <= by_task["search"]["ndcg@10"] <= high

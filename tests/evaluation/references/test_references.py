"""What every reference ranker promises, and what each one is for."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import numpy as np
import polars as pl
import pytest

from gemst.errors import GemstError
from gemst.evaluation.references import base
from gemst.evaluation.references.base import Reference, top
from gemst.evaluation.references.bm25 import BM25
from gemst.evaluation.references.counts import Counts
from gemst.evaluation.references.covisits import CoVisits
from gemst.evaluation.references.dense import Dense, Encoder
from gemst.evaluation.references.lookup import Lookup
from gemst.evaluation.references.popularity import Popularity
from gemst.evaluation.references.query_covisits import QueryCoVisits
from gemst.evaluation.references.texts import documents
from gemst.memory.counts import train_events

SCHEMA = {
    "user_id": pl.String, "task": pl.String, "query": pl.String, "history": pl.List(pl.String),
    "targets": pl.List(pl.String), "negatives": pl.List(pl.String), "timestamp": pl.Datetime("ms", "UTC"),
}  # fmt: skip
GENRES = ("comedy", "drama", "horror", "war")
COUNTABLE = (Popularity, CoVisits, BM25, Lookup, QueryCoVisits)


def example(user: str, history: list[str], target: str, query: str | None = None, at: int = 0) -> dict[str, object]:
    return {
        "user_id": user, "task": "recommendation" if query is None else "search", "query": query, "history": history,
        "targets": [target], "negatives": [], "timestamp": datetime(2024, 1, 1, tzinfo=UTC) + timedelta(hours=at),
    }  # fmt: skip


def table(*examples: dict[str, object]) -> pl.DataFrame:
    return pl.DataFrame(examples, schema=SCHEMA)


def catalogue(count: int = 40) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "item_id": [f"i{n}" for n in range(count)],
            "title": [f"Film number{n} ({1950 + n})" for n in range(count)],
            "text": [None if n % 2 else f"plot{n}" for n in range(count)],
            "categories": [[GENRES[n % 4]] for n in range(count)],
        },
        schema_overrides={"text": pl.String},
    )


def events(users: int = 30, items: int = 40, seed: int = 0) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        path = [f"i{n}" for n in rng.choice(items, 8, replace=False)]
        rows += [
            example(f"u{user}", path[:at], path[at], None if at % 2 else GENRES[int(path[at][1:]) % 4], at)
            for at in range(1, 8)
        ]
    return table(*rows)


@pytest.mark.parametrize("kind", COUNTABLE)
def test_every_ranker_keeps_the_contract_and_blocks_do_not_matter(
    kind: type[Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    items, train = catalogue(), events()
    test = events(users=7, seed=1)
    seen = test.with_row_index("row").select("row", item_id="history").explode("item_id")
    ranker = kind().fit(train, items)
    ranked = ranker.rank(test, 10, seen)
    assert ranked.schema == {"row": pl.UInt32, "item_id": pl.String, "rank": pl.UInt16, "score": pl.Float32}
    assert ranked.group_by("row").len()["len"].to_list() == [10] * len(test)
    assert ranked.equals(ranked.sort("row", "rank"))
    assert not ranked.select("row", "item_id").is_duplicated().any()
    assert len(ranked.join(seen, on=["row", "item_id"])) == 0
    assert (ranked["score"].diff().fill_null(0).to_numpy()[ranked["rank"] > 1] <= 0).all()
    monkeypatch.setattr(base, "BLOCK_CELLS", 90)  # two examples a block
    assert ranker.rank(test, 10, seen).equals(ranked)


@pytest.mark.parametrize("kind", COUNTABLE)
def test_reranking_the_whole_catalogue_is_ranking_it(kind: type[Reference], monkeypatch: pytest.MonkeyPatch) -> None:
    items, test = catalogue(), events(users=5, seed=1)
    ranker = kind().fit(events(), items)
    shuffled = [items["item_id"].sample(fraction=1, shuffle=True, seed=row).to_list() for row in range(len(test))]
    monkeypatch.setattr(base, "BLOCK_CELLS", 90)
    assert ranker.rerank(test, pl.Series(shuffled)).equals(ranker.rank(test, len(items)))


def test_fewer_items_left_than_asked_for_gives_fewer_lines() -> None:
    items = catalogue(4)
    ranked = (
        Popularity()
        .fit(table(example("u", [], "i1")), items)
        .rank(
            table(example("u", [], "i1")),
            10,
            pl.DataFrame({"row": [0], "item_id": ["i0"]}, schema_overrides={"row": pl.UInt32}),
        )
    )
    assert ranked["item_id"].to_list() == ["i1", "i2", "i3"]


def test_items_and_examples_that_nobody_knows_do_no_harm() -> None:
    ranker = CoVisits().fit(table(example("u", ["gone"], "also gone")), catalogue(3))
    assert ranker.rank(table(example("new", ["never seen"], "i0")), 3)["item_id"].to_list() == ["i0", "i1", "i2"]
    assert len(ranker.rank(table(), 3)) == 0


def test_popularity_counts_targets_and_the_first_history() -> None:
    train = table(
        example("u", ["i2"], "i1"),
        example("u", ["i2", "i1"], "i3"),
        example("v", ["i2"], "i1"),
        example("w", ["i1"], "i2"),
    )
    ranked = Popularity().fit(train, catalogue(5)).rank(table(example("x", [], "i0")), 5)
    # i1: 2 targets + 1 head; i2: 1 target + 2 heads (not again in u's second history); equal counts by id
    assert ranked.select("item_id", "score").rows() == [("i1", 3.0), ("i2", 3.0), ("i3", 1.0), ("i0", 0.0), ("i4", 0.0)]


def test_an_event_is_counted_once_however_many_histories_hold_it() -> None:
    train = table(
        example("u", ["a"], "b", at=1), example("u", ["a", "b"], "c", at=2), example("u", ["a", "b", "c"], "b", at=3)
    )
    counted = train_events(train).group_by("item_id").len().sort("item_id")
    assert counted.rows() == [("a", 1), ("b", 2), ("c", 1)]


def test_co_visits_follow_the_newest_event() -> None:
    train = table(
        *[example(f"a{n}", ["i0"], "i1") for n in range(5)], *[example(f"b{n}", ["i2"], "i3") for n in range(5)]
    )
    ranker = CoVisits().fit(train, catalogue(6))
    assert ranker.rank(table(example("x", ["i2", "i0"], "i5")), 2)["item_id"].to_list() == ["i1", "i3"]
    assert ranker.rank(table(example("x", ["i0", "i2"], "i5")), 2)["item_id"].to_list() == ["i3", "i1"]


def test_co_visits_are_cosines() -> None:
    train = table(example("u", ["i0"], "i1"), example("v", ["i0"], "i1"), example("w", ["i0"], "i2"))
    ranked = CoVisits().fit(train, catalogue(4)).rank(table(example("x", ["i0"], "i3")), 2)
    assert ranked.select("item_id", "score").rows() == [
        ("i1", pytest.approx(2 / 6**0.5)),
        ("i2", pytest.approx(1 / 3**0.5)),
    ]


def test_co_visits_keep_the_nearest_alone_however_many_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemst.evaluation.references.covisits._NEIGHBOURS", 3)
    crawler = [example("u", [f"i{n}"], f"i{n + 1}") for n in range(0, 40, 2)]
    whole = CoVisits().fit(table(*crawler, example("v", [], "i30"), example("w", [], "i31")), catalogue(40))
    ranked = whole.rank(table(example("x", ["i0"], "i5")), 3)
    assert ranked["item_id"].to_list() == ["i1", "i10", "i11"]  # equals: the more popular first, then by id
    assert np.diff(whole._similar.indptr).max() == 3
    monkeypatch.setattr("gemst.memory.counts.BLOCK_CELLS", 60)  # blocks of one or two items
    blocks = CoVisits().fit(table(*crawler, example("v", [], "i30"), example("w", [], "i31")), catalogue(40))
    assert (blocks._similar != whole._similar).nnz == 0


def test_lookup_knows_the_query_whatever_its_case_and_falls_back_to_popularity() -> None:
    train = table(
        example("u", [], "i3", "Funny"), example("v", [], "i3", "funny "), example("w", [], "i2", "funny"),
        *[example(f"p{n}", [], "i1") for n in range(9)],
    )  # fmt: skip
    ranker = Lookup().fit(train, catalogue(5))
    ranked = ranker.rank(
        table(example("x", [], "i0", " FUNNY"), example("x", [], "i0", "sad"), example("x", [], "i0")), 3
    )
    lists = ranked.group_by("row", maintain_order=True).agg("item_id")["item_id"].to_list()
    assert lists == [["i3", "i2", "i1"], ["i1", "i3", "i2"], ["i1", "i3", "i2"]]


def test_the_hybrid_orders_a_query_s_clicks_by_the_history() -> None:
    together = [example(f"{liked}{n}", [f"i{liked}"], f"i{liked + 1}", "war") for liked in (2, 4) for n in range(3)]
    ranker = QueryCoVisits().fit(table(*together, *[example(f"p{n}", [], "i1") for n in range(9)]), catalogue(8))
    asked = [example("x", ["i2"], "i0", "war"), example("x", ["i4"], "i0", "War "), example("x", ["i4"], "i0", "new")]
    first = ranker.rank(table(*asked, example("x", ["i2"], "i0")), 2)
    lists = first.group_by("row", maintain_order=True).agg("item_id")["item_id"].to_list()
    assert lists[:2] == [["i3", "i5"], ["i5", "i3"]]  # both were clicked under it; the history says which comes first
    assert lists[2][:2] == ["i4", "i5"]  # nobody asked for this: what goes with the history, itself included
    assert lists[3] == ["i3", "i1"]  # no query: co-visits
    assert ranker.visits.name == "co-visits"
    assert ranker.lookup.name == "lookup"


def test_the_counts_are_weighed_by_what_valid_users_took() -> None:
    """Clicks tell searches all there is here, popularity tells recommendations."""
    train = [example(f"u{n}", [], f"i{5 + n % 2}", ("war", "drama")[n % 2]) for n in range(60)]
    train += [example(f"p{n}", [], f"i{n % 3 % 2}") for n in range(90)]
    valid = [example(f"v{n}", [], f"i{5 + n % 2}", ("war", "drama")[n % 2]) for n in range(60)]
    valid += [example(f"v{n}", [], f"i{n % 3 % 2}", at=1) for n in range(60)]
    ranker = Counts(table(*valid), exclude_seen=True).fit(table(*train), catalogue(8))
    fits = {fit.case: fit for fit in ranker.memory.fits}
    assert [fits[case].examples for case in ("search", "recommendation", "new query")] == [60, 60, 0]
    model, clicked, rate, _, _ = fits["search"].weights
    assert model == 0
    assert clicked > 1
    assert rate > 1  # more than it began with
    asked = table(example("x", [], "i0", "WAR"), example("x", [], "i0", "drama"), example("x", [], "i0"))
    first = ranker.rank(asked, 1)["item_id"].to_list()
    assert first == ["i5", "i6", "i0"]
    few = Counts(table(*valid[:5]), exclude_seen=True).fit(table(*train), catalogue(8))
    assert {fit.weights for fit in few.memory.fits} == {(0.0, 1.0, 1.0, 1.0, 1.0)}
    assert few.rank(asked, 1)["item_id"].to_list() == first


def test_bm25_equals_bm25s_query_by_query() -> None:
    import bm25s

    items = catalogue()
    ranker = BM25().fit(table(), items)
    queries = ["comedy", "horror film number3", "1960s war", "nothing known", "Film Film plot4"]
    scores = ranker.scores(table(*[example("u", [], "i0", query) for query in queries]))
    index = bm25s.BM25()
    texts = documents(items.sort("item_id")).to_list()
    index.index(bm25s.tokenize(texts, stopwords="english", show_progress=False), show_progress=False)
    assert ranker.item_ids.to_list() == items["item_id"].sort().to_list()  # no clicks: catalogue in order of id
    for query, row in zip(queries, scores, strict=True):
        words = bm25s.tokenize(query, stopwords="english", return_ids=False, show_progress=False)[0]
        known = [word for word in words if word in index.vocab_dict]
        expected = index.get_scores(known) if known else np.zeros(len(items))
        np.testing.assert_allclose(row, expected, rtol=1e-5)


def test_bm25_without_a_query_looks_for_items_like_the_history() -> None:
    ranked = (
        BM25()
        .fit(table(), catalogue())
        .rank(
            table(example("u", ["i2"], "i0")),
            3,
            pl.DataFrame({"row": [0], "item_id": ["i2"]}, schema_overrides={"row": pl.UInt32}),
        )
    )
    assert ranked["item_id"][0] == "i6"  # the other horror film of the fifties


def test_bm25_survives_a_catalogue_of_stop_words() -> None:
    items = catalogue(3).with_columns(
        title=pl.lit("the of a"), categories=pl.lit([], pl.List(pl.String)), text=pl.lit(None, pl.String)
    )
    assert len(BM25().fit(table(), items).rank(table(example("u", [], "i0", "the")), 3)) == 3


def test_documents_hold_categories_text_and_decade() -> None:
    texts = documents(
        pl.DataFrame(
            {"title": ["Heat (1995)", "2001 nights"], "text": [None, "a plot"], "categories": [["crime", "drama"], []]},
            schema_overrides={"text": pl.String},
        )
    ).to_list()
    assert texts[0] == "Heat (1995) crime drama 1995 1990s 90s"
    assert texts[1].split() == ["2001", "nights", "a", "plot"]


def test_top_breaks_ties_by_column_and_sorts() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 4, (50, 30)).astype(np.float32)  # ties everywhere
    for k in (1, 7, 30, 99):
        expected = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        np.testing.assert_array_equal(top(scores, k), expected)
    assert top(scores, 0).shape == (50, 0)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny BERT with random weights and a word-level vocabulary."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    folder = str(tmp_path_factory.mktemp("encoder"))
    words = ["[PAD]", "[UNK]", *GENRES, "film", *(f"number{n}" for n in range(40)), *(f"plot{n}" for n in range(40))]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(folder)
    return folder


def test_embeddings_are_unit_vectors_and_independent_of_the_batch(encoder: str) -> None:
    model = Encoder(encoder)
    texts = ["comedy", "war film number3 plot7 plot8 plot9", "drama film"]
    together = model.embed(texts)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(together, np.concatenate([model.embed([text]) for text in texts]), atol=1e-5)


def test_dense_finds_the_item_whose_text_is_the_query(encoder: str) -> None:
    items = catalogue()
    ranker = Dense(encoder).fit(events(), items)
    texts = documents(items)
    test = table(*[example("u", [], "i0", text) for text in texts], example("u", ["i7"], "i0"))
    best = ranker.rank(test, 1)["item_id"].to_list()
    assert best == [*items["item_id"], "i7"]


def test_a_missing_encoder_is_an_error_that_names_the_field() -> None:
    with pytest.raises(GemstError, match=r"item_ids.encoder = '/nowhere/at/all'"):
        Encoder("/nowhere/at/all")


def test_bm25_reads_chinese_by_the_character_as_the_hard_negatives_do() -> None:
    """Without spaces a whole title would be one word, and popularity would decide."""
    titles = ["夏天用的防晒霜测评", "今天吃什么", "防晒霜推荐", "Sun cream 2 review"]
    items = pl.DataFrame(
        {"item_id": list("abcd"), "title": titles, "text": [None] * 4, "categories": [[]] * 4},
        schema_overrides={"text": pl.String, "categories": pl.List(pl.String)},
    )
    ranker = BM25().fit(table(*(example("u", [], "b", at=at) for at in range(9))), items)
    found = ranker.rank(table(example("v", [], "a", "防晒霜")), 4).sort("rank")
    assert set(found["item_id"][:2]) == {"a", "c"}
    assert found["score"][1] > found["score"][2] == 0
    assert ranker.rank(table(example("v", [], "a", "CREAM sun")), 4).sort("rank")["item_id"][0] == "d"

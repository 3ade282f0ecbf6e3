"""New items for a tuned model: an ID and rows of their own, and nothing that was there moves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cosine_similarity

from gemst import backbone, item_ids, memory
from gemst.config import Config
from gemst.errors import GemstError
from gemst.files import read_json, write_json
from gemst.memory.evidence import Fit
from gemst.ranking import rank
from gemst.tuning.append import append
from gemst.tuning.new_rows import answer, histories, place
from tests.ranking.tiny import FAMILIES, tokenizer

WORDS = ["comedy", "drama", "old", "film"]


def catalogue(n: int) -> pl.DataFrame:
    rng = np.random.default_rng(2)
    return pl.DataFrame(
        {
            "item_id": [f"i{row}" for row in range(n)],
            "title": [f"{WORDS[row % 4]} {WORDS[row // 4 % 4]}" for row in range(n)],
            "text": [None] * n,
            "categories": [[] for _ in range(n)],
            "embedding": rng.standard_normal((n, 6)).tolist(),
        },
        schema_overrides={"text": pl.String, "categories": pl.List(pl.String)},
    )


def configured(strategy: str) -> Config:
    return Config.model_validate(
        {"item_ids": {"strategy": strategy, "levels": 2, "codebook_size": 6, "embedding": "column"}}
    )


def tuned_model(folder: Path, strategy: str, family: str, n: int = 16) -> Path:
    """What `gemst tune` leaves behind, with random rows that follow the items' texts."""
    from gemst.tuning.rows import start_rows

    items, config = catalogue(n), configured(strategy)
    item_ids.build(items, pl.DataFrame(), config, folder / "item_ids")
    ids, words = item_ids.load(folder / "item_ids"), tokenizer()
    torch.manual_seed(0)
    model = FAMILIES[family](len(words)).eval()
    rows = start_rows(model, words, ids, items)
    first = backbone.add_item_tokens(model, words, ids.tokens, rows, 0.5 * rows)
    backbone.save(model, words, folder)
    params = config.model_dump(mode="json")
    card = {"first_item_token": first, "prompts": params["prompts"], "max_history": 20, "params": params}
    write_json(folder / "gemst.json", card)
    return folder


def log() -> pl.DataFrame:
    """Five users, the odd ones with searches."""
    return pl.DataFrame(
        {
            "user_id": [f"u{n // 4}" for n in range(20)],
            "item_id": [f"i{n % 15}" for n in range(20)],
            "timestamp": range(20),
            "task": ["search" if n // 4 % 2 else "recommendation" for n in range(20)],
            "query": [WORDS[n % 4] if n // 4 % 2 else None for n in range(20)],
        }
    ).with_columns(pl.from_epoch("timestamp"))


def ask(history: list[str], query: str | None) -> pl.DataFrame:
    return pl.DataFrame(
        {"history": [history], "query": [query]}, schema={"history": pl.List(pl.String), "query": pl.String}
    )


@pytest.mark.parametrize("family", ["llama", "t5", "gpt2"])
def test_an_atomic_append_adds_rows_and_keeps_every_old_bit(family: str, tmp_path: Path) -> None:
    model = tuned_model(tmp_path / "model", "atomic", family)
    now = catalogue(20).filter(pl.col("item_id") != "i3")
    appended = append(model, now, log(), configured("atomic"), tmp_path / "grown")
    assert (appended.new, appended.retired, appended.items) == (4, 1, 19)
    before, after = backbone.load_tuned(model), backbone.load_tuned(tmp_path / "grown")
    known = after.first + 16
    assert (after.first, after.ids.tokens[16:]) == (before.first, [f"<item_{n}>" for n in range(16, 20)])
    assert after.tokenizer.convert_tokens_to_ids("<item_19>") == known + 3
    old, new = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "grown"))
    assert old.keys() == new.keys()
    for name, weight in old.items():
        assert torch.equal(new[name][: len(weight)] if weight.dim() else new[name], weight), name
    found = rank(after, ask(["i0", "i17"], "old film"), 20, Config().ranking)["item_id"].to_list()
    assert sorted(found) == sorted(now["item_id"])
    spelled = after.prompter.suffixes(["<item_19>"])[0]
    assert max(spelled) < after.first  # a new token cannot be spelt by a query either


def test_a_memory_counts_the_log_of_today_under_the_weights_it_has(tmp_path: Path) -> None:
    model = tuned_model(tmp_path / "model", "atomic", "llama")
    own = backbone.load_tuned(model)
    fit = Fit("search", 9, 0.1, 0.2, (0.8, 2.0, -0.1, 0.3, 0.1))
    memory.build(own.ids, log()).fitted([fit]).save(model / "memory", own.ids)
    there, config = catalogue(20).filter(pl.col("item_id") != "i3"), configured("atomic")
    grown = append(model, there, log(), config, tmp_path / "grown")
    assert (grown.new, grown.retired, grown.recounted) == (4, 1, True)
    before, after = backbone.load_tuned(model), backbone.load_tuned(tmp_path / "grown")
    assert before.memory is not None
    assert after.memory is not None
    assert after.memory.fits == (fit,)
    query = log()["query"].drop_nulls()[0]
    asked = ask(["i0", "i17"], query)
    old, new = (one.memory.mixture(one.ids, asked).added for one in (before, after))  # type: ignore[union-attr]
    assert old.nnz > 0
    assert (new[:, :16] != old).nnz == 0  # the same log
    found = dict(rank(after, asked, 20, Config().ranking).select("item_id", "rank").iter_rows())
    assert len(found) == 19
    again = append(tmp_path / "grown", there, log(), config, tmp_path / "again")
    assert not again
    clicked = log()[:1].with_columns(item_id=pl.lit("i17"), user_id=pl.lit("u9"), query=pl.lit(query))
    gone = clicked.with_columns(item_id=pl.lit("never listed"))
    today = append(tmp_path / "grown", there, pl.concat([log(), clicked, gone]), config, tmp_path / "today")
    assert today.recounted
    assert today
    assert (today.new, today.retired, today.returned) == (0, 0, 0)
    latest = backbone.load_tuned(tmp_path / "today")
    assert latest.memory is not None
    at = latest.ids.rows_of(pl.Series(["i17"]))[0]
    counted = latest.memory.mixture(latest.ids, asked).added.toarray()[0]
    assert new.toarray()[0, at] < counted[at]  # a new item has counts as soon as somebody clicks it
    assert after.memory.events[at] == 0
    assert latest.memory.events[at] == 1


@pytest.mark.parametrize("family", ["llama", "t5", "gpt2"])
def test_a_new_item_answers_to_its_title_and_its_input_row_to_its_text(family: str, tmp_path: Path) -> None:
    now = pl.concat(
        [catalogue(16), catalogue(20)[16:].with_columns(title=pl.Series(["the the a", "a old .", ": ,", "film film"]))]
    )
    model = tuned_model(tmp_path / "model", "atomic", family)
    append(model, now, log(), configured("atomic"), tmp_path / "grown")
    after = backbone.load_tuned(tmp_path / "grown")
    for row in range(16, 20):
        found = rank(after, ask([], now["title"][row]), 20, Config().ranking)["item_id"].to_list()
        assert next(item for item in found if item in now["item_id"][16:]) == f"i{row}"
    text = backbone.text_rows(after.model, after.tokenizer, now["title"].to_list())
    rows = backbone.vocabulary(after.model)[after.first : after.first + 20].detach()
    away, meant = rows[16:] - rows[:16].mean(0), text[16:] - text[:16].mean(0)
    assert (cosine_similarity(away, meant) > 0.999).all()


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_semantic_ids_are_appended_without_touching_a_weight(family: str, tmp_path: Path) -> None:
    model = tuned_model(tmp_path / "model", "rq-kmeans", family)
    appended = append(model, catalogue(20), log(), configured("rq-kmeans"), tmp_path / "grown")
    assert (appended.new, appended.retired) == (4, 0)
    files = [load_file(folder / "model.safetensors") for folder in (model, tmp_path / "grown")]
    assert all(torch.equal(files[1][name], weight) for name, weight in files[0].items())
    after = backbone.load_tuned(tmp_path / "grown")
    found = rank(after, ask([], "comedy"), 20, configured("rq-kmeans").ranking)["item_id"]
    assert {"i16", "i17", "i18", "i19"} <= set(found)


def test_what_the_next_model_shall_have_does_not_matter_to_this_one(tmp_path: Path) -> None:
    model = tuned_model(tmp_path / "model", "rq-kmeans", "llama")
    append(model, catalogue(18), log(), configured("rq-kmeans"), tmp_path / "same")
    card = read_json(model / "gemst.json")  # as `gemst tokenize --set item_ids.strategy=rq-kmeans`, then `gemst tune`
    write_json(model / "gemst.json", card | {"params": configured("atomic").model_dump(mode="json")})
    append(model, catalogue(18), log(), configured("atomic"), tmp_path / "other")
    found = [item_ids.load(tmp_path / name / "item_ids") for name in ("same", "other")]
    assert found[0].strategy == found[1].strategy == "rq-kmeans"
    assert (found[0].codes == found[1].codes).all()


def test_an_item_that_is_back_counts_beside_one_that_is_gone(tmp_path: Path) -> None:
    """As many items as before, none of them new, and the champion's catalogue is another all the same."""
    model = tuned_model(tmp_path / "model", "atomic", "llama")
    settings = configured("atomic")
    append(model, catalogue(16).filter(pl.col("item_id") != "i3"), log(), settings, tmp_path / "without-3")
    now = catalogue(16).filter(pl.col("item_id") != "i5")
    appended = append(tmp_path / "without-3", now, log(), settings, tmp_path / "without-5")
    assert (appended.new, appended.retired, appended.returned, appended.items) == (0, 1, 1, 15)


def test_new_items_beside_none_but_returned_ones(tmp_path: Path) -> None:
    """A season ends: what was for sale goes, what was retired comes back, and something is new."""
    model = tuned_model(tmp_path / "model", "atomic", "llama")
    settings = configured("atomic")
    append(model, catalogue(16)[:8], log(), settings, tmp_path / "first")
    appended = append(tmp_path / "first", catalogue(20)[8:], log(), settings, tmp_path / "second")
    assert (appended.new, appended.retired, appended.returned, appended.items) == (4, 8, 8, 12)


def test_new_rows_are_made_from_the_histories_that_the_model_was_tuned_on(tmp_path: Path) -> None:
    model = tuned_model(tmp_path / "model", "atomic", "llama")
    rows = []
    for history in ("both", "own"):
        card = read_json(model / "gemst.json")
        card["params"]["data"]["history"] = history
        write_json(model / "gemst.json", card)
        append(model, catalogue(18), log(), configured("atomic"), tmp_path / history)
        rows.append(load_file(tmp_path / history / "model.safetensors")["lm_head.weight"][-2:])
    assert not torch.allclose(*rows)


def test_a_full_code_space_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    model = tuned_model(tmp_path / "model", "rq-kmeans", "llama")
    with pytest.raises(GemstError, match="40 items do not fit"):
        append(model, catalogue(40), log(), configured("rq-kmeans"), tmp_path / "grown")
    assert not (tmp_path / "grown").exists()


def test_placed_rows_lie_as_far_from_the_mean_as_trained_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    trained = 3 * torch.randn(50, 8, generator=generator) + 5
    known, new = (torch.randn(n, 8, generator=generator) - 2 for n in (50, 4))
    rows = place(trained, known, new) - trained.mean(0)
    torch.testing.assert_close(rows.norm(dim=1), (trained - trained.mean(0)).norm(dim=1).mean().expand(4))
    assert (cosine_similarity(rows, new - known.mean(0)) > 0.9999).all()


def test_an_answering_row_is_quiet_where_it_is_not_asked_for_and_first_where_it_is() -> None:
    generator = torch.Generator().manual_seed(0)
    trained, around = (torch.randn(n, 40, generator=generator, dtype=torch.float64) for n in (50, 300))
    around += 3  # states have much in common
    asked = torch.randn(6, 2, 40, generator=generator, dtype=torch.float64) + 3
    low = (around @ trained.T).quantile(0.1, dim=1)
    rows = answer(trained, around, low, asked)
    others = (around @ trained.T).std(1).mean()  # how far trained logits lie from one another
    assert ((around @ rows.T).mean(0) - low.mean()).abs().max() < 0.3 * others
    own, best = torch.einsum("mkd,md->mk", asked, rows), (asked @ trained.T).amax(-1)
    assert ((own - best).abs() < 0.3 * others).all()
    foreign = torch.einsum("mkd,nd->mkn", asked, rows)[~torch.eye(6, dtype=torch.bool).unsqueeze(1).expand(6, 2, 6)]
    assert foreign.mean() < best.mean() - others


def test_histories_are_the_newest_known_items_of_each_user() -> None:
    past = histories(log(), pl.Series([f"i{n}" for n in range(14)]))
    assert past.to_list() == [
        ["i0", "i1", "i2", "i3"], ["i4", "i5", "i6", "i7"], ["i8", "i9", "i10", "i11"], ["i12", "i13", "i0"],
        ["i1", "i2", "i3", "i4"],
    ]  # fmt: skip
    assert histories(log().clear(), pl.Series(["i0"])).to_list() == [[]]


def test_a_catalogue_the_model_knows_nothing_of_is_refused(tmp_path: Path) -> None:
    model = tuned_model(tmp_path / "model", "atomic", "llama")
    strange = catalogue(4).with_columns(item_id="other-" + pl.col("item_id"))
    with pytest.raises(GemstError, match="knows none of today's 4 items: all of its own would be retired"):
        append(model, strange, log(), configured("atomic"), tmp_path / "out")
    assert not (tmp_path / "out").exists()

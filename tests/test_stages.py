"""The whole chain on own logs: a tiny catalogue, a tiny backbone, every stage for real."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from transformers import LlamaForCausalLM

from gemst import backbone, item_ids, layout, memory, stages, upkeep
from gemst.config import Config
from gemst.errors import GemstError
from gemst.files import read_json, write_json
from gemst.memory.evidence import CASES, Fit
from gemst.serving import champion
from tests import tiny_project


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("project")
    tiny_project.build(root)
    return root


@pytest.fixture(scope="module")
def config() -> Config:
    return Config.model_validate(tiny_project.SETTINGS)


@pytest.fixture(scope="module")
def ran(project: Path, config: Config, empty_database: Path) -> Path:
    (project / "mlruns").mkdir()
    shutil.copy(empty_database, project / "mlruns" / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        for stage in (
            stages.ingest, stages.validate, stages.split, stages.tokenize, stages.item_rows,
            stages.null_space, stages.tune,
            stages.evaluate, stages.register,
        ):  # fmt: skip
            stage(config)
    return project


def test_the_chain_ends_with_a_champion_and_the_same_numbers_everywhere(ran: Path, config, monkeypatch) -> None:
    monkeypatch.chdir(ran)
    metrics = read_json(layout.EVALUATION / "metrics.json")
    assert set(metrics["references"]) >= {"popularity", "co-visits", "bm25", "lookup", "dense"}
    assert metrics["counts"]["test"] == 40
    run = read_json(layout.TUNING / "run.json")
    assert run["largest_leak"] < 1e-5
    from gemst.registry.store import connect

    logged = connect().get_run(run["run_id"]).data
    assert logged.metrics["test/search/ndcg_at_10"] == metrics["model"]["search"]["ndcg@10"]
    assert logged.params["tuning.rank"] == "4"
    assert "<html" in (layout.EVALUATION / "report.html").read_text()
    from mlflow.artifacts import list_artifacts

    docs = {file.path for file in list_artifacts(run_id=run["run_id"], artifact_path="validation/docs")}
    assert {"validation/docs/index.html", "validation/docs/validations"} <= docs


def test_the_memory_goes_where_the_model_goes_and_can_be_left_out(ran: Path, config, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(ran)
    from gemst import registry
    from gemst.ranking import rank

    fits = read_json(layout.MODEL / "memory" / "fits.json")
    assert {fit["case"] for fit in fits} >= {"recommendation", "search"}
    run = read_json(layout.TUNING / "run.json")
    assert [(fit["case"], fit["after"]) for fit in run["memory"]] == [(fit["case"], fit["after"]) for fit in fits]
    assert all(fit["after"] >= fit["before"] for fit in fits)
    assert "id=memory" in (layout.EVALUATION / "report.html").read_text().replace('"', "")
    tuned = backbone.load_tuned(registry.champion(config).folder)
    asked = pl.read_parquet(layout.EXAMPLES / "test.parquet")
    assert tuned.memory is not None
    alone = config.model_copy(update={"ranking": config.ranking.model_copy(update={"memory": False})})
    ranked = [rank(tuned, asked, 5, one.ranking) for one in (config, alone)]
    fitted = any(fit["after"] > fit["before"] for fit in fits)
    assert ranked[0].equals(ranked[1]) != fitted
    shutil.copytree(ran, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    stages.tune(alone)
    assert not (layout.MODEL / "memory").exists()
    assert read_json(layout.TUNING / "run.json")["memory"] == []
    stages.evaluate(alone)
    assert "id=memory" not in (layout.EVALUATION / "report.html").read_text().replace('"', "")


def test_old_vocabulary_and_norms_keep_their_bits_and_linears_move(ran: Path, monkeypatch) -> None:
    monkeypatch.chdir(ran)
    before = LlamaForCausalLM.from_pretrained("backbone").state_dict()
    after = LlamaForCausalLM.from_pretrained(layout.MODEL).state_dict()
    old = len(before["model.embed_tokens.weight"])
    for name, value in before.items():
        same = torch.equal(after[name][:old] if "embed" in name or "lm_head" in name else after[name], value)
        assert same == ("proj" not in name), name


def test_recommend_and_search_return_unseen_titles_best_first(ran: Path, config, monkeypatch) -> None:
    monkeypatch.chdir(ran)
    met = set(pl.read_parquet(layout.VALIDATED / "events.parquet").filter(user_id="u3")["item_id"])
    for found in (champion.recommend(config, "u3", 3), champion.search(config, "u3", "comedy", 3)):
        assert found["rank"].to_list() == [1, 2, 3]
        assert found["score"].is_sorted(descending=True)
        assert not met & set(found["item_id"])
        assert found["title"].null_count() == 0


def test_an_item_that_left_the_catalogue_is_not_recommended(ran: Path, config, tmp_path, monkeypatch) -> None:
    shutil.copytree(ran, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    best = champion.recommend(config, "u3", 1)["item_id"][0]
    items = pl.read_parquet(layout.VALIDATED / "items.parquet")
    items.filter(pl.col("item_id") != best).write_parquet(layout.VALIDATED / "items.parquet")
    found = champion.recommend(config, "u3", 3)
    assert best not in found["item_id"].to_list()
    assert found["title"].null_count() == 0


def test_a_user_who_has_met_every_item_is_told_so(ran: Path, config, tmp_path, monkeypatch) -> None:
    shutil.copytree(ran, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    items = pl.read_parquet(layout.VALIDATED / "items.parquet")
    events = pl.read_parquet(layout.VALIDATED / "events.parquet")
    met = events.filter(user_id="u3")["item_id"]
    items.filter(pl.col("item_id").is_in(met.implode())).write_parquet(layout.VALIDATED / "items.parquet")
    with pytest.raises(GemstError, match="nothing is left to recommend: the user has met all items"):
        champion.recommend(config, "u3", 3)
    again = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"exclude_seen": False})})
    assert set(champion.search(again, "u3", "comedy", 3)["item_id"]) <= set(met)
    items.with_columns(item_id="new " + pl.col("item_id")).write_parquet(layout.VALIDATED / "items.parquet")
    with pytest.raises(GemstError, match="knows no item of today's catalogue"):
        champion.recommend(config, "u3", 3)


def test_a_query_that_spells_an_item_token_stays_text(ran: Path, config, monkeypatch) -> None:
    monkeypatch.chdir(ran)
    from gemst.backbone import load_tuned

    tuned = load_tuned(layout.MODEL)
    spelled = tuned.prompter.suffixes(["<item_0>"])[0]
    assert max(spelled) < tuned.first


def test_own_item_vectors_reach_the_identifiers(ran: Path, tmp_path, monkeypatch) -> None:
    for folder in ("artifacts", "mlruns"):
        shutil.copytree(ran / folder, tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    given = pl.read_parquet(ran / "logs" / "items.parquet").sort("item_id")
    kept = pl.read_parquet(layout.VALIDATED / "items.parquet").sort("item_id")
    np.testing.assert_allclose(kept["embedding"].to_list(), given["embedding"].to_list(), rtol=1e-6)
    settings = {"strategy": "rq-kmeans", "embedding": "column", "levels": 2, "codebook_size": 4}
    made = stages.tokenize(Config.model_validate({"item_ids": settings}))  # no encoder: only the column can serve
    assert made.notes == ["rq-kmeans: 100.00% unique"]  # and it is in MLflow
    ids = item_ids.load(layout.ITEM_IDS)
    assert ids.strategy == "rq-kmeans"
    assert sorted(ids.item_id) == given["item_id"].to_list()


def test_an_appended_item_is_searched_for_and_the_champion_keeps_its_score(ran, config, tmp_path, monkeypatch) -> None:
    shutil.copytree(ran, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    from gemst import registry

    before = registry.register(config, lambda folder: 0.0)
    counted, _ = upkeep.append(config).notes  # all of the log, where tuning counts the train examples
    assert "the memory counts today's" in counted
    assert upkeep.append(config).notes == ["the champion has these items and counts already"]
    items = pl.read_parquet(layout.VALIDATED / "items.parquet")
    new = items[:1].with_columns(item_id=pl.lit("fresh"), title=pl.lit("the old comedy film"))
    pl.concat([items.filter(pl.col("item_id") != "i4"), new]).write_parquet(layout.VALIDATED / "items.parquet")
    summary = upkeep.append(config)
    assert (summary.written["new"], summary.written["retired"]) == (1, 1)
    assert summary.written["version"] == str(before.version + 2)
    ids = item_ids.load(registry.champion(config).folder / "item_ids")
    published = item_ids.load(layout.ITEM_IDS)
    assert ids.item_id == [*published.item_id, "fresh"]
    assert (ids.codes[:12] == published.codes).all()
    found = champion.search(config, "u3", "comedy", 12)
    assert {"the old comedy film"} <= set(found["title"])
    assert "i4" not in found["item_id"]
    from gemst.registry.store import connect

    version = connect().get_model_version_by_alias("gemst", "champion")
    assert version.run_id == before.run_id
    assert version.tags["gemst.joint"] == repr(before.joint)
    assert version.tags["gemst.appended_to"] == str(before.version + 1)


def test_identifiers_are_built_though_mlflow_cannot_be_used(ran: Path, config, tmp_path, monkeypatch) -> None:
    shutil.copytree(ran / "artifacts", tmp_path / "artifacts")
    monkeypatch.chdir(tmp_path)
    layout.MLRUNS.mkdir()
    (layout.MLRUNS / "mlflow.db").write_text("no database")
    shutil.rmtree(layout.ITEM_IDS)
    assert "not in MLflow: mlruns/mlflow.db is not a database" in stages.tokenize(config).notes[1]
    assert len(item_ids.load(layout.ITEM_IDS).item_id) == 12


@pytest.mark.parametrize(
    ("stage", "missing"),
    [
        (stages.ingest, r"logs is not a folder.*gemst fetch"),
        (stages.validate, r"artifacts/tables/items.parquet does not exist.*gemst ingest"),
        (stages.split, r"gemst validate"),
        (stages.tokenize, r"gemst validate"),
        (stages.tune, r"gemst validate"),
        (stages.evaluate, r"artifacts/model/gemst.json does not exist.*gemst tune"),
        (stages.register, r"metrics.json does not exist.*gemst evaluate"),
        (upkeep.append, r"gemst validate"),
    ],
)
def test_a_stage_before_its_inputs_names_the_command_that_makes_them(
    tmp_path, config, monkeypatch, stage, missing
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GemstError, match=missing):
        stage(config)


@pytest.mark.parametrize(
    ("changed", "told"),
    [({"counts": {"items": 7}}, r"ranked [\d,]+ and 7 items"), ({"exclude_seen": False}, "evaluation.exclude_seen")],
)
def test_runs_of_different_tasks_are_not_compared(ran, config, tmp_path, monkeypatch, changed, told) -> None:
    monkeypatch.chdir(ran)
    shutil.copy(layout.EVALUATION / "per_query.parquet", tmp_path)
    metrics = read_json(layout.EVALUATION / "metrics.json")
    assert metrics["exclude_seen"]
    write_json(tmp_path / "metrics.json", metrics | changed)
    with pytest.raises(GemstError, match=told):
        stages.compare(config, str(layout.EVALUATION), str(tmp_path))


def test_a_damaged_table_of_scores_and_an_empty_test_set_are_named(ran, config, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(ran)
    (tmp_path / "per_query.parquet").write_bytes(b"PAR1, cut off")
    with pytest.raises(GemstError, match=r"per_query.parquet cannot be read: .*Evaluate that run again"):
        stages.compare(config, str(layout.EVALUATION), str(tmp_path))
    whole = (layout.EXAMPLES / "test.parquet").read_bytes()
    pl.read_parquet(layout.EXAMPLES / "test.parquet").clear().write_parquet(layout.EXAMPLES / "test.parquet")
    try:
        with pytest.raises(GemstError, match=r"no test example.*data.split: global-time"):
            stages.evaluate(config)
    finally:
        (layout.EXAMPLES / "test.parquet").write_bytes(whole)


def test_tuning_without_validation_examples_is_refused(ran, config, tmp_path, monkeypatch) -> None:
    """Nothing would ever be better than the start."""
    shutil.copytree(ran, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    valid = pl.read_parquet(layout.EXAMPLES / "valid.parquet")
    one = config.model_copy(update={"tuning": config.tuning.model_copy(update={"tasks": "search"})})
    for left, settings in ((valid.clear(), config), (valid.filter(task="recommendation"), one)):
        left.write_parquet(layout.EXAMPLES / "valid.parquet")
        with pytest.raises(GemstError, match=r"no validation example.*which weights are best.*data.split: global-time"):
            stages.tune(settings)


def test_the_champion_sees_the_kind_of_history_it_was_tuned_on(ran, config, tmp_path, monkeypatch) -> None:
    shutil.copytree(ran, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    stages.register(config)
    other = config.model_copy(update={"data": config.data.model_copy(update={"history": "own"})})
    found = [champion.search(settings, "u3", "comedy", 12) for settings in (config, other)]
    assert found[0].equals(found[1])


@pytest.mark.parametrize(("user", "query", "k", "says"), [
    ("nobody", None, 3, "user 'nobody' has no event"), ("u3", None, 0, "k = 0 is out of bounds"),
    ("u3", "  ", 3, "the query is empty"), ("u3", "\udcff comedy", 3, "the query is not UTF-8"),
])  # fmt: skip
def test_bad_requests_name_the_bound(ran: Path, config, monkeypatch, user, query, k, says) -> None:
    monkeypatch.chdir(ran)
    with pytest.raises(GemstError, match=says):
        champion.recommend(config, user, k) if query is None else champion.search(config, user, query, k)


def test_a_champion_of_other_examples_is_measured_as_evaluate_would(ran, config, tmp_path, monkeypatch) -> None:
    shutil.copytree(ran, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    assert "is champion" in stages.register(config).notes[0]
    met = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"exclude_seen": False})})
    stages.evaluate(met)
    joint = read_json(layout.EVALUATION / "metrics.json")["model"]["joint"]
    (note,) = stages.register(met).notes  # the same model: not better than itself
    assert f"is challenger, joint NDCG@10 {joint:.4f} (champion version 1 had {joint:.4f} on the same examples)" in note


def test_a_champion_that_counted_the_test_events_is_measured_without_them(ran, config, tmp_path, monkeypatch) -> None:
    shutil.copytree(ran, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    joint = read_json(layout.EVALUATION / "metrics.json")["model"]["joint"]
    tuned = backbone.load_tuned(layout.MODEL)
    events = pl.read_parquet(layout.VALIDATED / "events.parquet")
    shutil.rmtree(layout.MODEL / "memory")
    fits = [Fit(case, 9, 0.1, 0.2, (1.0, 50.0, 50.0, 50.0, 50.0)) for case in CASES]
    memory.build(tuned.ids, events).fitted(fits).save(layout.MODEL / "memory", tuned.ids)
    told = upkeep.joint(config, layout.MODEL)
    train = pl.read_parquet(layout.EXAMPLES / "train.parquet")
    shutil.rmtree(layout.MODEL / "memory")
    memory.build(tuned.ids, memory.train_events(train)).fitted(fits).save(layout.MODEL / "memory", tuned.ids)
    stages.evaluate(config)
    assert told == read_json(layout.EVALUATION / "metrics.json")["model"]["joint"] != joint


def test_a_champion_is_measured_without_the_items_that_are_gone(ran, config, tmp_path, monkeypatch) -> None:
    shutil.copytree(ran, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    test = pl.read_parquet(layout.EXAMPLES / "test.parquet")
    best = champion.recommend(config, "u3", 1)["item_id"][0]
    test.filter(pl.col("targets").list.first() != best).write_parquet(layout.EXAMPLES / "test.parquet")
    before = upkeep.joint(config, layout.MODEL)
    items = pl.read_parquet(layout.VALIDATED / "items.parquet")
    items.filter(pl.col("item_id") != best).write_parquet(layout.VALIDATED / "items.parquet")
    assert upkeep.joint(config, layout.MODEL) > before


def test_results_are_of_the_model_that_was_read(ran, config, tmp_path, monkeypatch) -> None:
    """Another tuning may end while this one's model is measured."""
    shutil.copytree(ran, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    real = backbone.load_tuned

    def read_and_replaced(folder: Path, *place: Any) -> backbone.Tuned:
        tuned = real(folder, *place)
        write_json(folder / "gemst.json", {**read_json(folder / "gemst.json"), "made": "later"})
        return tuned

    monkeypatch.setattr(backbone, "load_tuned", read_and_replaced)
    stages.evaluate(config)
    with pytest.raises(GemstError, match=r"metrics.json is of another model.*Run `gemst evaluate` first"):
        stages.register(config)

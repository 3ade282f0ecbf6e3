"""Runs and model versions in a real MLflow database."""

import shutil
import sqlite3
import subprocess

import mlflow
import pytest
from mlflow import MlflowClient

from gemst import layout, registry
from gemst.config import Config
from gemst.errors import GemstError
from gemst.files import read_json, write_json
from gemst.registry.store import metric_name, summary_metrics
from tests.small_run import make_model, write_results

CONFIG = Config()


def client() -> MlflowClient:
    mlflow.set_tracking_uri(f"sqlite:///{(layout.MLRUNS / 'mlflow.db').resolve()}")
    return MlflowClient()


def test_register_makes_a_run_with_the_numbers_of_metrics_json(artifacts):
    registered = registry.register(CONFIG)
    assert (registered.version, registered.champion, registered.joint) == (1, True, 0.25)
    run = client().get_run(registered.run_id)
    for name, value in summary_metrics(read_json(layout.EVALUATION / "metrics.json")).items():
        assert run.data.metrics[metric_name(name)] == value
    assert run.data.metrics["test/search/ndcg_at_10"] == 0.25
    assert run.data.metrics["references/bm25/search/ndcg_at_10"] == 0.125
    assert run.data.params["tuning.rank"] == str(CONFIG.tuning.rank)
    assert run.data.tags["dvc/tune/artifacts/model"] == "abc.dir"
    assert run.data.tags["dvc/data/data"] == "def.dir"
    assert [(m.step, m.value) for m in client().get_metric_history(registered.run_id, "train/loss_rec")] == [
        (1, 7.0),
        (2, 6.5),
    ]
    logged = {artifact.path for artifact in client().list_artifacts(registered.run_id, "evaluation")}
    assert {"evaluation/report.html", "evaluation/metrics.json", "evaluation/per_query.parquet"} <= logged


def test_registering_the_same_artefacts_again_changes_nothing(artifacts):
    first = registry.register(CONFIG)
    assert registry.register(CONFIG) == first
    assert len(client().search_model_versions("name = 'gemst'")) == 1


def test_champion_moves_only_when_the_joint_score_rises(artifacts):
    registry.register(CONFIG)
    write_results(joint=0.2)
    worse = registry.register(CONFIG)
    assert (worse.version, worse.champion) == (2, False)
    assert int(client().get_model_version_by_alias("gemst", "champion").version) == 1
    assert int(client().get_model_version_by_alias("gemst", "challenger").version) == 2
    write_results(joint=0.25)
    equal = registry.register(CONFIG)
    assert equal.version == 1  # these very artefacts are registered
    write_results(joint=0.3)
    better = registry.register(CONFIG)
    assert (better.version, better.champion) == (3, True)
    assert int(client().get_model_version_by_alias("gemst", "champion").version) == 3


def test_another_model_with_equal_results_is_another_version(artifacts):
    registry.register(CONFIG)
    shutil.rmtree(layout.MODEL)
    make_model(layout.MODEL, layout.ITEM_IDS, seed=1)
    assert registry.register(CONFIG).version == 2


def test_live_run_is_the_one_that_is_registered(artifacts):
    with registry.live(CONFIG) as run:
        run.log(1, {"train/loss_rec": 7.5, "valid/ndcg@10_joint": 0.1, "broken": float("nan")})
        write_json(layout.TUNING / "run.json", {"run_id": run.run_id})
    assert registry.register(CONFIG).run_id == run.run_id
    data = client().get_run(run.run_id).data
    assert data.metrics["train/loss_rec"] == 7.5
    assert data.metrics["valid/ndcg_at_10_joint"] == 0.1
    assert data.metrics["test/search/ndcg_at_10"] == 0.25
    assert client().get_run(run.run_id).info.status == "FINISHED"


def test_the_run_of_a_lost_database_is_made_again(artifacts):
    write_json(layout.TUNING / "run.json", {"run_id": "0" * 32})
    registered = registry.register(CONFIG)
    assert registered.run_id != "0" * 32
    assert client().get_run(registered.run_id).data.metrics["train/loss_rec"] == 6.5


def test_results_of_one_version_are_not_overwritten_by_the_next(artifacts):
    with registry.live(CONFIG) as run:
        write_json(layout.TUNING / "run.json", {"run_id": run.run_id})
    registry.register(CONFIG)
    write_results(joint=0.5)
    second = registry.register(CONFIG)
    assert second.run_id != run.run_id
    assert client().get_run(run.run_id).data.metrics["test/joint"] == 0.25
    assert client().get_run(second.run_id).data.metrics["test/joint"] == 0.5


def test_failed_tuning_is_a_failed_run(artifacts):
    with pytest.raises(ZeroDivisionError), registry.live(CONFIG) as run:
        run.log(1, {"lr": 1.0})
        raise ZeroDivisionError
    found = client().get_run(run.run_id)
    assert found.info.status == "FAILED"
    assert found.data.metrics["lr"] == 1.0


def test_git_commit_is_noted(artifacts):
    for words in (
        ["init", "-q"],
        ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-q", "--allow-empty", "-m", "x"],
    ):
        subprocess.run(["git", *words], check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert client().get_run(registry.register(CONFIG).run_id).data.tags["mlflow.source.git.commit"] == head


def test_locked_database_is_one_line_before_anything_is_computed(artifacts, monkeypatch):
    monkeypatch.setattr("gemst.registry.store._LOCK_PATIENCE", 0.1)
    registry.register(CONFIG)
    holder = sqlite3.connect("mlruns/mlflow.db")
    holder.execute("BEGIN IMMEDIATE")
    with (
        pytest.raises(GemstError, match=r"mlruns/mlflow.db is locked by another program\. Close"),
        registry.live(CONFIG),
    ):
        pytest.fail("the run began")
    holder.rollback()
    holder.close()


def test_a_lock_during_tuning_loses_nothing(artifacts, monkeypatch):
    monkeypatch.setattr("gemst.registry._FLUSH_EVERY", 0.0)
    with registry.live(CONFIG) as run:
        real = run._client.log_batch
        monkeypatch.setattr(
            run._client, "log_batch", lambda *_, **__: (_ for _ in ()).throw(sqlite3.OperationalError("locked"))
        )
        run.log(1, {"lr": 1.0})
        monkeypatch.setattr(run._client, "log_batch", real)
        run.log(2, {"lr": 0.5})
    assert [(m.step, m.value) for m in client().get_metric_history(run.run_id, "lr")] == [(1, 1.0), (2, 0.5)]


def test_damaged_database_is_one_line(artifacts):
    (layout.MLRUNS / "mlflow.db").write_text("this is no database" * 100)
    with pytest.raises(GemstError, match="is not a database MLflow can read"):
        registry.register(CONFIG)


def test_no_champion_yet(artifacts):
    with pytest.raises(GemstError, match="has no champion in the registry yet"):
        registry.champion(CONFIG)
    (layout.MLRUNS / "mlflow.db").unlink()
    with pytest.raises(GemstError, match="has no champion in the registry yet"):
        registry.champion(CONFIG)
    assert not list(layout.MLRUNS.iterdir())


def test_per_query_of_a_version_a_run_an_alias_and_a_folder(artifacts):
    registered = registry.register(CONFIG)
    original = (layout.EVALUATION / "per_query.parquet").read_bytes()
    for name in ("1", registered.run_id, "champion", str(layout.EVALUATION)):
        assert registry.per_query(CONFIG, name).read_bytes() == original
    nameless = CONFIG.model_copy(update={"registry": CONFIG.registry.model_copy(update={"model_name": None})})
    assert registry.per_query(nameless, registered.run_id).read_bytes() == original  # a study's cells are no versions
    for config, name in ((CONFIG, "nobody"), (nameless, "champion"), (nameless, "1")):
        with pytest.raises(GemstError, match=f"'{name}' names no evaluated run"):
            registry.per_query(config, name)


def test_register_before_evaluate_names_the_stage(artifacts):
    (layout.EVALUATION / "metrics.json").unlink()
    with pytest.raises(GemstError, match="Run `gemst evaluate` first"):
        registry.register(CONFIG)

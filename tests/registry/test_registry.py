"""Runs and model versions in a real MLflow database."""

import shutil
import sqlite3
import subprocess
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from pydantic import ValidationError

from gemst import layout, registry
from gemst.config import Config
from gemst.errors import GemstError
from gemst.files import read_json, write_json
from gemst.provenance import code_tags
from gemst.registry import versions
from gemst.registry.store import address, metric_name, summary_metrics
from tests.small_run import make_model, write_results

CONFIG = Config()


def unasked(folder: Path) -> float:
    pytest.fail(f"{folder} was measured again")


def register(rescore=unasked) -> registry.Registered:
    return registry.register(CONFIG, rescore)


def client() -> MlflowClient:
    mlflow.set_tracking_uri(f"sqlite:///{(layout.MLRUNS / 'mlflow.db').resolve()}")
    return MlflowClient()


def test_register_makes_a_run_with_the_numbers_of_metrics_json(artifacts):
    registered = register()
    assert (registered.version, registered.role, registered.joint) == (1, "champion", 0.25)
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
    first = register()
    assert register() == first
    assert len(client().search_model_versions("name = 'gemst'")) == 1


def test_champion_moves_only_when_the_joint_score_rises(artifacts):
    register()
    write_results(joint=0.2)
    worse = register()
    assert (worse.version, worse.role) == (2, "challenger")
    assert int(client().get_model_version_by_alias("gemst", "champion").version) == 1
    assert int(client().get_model_version_by_alias("gemst", "challenger").version) == 2
    write_results(joint=0.25)
    equal = register()
    assert equal.version == 1  # these very artefacts are registered
    write_results(joint=0.3)
    better = register()
    assert (better.version, better.role) == (3, "champion")
    assert int(client().get_model_version_by_alias("gemst", "champion").version) == 3


def test_a_champion_whose_alias_was_taken_away_can_be_crowned_again(artifacts):
    register()
    client().delete_registered_model_alias("gemst", "champion")
    assert register().role == "champion"


def test_a_version_that_was_deleted_does_not_come_back_by_itself(artifacts):
    run_id = register().run_id
    client().delete_model_version("gemst", "1")
    again = register()
    assert (again.version, again.role) == (None, None)
    assert "version 1 of gemst was this model and has been deleted" in again.judged
    assert client().search_model_versions("name = 'gemst'") == []
    client().delete_run(run_id)
    assert "restore the run" in register().judged
    client().restore_run(run_id)
    client().delete_tag(run_id, "gemst.version")
    assert register().role == "champion"
    client().delete_registered_model("gemst")
    assert register().role == "champion"  # to start over


def test_a_version_whose_run_was_deleted_stays_what_it_is(artifacts):
    first = register()
    client().delete_run(first.run_id)
    assert register() == first


def test_a_champion_without_its_files_is_named(artifacts):
    register()
    shutil.rmtree(layout.MLRUNS / "artifacts")
    (layout.MLRUNS / "artifacts").mkdir()
    with pytest.raises(GemstError, match=r"files of gemst version 1 cannot be had .*take the alias"):
        registry.champion(CONFIG)


def test_a_project_that_was_moved_writes_nothing_to_its_old_place(artifacts, monkeypatch):
    register()
    old, new = Path.cwd(), Path.cwd().parent / "moved"
    monkeypatch.chdir(old.parent)
    old.rename(new)
    monkeypatch.chdir(new)
    write_results(joint=0.3)
    with pytest.raises(GemstError, match=rf"keeps its files in {old.as_uri()}/mlruns/artifacts, which is gone"):
        register()
    assert not old.exists()


def test_a_model_name_with_a_dot_registers(artifacts):
    config = Config.model_validate({"registry": {"model_name": "rec.gemst"}})
    assert registry.register(config, unasked).version == 1
    assert (registry.champion(config).folder / "gemst.json").exists()


@pytest.mark.parametrize("name", ["it's", "a/b", "a:b", "shop@staging", "a?b", ""])
def test_a_model_name_that_mlflow_does_not_take_is_refused_at_once(name):
    with pytest.raises(ValidationError):
        Config.model_validate({"registry": {"model_name": name}})


def test_another_model_with_equal_results_is_another_version(artifacts):
    register()
    shutil.rmtree(layout.MODEL)
    make_model(layout.MODEL, layout.ITEM_IDS, seed=1)
    with pytest.raises(GemstError, match=r"metrics.json is of another model.*Run `gemst evaluate` first"):
        register()
    write_results(joint=0.25)
    assert register().version == 2


@pytest.mark.parametrize("changed", ["split", "exclude_seen"])
def test_results_of_other_examples_are_refused(artifacts, changed):
    """They would be compared with a champion that is measured on the present ones."""
    config = CONFIG
    if changed == "split":
        (layout.EXAMPLES / "test.parquet").write_bytes(b"another night's")
    else:
        settings = CONFIG.evaluation.model_copy(update={"exclude_seen": False})
        config = CONFIG.model_copy(update={"evaluation": settings})
    with pytest.raises(GemstError, match=r"metrics.json is of other test examples.*Run `gemst evaluate` first"):
        registry.register(config, unasked)
    assert client().search_registered_models() == []


def test_seconds_make_no_version(artifacts):
    register()
    write_results(joint=0.25, seconds=2.0)
    assert register().version == 1


def test_a_champion_of_other_examples_is_measured_again_on_these(artifacts):
    """Yesterday's 0.25 says nothing about today's test set; without this an easy night would reign for ever."""
    register()
    asked = []

    def rescore(folder: Path) -> float:
        asked.append((folder / "gemst.json").exists())
        return 0.1

    write_results(joint=0.2, examples="tonight's")
    found = register(rescore)
    assert (found.version, found.role, asked) == (2, "champion", [True])
    assert found.judged == "champion version 1 had 0.1000 on the same examples"
    write_results(joint=0.15, examples="tomorrow's")
    assert register(lambda folder: 0.18).role == "challenger"
    write_results(joint=0.2, examples="tonight's")
    assert register() == found  # judged once


@pytest.mark.parametrize("broken", ["set_registered_model_alias", "set_model_version_tag"])
def test_an_interrupted_registration_is_finished_by_the_next(artifacts, monkeypatch, broken):
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, broken, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            register()
    found = register()
    assert (found.version, found.role, found.judged) == (1, "champion", "the first one")
    assert registry.champion(CONFIG).version == 1


def test_a_version_that_lost_its_title_says_so(artifacts):
    first = register()
    write_results(joint=0.5)
    register()
    write_results(joint=0.25)
    again = register()
    assert (again.version, again.role) == (first.version, "superseded")


def test_a_champion_grown_from_one_that_was_replaced_meanwhile_is_refused(artifacts):
    register()
    old = registry.champion(CONFIG)
    write_results(joint=0.5)
    register()
    with pytest.raises(GemstError, match=r"a new champion, version 2, since version 1.*gemst append"):
        registry.succeed(CONFIG, layout.MODEL, old)
    assert registry.champion(CONFIG).version == 2


def test_a_champion_that_is_replaced_while_its_successor_is_logged_stays(artifacts, monkeypatch):
    register()
    old = registry.champion(CONFIG)
    real = versions.new_version

    def slow(*given):
        made = real(*given)
        other = real(*given)
        client().set_registered_model_alias("gemst", "champion", other.version)
        return made

    monkeypatch.setattr(versions, "new_version", slow)
    with pytest.raises(GemstError, match=r"a new champion, version 3, since version 1.*gemst append"):
        registry.succeed(CONFIG, layout.MODEL, old)
    assert registry.champion(CONFIG).version == 3
    assert sorted(int(one.version) for one in client().search_model_versions("name = 'gemst'")) == [1, 3]


def test_a_champion_crowned_while_the_old_one_is_measured_is_the_one_to_beat(artifacts):
    register()
    write_results(joint=0.5)
    assert register().version == 2
    client().set_registered_model_alias("gemst", "champion", "1")
    write_results(joint=0.3, examples="tonight's")

    def rescore(folder: Path) -> float:
        held = int(client().get_model_version_by_alias("gemst", "champion").version)
        client().set_registered_model_alias("gemst", "champion", "2")
        return {1: 0.1, 2: 0.4}[held]

    found = register(rescore)
    assert (found.version, found.role) == (3, "challenger")
    assert found.judged == "champion version 2 had 0.4000 on the same examples"


def test_artefacts_lie_beside_the_database_wherever_a_stage_runs(artifacts, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{(layout.MLRUNS / 'mlflow.db').resolve()}")
    beside = layout.MLRUNS.resolve()
    cell = Path("artifacts/study/cell")
    cell.mkdir(parents=True)
    monkeypatch.chdir(cell)
    with registry.live(CONFIG):
        pass
    (found,) = MlflowClient().search_experiments(filter_string="name = 'gemst'")
    assert found.artifact_location == (beside / "artifacts").as_uri()


def test_live_run_is_the_one_that_is_registered(artifacts):
    with registry.live(CONFIG) as run:
        run.log(1, {"train/loss_rec": 7.5, "valid/ndcg@10_joint": 0.1, "broken": float("nan")})
        write_json(layout.TUNING / "run.json", {"run_id": run.run_id})
    assert register().run_id == run.run_id
    data = client().get_run(run.run_id).data
    assert data.metrics["train/loss_rec"] == 7.5
    assert data.metrics["valid/ndcg_at_10_joint"] == 0.1
    assert data.metrics["test/search/ndcg_at_10"] == 0.25
    assert client().get_run(run.run_id).info.status == "FINISHED"


def test_the_run_of_a_lost_database_is_made_again(artifacts):
    write_json(layout.TUNING / "run.json", {"run_id": "0" * 32})
    registered = register()
    assert registered.run_id != "0" * 32
    assert client().get_run(registered.run_id).data.metrics["train/loss_rec"] == 6.5


def test_results_of_one_version_are_not_overwritten_by_the_next(artifacts):
    with registry.live(CONFIG) as run:
        write_json(layout.TUNING / "run.json", {"run_id": run.run_id})
    register()
    write_results(joint=0.5)
    second = register()
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


def test_git_commit_is_noted_and_a_change_seen_from_any_folder(artifacts, monkeypatch):
    for words in (
        ["init", "-q"],
        ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-q", "--allow-empty", "-m", "x"],
    ):
        subprocess.run(["git", *words], check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert client().get_run(register().run_id).data.tags["mlflow.source.git.commit"] == head
    Path("code.py").write_text("x = 1")
    subprocess.run(["git", "add", "code.py"], check=True)
    Path("cell").mkdir()
    monkeypatch.chdir("cell")
    assert code_tags()["git.dirty"] == "true"


def test_locked_database_is_one_line_before_anything_is_computed(artifacts, monkeypatch):
    monkeypatch.setattr("gemst.registry.store._LOCK_PATIENCE", 0.1)
    register()
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


def test_a_server_that_is_away_is_asked_once_in_a_while(artifacts, monkeypatch):
    monkeypatch.setattr("gemst.registry._FLUSH_EVERY", 0.0)
    asked = []
    with registry.live(CONFIG) as run:
        real = run._client.log_batch
        monkeypatch.setattr(
            run._client, "log_batch", lambda *_, **__: asked.append(1) or (_ for _ in ()).throw(MlflowException("away"))
        )
        for step in range(20):
            run.log(step, {"lr": 1.0})
        assert len(asked) == 1
        monkeypatch.setattr(run._client, "log_batch", real)
    assert len(client().get_metric_history(run.run_id, "lr")) == 20


def test_a_relative_address_is_the_same_database_from_every_folder(artifacts, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlruns/mlflow.db")
    assert address() == f"sqlite:///{(layout.MLRUNS / 'mlflow.db').resolve()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://team:5000")
    assert address() == "http://team:5000"


def test_damaged_database_is_one_line(artifacts):
    (layout.MLRUNS / "mlflow.db").write_text("this is no database" * 100)
    with pytest.raises(GemstError, match="is not a database MLflow can read"):
        register()


def test_no_champion_yet(artifacts):
    with pytest.raises(GemstError, match="has no champion in the registry yet"):
        registry.champion(CONFIG)
    (layout.MLRUNS / "mlflow.db").unlink()
    with pytest.raises(GemstError, match="has no champion in the registry yet"):
        registry.champion(CONFIG)
    assert not list(layout.MLRUNS.iterdir())


def test_per_query_of_a_version_a_run_an_alias_and_a_folder(artifacts):
    registered = register()
    original = (layout.EVALUATION / "per_query.parquet").read_bytes()
    for name in ("1", registered.run_id, "champion", str(layout.EVALUATION)):
        assert registry.evaluated(CONFIG, name).read_bytes() == original
    nameless = CONFIG.model_copy(update={"registry": CONFIG.registry.model_copy(update={"model_name": None})})
    assert registry.evaluated(nameless, registered.run_id).read_bytes() == original  # a study's cells are no versions
    for config, name in ((CONFIG, "nobody"), (nameless, "champion"), (nameless, "1")):
        with pytest.raises(GemstError, match=f"'{name}' names no evaluated run"):
            registry.evaluated(config, name)


def test_register_before_evaluate_names_the_stage(artifacts):
    (layout.EVALUATION / "metrics.json").unlink()
    with pytest.raises(GemstError, match="Run `gemst evaluate` first"):
        register()

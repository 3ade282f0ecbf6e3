"""A small study for real: every stage, every cell, a failure, a second call, MLflow's view of it."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
import yaml
from prefect.client.schemas.objects import State

from flows import cells, commands, compare
from gemst import cli, layout, params, stages
from gemst.errors import GemstError
from gemst.evaluation import study as studies
from gemst.files import read_json, write_json
from tests import tiny_project

ROOT = Path(__file__).resolve().parents[2]
BROKEN = "full/lr=0.01,seed=7"  # the cell that fails at first
STUDY = {
    "name": "tiny-study",
    "set": {"tuning.epochs": 50, "tuning.max_tokens": 3000, "tuning.validate_every": 5},
    "data": {"logs": {"data.path": "logs"}, "elsewhere": {"data.path": "nowhere/logs"}},
    "methods": {
        "gems": {"label": "GEMS", "trials": [{"tuning.lr": 0.01}, {"tuning.lr": 1e-6}]},
        "full": {"label": "f", "set": {"tuning.method": "full"}, "trials": [{"tuning.lr": 1e-6}, {"tuning.lr": 0.01}]},
        "open": {"label": "no null space", "set": {"null_space.rule": "none"}, "like": "gems"},
    },
    "tables": {
        "main": {
            "title": "t", "methods": ["gems", "full"], "data": ["logs", "elsewhere"], "seeds": [7, 8],
            "against": "gems",
        },
        "second": {"title": "u", "methods": ["gems", "open"], "data": ["logs"], "seeds": [7], "against": "gems"},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Path:
    root = tmp_path_factory.mktemp("study")
    tiny_project.build(root)
    shutil.copy(ROOT / "dvc.yaml", root)
    (root / "mlruns").mkdir()
    shutil.copy(empty_database, root / "mlruns" / "mlflow.db")
    (root / "params.yaml").write_text(yaml.safe_dump(tiny_project.SETTINGS))
    (root / "study.yaml").write_text(yaml.safe_dump(STUDY))
    return root


Call = tuple[str, str]  # stage, folder


def in_process(calls: list[Call]) -> Callable[..., commands.Outcome]:
    """Instead of flows.commands.run: stages run in this process, and are noted in `calls`."""
    commanded = {one.name or one.callback.__name__ for one in cli.app.registered_commands}

    def run(module: str, stage: str, *, say: Callable[[str], None], folder: Path, extra: dict[str, str]):
        assert module == "gemst.cli"
        assert stage in commanded
        calls.append((stage, folder.as_posix()))
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setenv("MLFLOW_TRACKING_URI", extra["MLFLOW_TRACKING_URI"])
            try:
                getattr(stages, stage.replace("-", "_"))(params.load())
            except GemstError as error:
                return commands.Outcome(1, (f"gemst: {error}",))
            finally:
                os.environ.pop("MLFLOW_TRACKING_URI", None)
        return commands.Outcome(0, ())

    return run


@pytest.fixture(scope="module")
def told(project: Path, prefect_api: None) -> list[tuple[State, list[Call]]]:
    """The study, called four times: how the flow ended, and the stages it ran.

    The first call meets a full disk in one cell, the second may run one cell only, the last has nothing to do.
    """
    told: list[tuple[State, list[Call]]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        for number in range(4):
            calls: list[Call] = []
            real = in_process(calls)

            def run(module: str, stage: str, number=number, real=real, **rest):
                if number == 0 and stage == "evaluate" and rest["folder"].as_posix().endswith(BROKEN):
                    return commands.Outcome(1, ("gemst: the disk is full",))
                return real(module, stage, **rest)

            patch.setattr(cells, "run", run)
            told.append((compare.compare("study.yaml", max_cells=1 if number == 1 else None, return_state=True), calls))
    return told


@pytest.fixture
def finished(told: list[tuple[State, list[Call]]], project: Path, monkeypatch: pytest.MonkeyPatch) -> studies.Study:
    """The study with all its cells, in its folder."""
    monkeypatch.chdir(project)
    return studies.read(Path("study.yaml"))


def test_a_study_goes_on_after_a_failure_and_where_it_was(told):
    (state, calls), (second, resumed), (third, _), (last, nothing) = told
    assert state.is_failed()
    assert f"1 failed: logs/{BROKEN}: evaluate: the disk is full" in state.message
    assert "5 cells run" in state.message  # 3 trials, GEMS's second seed, and the one without a null space
    counts = Counter(stage for stage, _ in calls)
    assert [counts[stage] for stage in cells.PREPARED] == [1] * len(cells.PREPARED)  # shared by all cells
    assert counts["tune"] == 6
    assert second.is_completed()
    assert [stage for stage, _ in resumed] == ["evaluate", "register"]  # the model was there
    assert third.message.startswith("1 cells run, 4 of the tables' cells still without")  # elsewhere has four
    assert last.is_completed()
    assert nothing == []


def test_every_cell_has_its_result_at_one_budget_and_the_best_trial_is_every_seed_s(finished):
    study = finished
    found = {cell.name: studies.result(study, cell) for cell in studies.plan(study, ["logs/*"])}
    assert len(found) == 7
    assert None not in found.values()
    budgets = {one["tokens"] for one in found.values()}
    assert max(budgets) <= 3000
    for one in found.values():  # the start, every five steps, the end
        told = {point["step"]: point["joint"] for point in one["validations"]}
        assert told[0] == one["start"]
        assert told[one["valid"]["step"]] == one["valid"]["joint"] == max(told.values())
        assert {0, 5, one["steps"]} <= set(told)
    for method in ("gems", "full"):
        scores = {
            name: one["valid"]["joint"] for name, one in found.items() if one["method"] == method and one["seed"] == 7
        }
        best = max(scores, key=lambda name: scores[name])
        assert best.replace("seed=7", "seed=8") in found
        assert sum(one["method"] == method and one["seed"] == 8 for one in found.values()) == 1
    shown = compare.listing(study, None, compare.away(study, {}))
    assert "done     logs/gems/lr=0.01,seed=7  validation" in shown
    assert "no data  elsewhere/gems/lr=0.01,seed=7" in shown

    folder = study.work / "logs/gems/lr=0.01,seed=7"
    assert not (folder / layout.MODEL).exists()
    assert (folder / layout.EVALUATION / "per_query.parquet").exists()
    assert (folder / layout.EXAMPLES).resolve() == (study.work / "logs/full/lr=0.01,seed=7" / layout.EXAMPLES).resolve()


def test_runs_of_a_study_hang_under_one_and_line_up(finished, project):
    from gemst.registry.store import connect

    client = connect()
    experiment = client.get_experiment_by_name("tiny-study")
    assert experiment.artifact_location == (project / "mlruns" / "artifacts").as_uri()
    runs = client.search_runs([experiment.experiment_id], "attributes.status = 'FINISHED'")
    (parent,) = [run for run in runs if run.info.run_name == "study"]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == 7
    assert {frozenset(run.data.params) for run in children} == {frozenset(children[0].data.params)}
    tested = [{name for name in run.data.metrics if name.startswith(("test/", "drift/", "refer"))} for run in children]
    assert all(names == tested[0] for names in tested)
    assert "test/joint" in tested[0]
    assert {run.data.params["study.method"] for run in children} == {"gems", "full", "open"}
    assert not any("slices" in name or "paired" in name for run in children for name in run.data.metrics)
    assert max(len(run.data.metrics) for run in children) < 120
    assert client.search_registered_models() == []


def test_equal_seed_and_config_give_equal_metrics(finished, tmp_path, monkeypatch):
    first = finished
    monkeypatch.setattr(cells, "run", in_process([]))
    study = first.model_copy(update={"work": tmp_path / "work", "results": tmp_path / "results"})
    cell = next(iter(studies.plan(first, ["logs/gems/*"])))
    before = studies.result(first, cell)
    again = cells.run_cell(study, cell, {}, "", lambda line: None)
    for part in ("test", "references", "drift", "valid", "intervals", "slices", "tokens"):
        assert again[part] == before[part], part
    texts = [
        (root / cell.name / layout.EVALUATION / "per_query.parquet").read_bytes() for root in (first.work, study.work)
    ]
    assert texts[0] == texts[1]


def test_two_cells_are_compared_by_folder_and_by_run(finished):
    study = finished
    names = ("logs/gems/lr=0.01,seed=7", "logs/full/lr=0.01,seed=7")
    folders = [study.work / name / layout.EVALUATION for name in names]
    run_id = read_json(study.work / names[1] / layout.TUNING / "run.json")["run_id"]
    table = stages.compare(params.load(), str(folders[0]), str(folders[1]))
    assert table.equals(stages.compare(params.load(), str(folders[0]), run_id))
    lines = {line["task"]: line for line in table.filter(metric="ndcg@10").to_dicts()}
    assert set(lines) == {"recommendation", "search", "joint"}
    for task in ("recommendation", "search"):
        results = [read_json(study.results / f"{name}.json")["test"][task]["ndcg@10"] for name in names]
        assert [lines[task]["a"], lines[task]["b"]] == pytest.approx(results)
        assert lines[task]["difference_low"] <= lines[task]["difference"] <= lines[task]["difference_high"]


def test_the_page_has_every_row_its_interval_and_what_is_missing(finished, project):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["compare", "study.yaml", "--table"])
        assert compare.main() == 0
    page = Path("docs/study.md").read_text()
    main, second = page.split("## t\n")[1].split("## u\n")
    logs, elsewhere = main.split("### elsewhere")
    assert "Not measured yet:** gems (seeds 7, 8); full (seeds 7, 8)" in elsewhere
    assert "Not measured" not in logs
    study, table = finished, finished.tables["main"]
    ours, theirs = ([studies.final(study, table, "logs", name, seed) for seed in (7, 8)] for name in ("gems", "full"))
    scores = [[studies.result(study, cell)["test"]["search"]["ndcg@10"] for cell in cells] for cells in (ours, theirs)]
    rows = {line.split(" | ")[0]: line for line in reversed(logs.splitlines()) if line.startswith("| ")}
    assert f"{sum(scores[0]) / 2:.4f} ± " in rows["| GEMS"]
    assert f"{sum(scores[0]) / 2 - sum(scores[1]) / 2:+.4f}" in rows["| f"].replace("**", "")
    assert "popularity" in logs
    assert "SASRec: not measured yet" in logs
    assert "perplexity rises by at most 0.5%" in logs
    assert "GEMS" in second
    assert "no null space" in second
    (project / "artifacts/study").rename(project / "gone")  # the committed files are enough
    assert compare.study_page.markdown(study, "python -m flows.compare study.yaml") == page
    (project / "gone").rename(project / "artifacts/study")


def test_the_page_names_a_seed_whose_methods_ran_on_different_kinds_of_machine(finished, tmp_path):
    study = finished.model_copy(update={"results": tmp_path})
    shutil.copytree(finished.results, tmp_path, dirs_exist_ok=True)
    assert "More than one" not in compare.study_page.markdown(study, "run")
    cell = studies.final(study, study.tables["main"], "logs", "full", 8)
    path = studies.result_path(study, cell)
    found = read_json(path)
    write_json(path, found | {"machine": found["machine"] | {"device": "a GPU"}})
    page = compare.study_page.markdown(study, "run")
    assert page.count("**More than one kind of machine in seed 8.**") == 1
    assert "a GPU beside" in page


def test_a_path_for_an_unknown_data_set_is_refused(finished):
    state = compare.compare("study.yaml", paths={"logz": "x"}, return_state=True)
    assert state.is_failed()
    assert "--path logz: the study has no such data set" in state.message


def test_a_pattern_that_no_cell_matches_is_refused(finished, capsys):
    state = compare.compare("study.yaml", only=["logs/gmes/*"], return_state=True)
    assert state.is_failed()
    assert "--only logs/gmes/*: no cell is called so by now" in state.message
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["compare", "study.yaml", "--list", "--only", "logs/gmes/*"])
        assert compare.main() == 1
    assert "no cell is called so" in capsys.readouterr().err


def test_a_home_folder_is_found_and_a_study_may_leave_the_path_to_params_yaml(finished, capsys, monkeypatch, project):
    monkeypatch.setenv("HOME", str(project))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["compare", "study.yaml", "--list", "--path", "elsewhere=~/logs"])
        assert compare.main() == 0
    assert "no data" not in capsys.readouterr().out
    pathless = finished.model_copy(update={"data": {"own": {}}})
    assert compare.away(pathless, {}) == {}  # params.yaml names logs


def test_prepared_stages_are_shared_exactly_when_what_they_read_agrees():
    def key(stage: str, *overrides: str) -> str:
        return cells.key(stage, params.load(ROOT / "params.yaml", list(overrides)), graph=ROOT / "dvc.yaml")

    assert key("split", "tuning.lr=0.1", "registry.run_name=x") == key("split")
    assert key("null-space", "data.path=other", "seed=1") == key("null-space")
    assert key("null-space", "null_space.energy=0.5") != key("null-space")
    assert key("tokenize", "data.max_history=3") != key("tokenize")  # through the examples it reads
    assert key("ingest", "data.max_history=3") == key("ingest")
    assert key("validate", "data.path=other") != key("validate")


def test_other_logs_under_the_same_name_are_prepared_anew(tmp_path):
    def key(stage: str, source: Path) -> str:
        return cells.key(stage, params.load(ROOT / "params.yaml"), source, graph=ROOT / "dvc.yaml")

    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.csv").write_text("a")
    first = key("split", tmp_path / "one")
    assert key("split", tmp_path / "two") == first  # the same logs elsewhere
    (tmp_path / "one" / "log.csv").write_text("b")
    assert key("split", tmp_path / "one") != first
    assert key("null-space", tmp_path / "one") == key("null-space", tmp_path / "two")


def test_files_behind_links_count(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "day-1.csv").write_text("a")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "events").symlink_to(tmp_path / "disk")
    assert [name for name, _ in cells._content(tmp_path / "logs")] == ["events/day-1.csv"]


def test_linking_a_folder_again_leaves_what_lies_in_it(tmp_path):
    raw, cell = tmp_path / "data", tmp_path / "cell"
    (raw / "backbone").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (raw / "encoder").symlink_to(tmp_path / "elsewhere")
    for name in ("data", "data/backbone", "data/encoder", "data"):
        cells._link(cell / name, tmp_path / name)
    assert (raw / "encoder").resolve() == tmp_path / "elsewhere"
    assert (cell / "data" / "backbone").is_dir()


def test_a_model_of_other_logs_is_not_tested(finished, tmp_path, monkeypatch):
    calls: list[Call] = []
    monkeypatch.setattr(cells, "run", in_process(calls))
    study = finished.model_copy(update={"work": tmp_path / "work", "results": tmp_path / "results"})
    cell = next(iter(studies.plan(finished, ["logs/full/*"])))
    logs = tmp_path / "logs"
    shutil.copytree("logs", logs)
    cells.run_cell(study, cell, {"logs": logs}, "", lambda line: None)
    folder = study.work / cell.name
    made_of = read_json(folder / "tuned.json")
    (folder / layout.MODEL).mkdir()
    write_json(folder / layout.MODEL / "gemst.json", {})
    assert cells._tuned(folder, made_of)
    events = pl.read_parquet(logs / "events.parquet")
    events.slice(1).write_parquet(logs / "events.parquet")
    calls.clear()
    cells.run_cell(study, cell, {"logs": logs}, "", lambda line: None)
    assert [stage for stage, _ in calls] == [
        "ingest", "validate", "split", "tokenize", "item-rows", "tune", "evaluate", "register",
    ]  # fmt: skip


def test_a_given_path_counts_where_the_study_names_an_absolute_one(tmp_path, monkeypatch, finished):
    full = params.load(ROOT / "params.yaml", [f"data.path={tmp_path / 'logs'}"])
    monkeypatch.chdir(ROOT)
    cells._furnish(finished, tmp_path / "cell", full, tmp_path / "other", [])
    assert params.load(tmp_path / "cell" / "params.yaml").data.path == tmp_path / "other"


def test_help_teaches(capsys):
    with pytest.raises(SystemExit, match="0"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["compare", "--help"])
        compare.main()
    shown = capsys.readouterr().out
    assert "--only 'ml-100k/gems/*'" in shown
    assert "make ui" in shown

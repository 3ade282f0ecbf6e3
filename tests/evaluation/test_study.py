"""Which cells a study has, which results count, and what is wrong with a study."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from gemst.errors import GemstError
from gemst.evaluation import study as studies
from gemst.files import write_json

ROOT = Path(__file__).resolve().parents[2]
TREE: dict[str, Any] = {
    "name": "s", "set": {"tuning.max_tokens": 100}, "data": {"a": {"data.path": "a"}},
    "methods": {
        "x": {"label": "X", "trials": [{"tuning.lr": 0.1}, {"tuning.lr": 0.2}]},
        "y": {"label": "Y", "set": {"tuning.method": "full"}, "trials": [{"tuning.lr": 0.1}, {"tuning.lr": 0.3}]},
        "z": {"label": "Z", "set": {"tuning.rank": 8}, "like": "x"},
    },
    "tables": {"main": {"title": "t", "methods": ["x", "y", "z"], "data": ["a"], "seeds": [1, 2], "against": "x"}},
}  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())


def read(tree: dict[str, Any]) -> studies.Study:
    Path("study.yaml").write_text(yaml.safe_dump(tree))
    return studies.read(Path("study.yaml"))


def names(study: studies.Study) -> list[str]:
    return [cell.name for cell in studies.plan(study)]


def give(study: studies.Study, name: str, joint: float) -> None:
    (cell,) = [cell for cell in studies.plan(study) if cell.name == name]
    write_json(studies.result_path(study, cell), {"params": cell.params, "valid": {"joint": joint}})


def test_the_project_s_own_study_reads():
    study = studies.read(ROOT / "configs/study.yaml")
    assert {"gems", "full", "lora", "galore"} <= set(study.tables["main"].methods)
    assert len(study.tables["main"].seeds) == 3
    list(studies.plan(study))  # every parameter exists


def test_trials_come_first_and_the_best_one_is_every_seed_s():
    study = read(TREE)
    assert names(study) == [f"a/{m}/lr={lr},seed=1" for m, lr in (("x", 0.1), ("x", 0.2), ("y", 0.1), ("y", 0.3))]
    give(study, "a/x/lr=0.1,seed=1", 0.5)
    give(study, "a/x/lr=0.2,seed=1", 0.6)
    assert names(study)[4:] == ["a/z/lr=0.2,seed=1", "a/x/lr=0.2,seed=2", "a/z/lr=0.2,seed=2"]
    (z,) = studies.plan(study, ["a/z/*1"])
    assert (z.config.tuning.lr, z.config.tuning.rank, z.config.seed) == (0.2, 8, 1)
    assert studies.missing(study) == 5  # of six, x with seed 1 is there: its trial


def test_a_cell_in_two_tables_is_missing_once():
    once = studies.missing(read(TREE))
    assert studies.missing(read({**TREE, "tables": {**TREE["tables"], "again": TREE["tables"]["main"]}})) == once


def test_a_mapping_that_lost_a_name_is_another_cell():
    given = {**TREE, "set": {**TREE["set"], "data.columns": {"user_id": "customer", "query": "typed"}}}
    name = names(read(given))[0]
    give(read(given), name, 0.5)
    for columns, known in (
        ({"user_id": "customer", "query": "typed"}, True),
        ({"user_id": "customer"}, False),
        ({}, False),
    ):
        study = read({**TREE, "set": {**TREE["set"], "data.columns": columns}})
        (cell,) = [cell for cell in studies.plan(study) if cell.name == name]
        assert (studies.result(study, cell) is not None) == known, columns


def test_trials_of_another_budget_are_cells_of_their_own():
    study = read({**TREE, "trial_set": {"tuning.max_tokens": 10}})
    assert names(study)[0] == "a/x/trial,lr=0.1,seed=1"
    give(study, "a/x/trial,lr=0.1,seed=1", 0.6)
    give(study, "a/x/trial,lr=0.2,seed=1", 0.5)
    (cell,) = [cell for cell in studies.plan(study) if cell.name == "a/x/lr=0.1,seed=1"]
    assert cell.config.tuning.max_tokens == 100
    assert not cell.trial


def test_a_data_set_without_trials_takes_the_settings_chosen_on_another():
    study = read({**TREE, "data": {**TREE["data"], "b": {}}, "tried_on": {"b": "a"}, "tables": {
        **TREE["tables"], "other": {**TREE["tables"]["main"], "data": ["b"]}}})  # fmt: skip
    assert not any(name.startswith("b/") for name in names(study))
    give(study, "a/x/lr=0.1,seed=1", 0.5)
    give(study, "a/x/lr=0.2,seed=1", 0.6)
    assert "b/x/lr=0.2,seed=1" in names(study)
    assert "b/z/lr=0.2,seed=2" in names(study)
    assert not any(name.startswith("b/x/lr=0.1") for name in names(study))


def test_a_result_of_other_parameters_does_not_count_and_a_new_parameter_had_its_default():
    study = read(TREE)
    give(study, "a/x/lr=0.1,seed=1", 0.5)
    cell = next(studies.plan(study))
    assert studies.result(study, cell) is not None
    other = read({**TREE, "set": {"tuning.max_tokens": 200}})
    assert studies.result(other, next(studies.plan(other))) is None
    without = {name: value for name, value in cell.params.items() if name != "tuning.checkpointing"}
    write_json(studies.result_path(study, cell), {"params": without, "valid": {"joint": 0.5}})
    assert studies.result(study, cell) is not None
    changed = read({**TREE, "set": {"tuning.max_tokens": 100, "tuning.checkpointing": True}})
    assert studies.result(changed, next(studies.plan(changed))) is None


@pytest.mark.parametrize(("path", "value", "says"), [
    (("tables", "main", "methods"), ["x", "q"], "no method is called q"),
    (("tables", "main", "against"), "q", "against = 'q'"),
    (("tables", "main", "data"), ["b"], "no data set is called b"),
    (("methods", "y", "trials"), [{"tuning.lr": 0.1}], "same number of trials"),
    (("methods", "z", "like"), "q", "must name a method with trials"),
    (("methods", "z", "like"), None, "give it trials"),
    (("sets",), {}, "sets"),
    (("tried_on",), {"b": "a"}, "must name two data sets"),
    (("tried_on",), {"a": "a"}, "must name two data sets"),
])  # fmt: skip
def test_what_does_not_fit_is_named(path, value, says):
    tree = copy.deepcopy(TREE)
    node = tree
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    with pytest.raises(GemstError, match=says):
        read(tree)


def test_a_misspelt_parameter_is_named():
    study = read({**TREE, "set": {"tuning.max_token": 1}})
    with pytest.raises(GemstError, match="did you mean 'max_tokens'"):
        list(studies.plan(study))

"""The study's figure: a point for every model that was tested on both tasks, and for no other."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemst.evaluation import study as studies
from gemst.evaluation import study_page
from gemst.evaluation.study_figure import points, quality_and_drift
from gemst.files import read_json, write_json
from tests.evaluation.test_study_targets import TREE, everything, give, in_folder

TWO_TRIALS = {
    **TREE,
    "methods": {
        name: {**entry, "trials": [{"tuning.lr": 0.1}, {"tuning.lr": 0.2}]} if "trials" in entry else entry
        for name, entry in TREE["methods"].items()
    },
}


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> studies.Study:
    return in_folder(tmp_path, monkeypatch, TWO_TRIALS)


def other_trial(study: studies.Study, method: str, joint: float) -> Path:
    """Results of the second rate at the first seed: those of the first rate, with another validation score."""
    first, second = studies.trials(study, "a", method, 1)
    found = read_json(studies.result_path(study, first))
    path = studies.result_path(study, second)
    write_json(path, found | {"params": second.params, "valid": {"joint": joint, "step": 9}})
    return path


def chosen(study: studies.Study) -> dict[str, list[bool]]:
    """Of every point, by method, whether its settings are the ones chosen."""
    shown = points(study, study.tables["main"], "a")
    return {name: [is_chosen for _, is_chosen in found] for name, found in shown.items()}


def test_every_seed_and_every_trial_is_a_point(study) -> None:
    everything(study, (0.10, 0.20), (0.09, 0.19))
    assert chosen(study) == {"gems": [False], "full": [False]}  # no rate is chosen while a trial is missing
    path = other_trial(study, "gems", joint=0.01)
    other_trial(study, "full", joint=0.01)
    assert chosen(study) == {"gems": [True, True, False], "full": [True, True, False]}
    untested = read_json(path)
    del untested["test"]
    write_json(path, untested)
    assert chosen(study)["gems"] == [True, True]


def test_the_figure_names_its_methods_and_the_best_reference(study) -> None:
    everything(study, (0.10, 0.20), (0.09, 0.19))
    for method in ("gems", "full"):
        other_trial(study, method, joint=0.01)
    drawn = quality_and_drift(study, study.tables["main"], "a")
    assert drawn == quality_and_drift(study, study.tables["main"], "a")  # equal data, equal bytes
    for label in ("GEMS", "FULL", "bm25", "Recommendation", "Search", "Joint"):
        assert f"<!-- {label} -->" in drawn
    assert "LONE" not in drawn
    page = study_page.markdown(study, "run", {("main", "a"): "images/x.svg"})
    assert page.count("](images/x.svg)") == 1


def test_one_method_is_no_figure(study) -> None:
    give(study, "gems", 1, (0.10, 0.20))
    other_trial(study, "gems", joint=0.01)
    assert quality_and_drift(study, study.tables["main"], "a") == ""


def test_headings_and_the_summary_are_on_the_page(study) -> None:
    told = study.model_copy(update={"summary": ["first", "second"], "notes": {"Why": ["one", "two"]}})
    page = study_page.markdown(told, "run")
    assert page.startswith(f"# {study.title}\n\n- first\n- second\n\n")
    assert page.endswith("## What was found\n\n### Why\n\none\n\ntwo\n")

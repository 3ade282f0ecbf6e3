"""What the study's page may say of its targets: nothing that no cell shows."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml

from gemst.evaluation import study as studies
from gemst.evaluation import study_page
from gemst.evaluation.metrics import harmonic_mean
from gemst.files import read_json, write_json
from gemst.prompts import TASKS
from tests.evaluation.test_study import ROOT

USERS = 100
TREE: dict[str, Any] = {
    "name": "s", "results": "results/s", "data": {"a": {"data.path": "a"}},
    "methods": {
        "gems": {"label": "GEMS", "trials": [{"tuning.lr": 0.1}]},
        "full": {"label": "FULL", "set": {"tuning.method": "full"}, "trials": [{"tuning.lr": 0.1}]},
        "lone": {"label": "LONE", "set": {"tuning.tasks": "search"}, "like": "gems"},
    },
    "tables": {
        "main": {"title": "t", "methods": ["gems", "full", "lone"], "data": ["a"], "seeds": [1, 2], "against": "gems"}
    },
}  # fmt: skip


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> studies.Study:
    return in_folder(tmp_path, monkeypatch, TREE)


def in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch, tree: dict[str, Any]) -> studies.Study:
    """The study `tree` in a project folder, which becomes the working directory."""
    monkeypatch.chdir(folder)
    (folder / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    (folder / "study.yaml").write_text(yaml.safe_dump(tree))
    return studies.read(folder / "study.yaml")


def queries(scores: tuple[float, float], ranker: str = "model") -> pl.DataFrame:
    """A query per user and task whose means are `scores`, with the same spread for every method."""
    spread = np.random.default_rng(5).normal(0, 0.02, (USERS, 2))
    return pl.DataFrame(
        {
            "ranker": ranker, "protocol": "full", "row": np.arange(2 * USERS, dtype=np.uint32),
            "user_id": np.repeat([f"u{n}" for n in range(USERS)], 2), "task": list(TASKS) * USERS,
            "timestamp": [datetime(2024, 1, 1, tzinfo=UTC)] * 2 * USERS,
            "ndcg@10": (spread - spread.mean(0) + scores).ravel().astype(np.float32),
        }
    )  # fmt: skip


def give(
    study: studies.Study, method: str, seed: int, scores: tuple[float, float], *,
    by_query: bool = True, rise: float = 0.0, step: int = 9, commit: str = "abcdef0", made: str = "2026",
) -> None:  # fmt: skip
    owner = study.methods[method].like or method
    cell = studies.make(study, "a", method, study.methods[owner].trials[0], seed, trial=False)
    test: dict[str, Any] = {task: {"ndcg@10": score} for task, score in zip(TASKS, scores, strict=True)}
    write_json(
        studies.result_path(study, cell),
        {
            "params": cell.params, "valid": {"joint": harmonic_mean(list(scores)), "step": step}, "start": 0.05,
            "test": {**test, "joint": harmonic_mean(list(scores))},
            "drift": {"rise": rise, "kl": 0.0, "cloze_before": 0.8, "cloze_after": 0.8}, "largest_leak": None,
            "counts": {"test_met_again": 3}, "made": made,
            "seconds": {"per_step": 1, "tune": 1}, "peak_mib": {"tune": 1}, "steps": 9, "tokens": 1, "commit": commit,
            "dirty": "false", "machine": {"cores": 2, "processor": "x"},
            "references": {
                name: {task: {"ndcg@10": 0.12} for task in TASKS} for name in ("bm25", "dense", "lookup")
            },
        },
    )  # fmt: skip
    if by_query:
        queries(scores).write_parquet(studies.queries_path(study, cell))


def verdicts(study: studies.Study) -> dict[str, str]:
    """The verdict on each target, by the target's first words."""
    lines = study_page.markdown(study, "run").split("Targets of GEMS")[1].splitlines()
    told = [line.removeprefix("- ").split(": ", 1) for line in lines if line.startswith("- ")]
    return {text.split(":")[0]: verdict for verdict, text in told}


def everything(study: studies.Study, ours: tuple[float, float], full: tuple[float, float], **of_ours: Any) -> None:
    for seed in (1, 2):
        give(study, "gems", seed, ours, **of_ours)
        give(study, "full", seed, full)
        give(study, "lone", seed, (0.0, 0.15))


def test_a_better_method_reaches_every_target(study) -> None:
    everything(study, (0.10, 0.20), (0.09, 0.19))
    assert set(verdicts(study).values()) == {"reached"}
    page = study_page.markdown(study, "run")
    assert "**+0.0100**" in page
    assert "Tested as they started" not in page
    assert "All start at 0.0500" in page


def test_what_is_worse_is_missed_by_name(study) -> None:
    everything(study, (0.10, 0.11), (0.10, 0.19), rise=0.02)
    told = verdicts(study)
    missed = {text for text, verdict in told.items() if verdict == "**missed**"}
    assert missed == {
        "first in the joint score", "not significantly behind FULL on a task", "ahead of LONE on search",
        "not significantly behind LONE on a task", "perplexity rises by at most 0.5%",
        "above bm25 on search", "above dense on search", "above lookup on search",
    }  # fmt: skip
    assert "behind on search" in study_page.markdown(study, "run")


def test_a_method_of_another_budget_is_no_target(tmp_path, monkeypatch) -> None:
    longer = {"label": "LONGER", "set": {"tuning.max_tokens": 99}, "like": "gems"}
    table = TREE["tables"]["main"]
    tree = TREE | {
        "methods": TREE["methods"] | {"longer": longer},
        "tables": {"main": table | {"methods": [*table["methods"], "longer"]}},
    }
    study = in_folder(tmp_path, monkeypatch, tree)
    everything(study, (0.10, 0.20), (0.09, 0.19))
    for seed in (1, 2):
        give(study, "longer", seed, (0.30, 0.40))
    assert set(verdicts(study).values()) == {"reached"}
    page = study_page.markdown(study, "run")
    assert "LONGER" in page
    assert "behind LONGER" not in page


def test_no_verdict_without_scores_by_query_or_without_the_other_cells(study) -> None:
    give(study, "gems", 1, (0.10, 0.20))
    give(study, "full", 1, (0.05, 0.50), by_query=False)
    told = verdicts(study)
    assert told["not significantly behind FULL on a task"] == "not measured"
    assert told["ahead of LONE on search"] == "not measured"
    assert told["first in the joint score"] == "so far reached"
    assert "reached" not in told.values()


def test_a_difference_of_other_seeds_than_the_means_says_so_and_is_no_verdict(study) -> None:
    give(study, "gems", 1, (0.10, 0.20))
    give(study, "full", 1, (0.05, 0.15))
    give(study, "full", 2, (0.40, 0.60))
    page = study_page.markdown(study, "run")
    assert "; seed 1)" in page
    assert verdicts(study)["not significantly behind FULL on a task"] == "so far reached"


def test_a_model_that_is_the_start_and_cells_of_several_commits_are_named(study) -> None:
    everything(study, (0.10, 0.20), (0.09, 0.19), step=0)
    give(study, "full", 2, (0.09, 0.19), commit="1234567")
    page = study_page.markdown(study, "run")
    assert "Tested as they started, because no step was better on validation: GEMS (seed 1), GEMS (seed 2)." in page
    assert "**More than one commit in seed 2.**" in page


@pytest.mark.parametrize(("planned", "verdict"), [(1, "reached"), (2, "so far reached")])
def test_the_specialist_counts_once_all_its_trials_are_done(study, planned, verdict) -> None:
    everything(study, (0.10, 0.20), (0.09, 0.19))
    found = {
        "library": "rectools", "planned": planned, "trials": [{"lr": 1, "epochs": 5}, {"lr": 1, "epochs": 10}],
        "test": {task: {"ndcg@10": 0.08} for task in TASKS},
    }  # fmt: skip
    write_json(study.results.parent / "sasrec-a.json", found)
    queries((0.08, 0.08), "sasrec").write_parquet(study.results.parent / "sasrec-a.parquet")
    assert verdicts(study)["at or above tuned SASRec on recommendation"] == verdict
    page = study_page.markdown(study, "run")
    assert "0.1000 against 0.0800, difference **+0.0200**" in page
    assert ("1 of 2 trials" in page) == (planned == 2)


def test_a_specialist_of_other_examples_is_named_and_gives_no_verdict(study) -> None:
    everything(study, (0.10, 0.20), (0.09, 0.19))
    found = {
        "library": "r",
        "planned": 1,
        "trials": [{"epochs": 5}],
        "test": {task: {"ndcg@10": 0.08} for task in TASKS},
    }
    write_json(study.results.parent / "sasrec-a.json", found)
    queries((0.08, 0.08), "sasrec").head(9).write_parquet(study.results.parent / "sasrec-a.parquet")
    assert verdicts(study)["at or above tuned SASRec on recommendation"] == "so far reached"
    assert "not tested on the same queries" in study_page.markdown(study, "run")


def test_references_are_those_of_the_newest_cell(study) -> None:
    everything(study, (0.10, 0.20), (0.09, 0.19))
    give(study, "full", 2, (0.09, 0.19), made="2027")
    cell = studies.make(study, "a", "full", study.methods["full"].trials[0], 2, trial=False)
    found = read_json(studies.result_path(study, cell))
    found["references"]["query-co-visits"] = {task: {"ndcg@10": 0.33} for task in TASKS}
    write_json(studies.result_path(study, cell), found)
    page = study_page.markdown(study, "run")
    assert "| query-co-visits | 0.3300 | 0.3300 | 0.3300 |" in page
    assert "- **missed**: above query-co-visits on search: 0.2000 against 0.3300" in page
    assert "In 3 test examples the user had met a target before" in page


def test_means_of_other_seeds_are_not_set_against_each_other(study) -> None:
    give(study, "gems", 1, (0.10, 0.20))
    give(study, "gems", 2, (0.50, 0.60))
    give(study, "lone", 1, (0.0, 0.30))
    assert "ahead of LONE on search: 0.2000 against 0.3000" in study_page.markdown(study, "run")


def test_every_seed_tells_the_step_it_kept_unless_all_kept_the_same(study) -> None:
    for seed, step in ((1, 49), (2, 52)):
        give(study, "gems", seed, (0.10, 0.20), step=step)
        give(study, "full", seed, (0.09, 0.19))
    page = study_page.markdown(study, "run")
    assert "| 9 | 49, 52 | 1 |" in page
    assert "| 9 | 9 | 1 |" in page


def test_a_data_set_of_one_task_has_the_targets_of_that_task_alone(study) -> None:
    for seed in (1, 2):
        for method, score in (("gems", 0.2), ("full", 0.1)):
            give(study, method, seed, (score, score), by_query=False)
    for path in Path("results").rglob("*.json"):
        found = read_json(path)
        for scores in (found["test"], *found["references"].values()):
            scores.pop("search")
        write_json(path, found)
    told = verdicts(study)
    assert told["first in the joint score"] == "reached"
    assert not [target for target in told if target.startswith("above")]


@pytest.mark.parametrize(
    ("asked", "told"), [("fp32", "2 cores (AVX512, fp32): 3"), ("auto", "2 cores (AVX512, bf16): 3")]
)
def test_the_page_says_how_precisely_cells_were_computed(tmp_path, monkeypatch, asked, told) -> None:
    study = in_folder(tmp_path, monkeypatch, TREE | {"set": {"tuning.precision": asked}})
    for method in TREE["methods"]:
        give(study, method, 1, (0.1, 0.2))
    for path in tmp_path.glob("results/s/**/*.json"):
        write_json(
            path, read_json(path) | {"machine": {"cores": 2, "processor": "x", "instructions": "AVX512", "bf16": True}}
        )
    assert told in study_page.markdown(study, "run")

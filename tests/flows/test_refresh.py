"""The flow between two tunings: DVC's stages up to validation for real, the commands beside it answered."""

import sys
from pathlib import Path

import pytest
import yaml

from flows import commands, refresh


@pytest.fixture
def logs(project: Path) -> Path:
    """The project with two stages of the pipeline's names, which read data/logs.csv, and one that must not run."""
    (project / "data").mkdir()
    (project / "data/logs.csv").write_text("an event\n")
    stages = {
        name: {
            "cmd": f"{Path(sys.executable).as_posix()} write.py {name}.json",
            "deps": ["data/logs.csv"],
            "outs": [f"{name}.json"],
        }
        for name in ("ingest", "validate", "tune")
    }
    (project / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    return project


@pytest.mark.usefixtures("prefect_api", "outer_commands")
def test_tables_are_made_anew_where_the_logs_changed_and_nothing_is_tuned(logs):
    state = refresh.refresh(return_state=True)
    assert state.is_completed(), state.message
    assert state.message == "gemst version 3 is champion, joint NDCG@10 0.0670"
    ended = {"fetch": "Unchanged", "ingest": "Completed", "validate": "Completed", "append": "Completed"}
    assert state.result() == ended
    assert refresh.refresh(return_state=True).result()["validate"] == "Unchanged"
    (logs / "data/logs.csv").write_text("another event\n")
    assert refresh.refresh(return_state=True).result() == ended
    assert not (logs / "tune.json").exists()


@pytest.mark.usefixtures("prefect_api")
def test_nothing_to_append_is_unchanged(logs, outer_commands):
    outer_commands["append"] = [commands.Outcome(0, ("the champion has these items and counts already",))]
    state = refresh.refresh(return_state=True)
    assert state.result()["append"] == "Unchanged"
    assert state.message == "the champion has these items and counts already"


@pytest.mark.usefixtures("prefect_api")
def test_a_failed_expectation_keeps_the_champion(logs, outer_commands):
    outer_commands["append"] = []  # asked, it would have no answer
    (logs / "fail.py").write_text("import sys; sys.exit('gemst: events.user_id is null')\n")
    text = (logs / "dvc.yaml").read_text().replace("write.py validate.json", "fail.py")
    (logs / "dvc.yaml").write_text(text)
    state = refresh.refresh(return_state=True)
    assert state.is_failed()
    assert state.message == "validate: events.user_id is null"

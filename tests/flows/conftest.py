"""A Prefect API of the tests' own, and a small DVC project to run."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows import commands, tasks
from gemst.progress import summary_path


@pytest.fixture(scope="session")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Flows of this session talk to a server that dies with it, and leave nothing in anybody's home."""
    from prefect.testing.utilities import prefect_test_harness

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(tmp_path_factory.mktemp("prefect")))
        with prefect_test_harness(server_startup_timeout=120):
            yield


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A DVC project of two stages, whose second one writes metrics.json; `second` depends on params.yaml's seed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    python = Path(sys.executable).as_posix()
    (tmp_path / "params.yaml").write_text("seed: 1\n")
    (tmp_path / "write.py").write_text(
        "import json, pathlib, sys\n"
        "print('hello from', sys.argv[1])\n"
        "scores = {'recommendation': {'ndcg@10': 0.04}, 'search': {'ndcg@10': 0.2}}\n"
        "metrics = {'model': scores | {'joint': 0.067}, 'references': {'popularity': scores}}\n"
        "path = pathlib.Path(sys.argv[1]); path.parent.mkdir(parents=True, exist_ok=True)\n"
        "path.write_text(json.dumps(metrics))\n"
    )
    (tmp_path / "dvc.yaml").write_text(
        "stages:\n"
        f"  first:\n    cmd: {python} write.py one.json\n    outs: [one.json]\n"
        f"  second:\n    cmd: {python} write.py artifacts/evaluation/metrics.json\n"
        "    deps: [one.json]\n    params: [seed]\n    outs: [artifacts/evaluation]\n"
    )
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "--quiet"], check=True, env=os.environ.copy())
    return tmp_path


@pytest.fixture
def outer_commands(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[commands.Outcome]]:
    """What `gemst fetch`, `register` and `append` answer in turn, the last answer for ever; DVC stays real.

    One that answers with a line has that for its note and made no version.
    """
    answers = {name: [commands.Outcome(0, ())] for name in ("fetch", "register", "append")}
    real = commands.run

    def run(module, *arguments, say):
        if module == "dvc":
            return real(module, *arguments, say=say)
        queue = answers[arguments[0]]
        outcome = queue.pop(0) if len(queue) > 1 else queue[0]
        if outcome.status == 0:
            version = {} if outcome.lines else {"model": "gemst", "version": "3"}
            written = {"data/x": "unchanged"} if arguments[0] == "fetch" else version
            notes = outcome.lines or ["gemst version 3 is champion, joint NDCG@10 0.0670"]
            summary = {"stage": arguments[0], "written": written, "seconds": 1.0, "peak_mib": 9, "notes": notes}
            path = summary_path(arguments[0])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(summary))
        return outcome

    monkeypatch.setattr(tasks, "run", run)
    return answers

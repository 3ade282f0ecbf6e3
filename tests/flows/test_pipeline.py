"""The flow over a real DVC project, and its deployments on a real Prefect server."""

import contextlib
import importlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import yaml
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows import commands, pipeline, tasks
from gemst import cli

ROOT = Path(__file__).resolve().parents[2]


def test_stages_follow_dvc_yaml_and_each_is_a_command():
    names = pipeline.stages(ROOT / "dvc.yaml")
    assert names == ["ingest", "validate", "split", "tokenize", "item-rows", "null-space", "tune", "evaluate"]
    tree = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert {stage["cmd"] for stage in tree.values()} == {f"PATH=.venv/bin:$PATH gemst {name}" for name in names}
    known = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    assert set(names) <= known


def test_every_parameter_named_in_dvc_yaml_exists():
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    for stage in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].values():
        for name in stage.get("params", []):
            node = params
            for part in name.split("."):
                assert part in node, name
                node = node[part]


@pytest.mark.usefixtures("prefect_api", "outer_commands")
def test_second_run_is_unchanged_and_a_parameter_reruns_what_reads_it(project, capsys):
    def run() -> dict[str, str]:
        state = pipeline.pipeline(return_state=True)
        assert state.is_completed(), state.message
        return state.result()

    first = run()
    assert first == {"fetch": "Unchanged", "first": "Completed", "second": "Completed", "register": "Completed"}
    assert set(run().values()) == {"Unchanged"}
    (project / "params.yaml").write_text("seed: 2\n")
    assert run() == {"fetch": "Unchanged", "first": "Unchanged", "second": "Completed", "register": "Unchanged"}
    (project / "params.yaml").write_text("seed: 1\n")
    assert run()["second"] == "Restored"
    capsys.readouterr()
    pipeline.show(first)
    shown = capsys.readouterr().out
    assert "popularity" in shown
    assert "0.2000" in shown
    assert "gemst version 3 is champion" in shown


@pytest.mark.usefixtures("prefect_api", "outer_commands")
def test_result_is_an_artifact_of_the_run(project):
    from prefect.artifacts import Artifact

    assert pipeline.pipeline(return_state=True).is_completed()
    markdown = Artifact.get("results")
    assert markdown is not None
    assert "| popularity | 0.04 | 0.2 |" in str(markdown.data)


@pytest.mark.usefixtures("prefect_api", "outer_commands")
def test_a_failed_stage_ends_the_flow_with_its_reason_and_is_not_tried_again(project):
    counter = project / "tries"
    (project / "fail.py").write_text(
        f"import pathlib, sys\np = pathlib.Path({str(counter)!r})\n"
        "p.write_text(p.read_text() + 'x' if p.exists() else 'x')\n"
        "print('gemst: tuning.rank = 0 is wrong. Raise it', file=sys.stderr)\nsys.exit(1)\n"
    )
    text = (project / "dvc.yaml").read_text().replace("write.py one.json", "fail.py")
    (project / "dvc.yaml").write_text(text)
    state = pipeline.pipeline(return_state=True)
    assert state.is_failed()
    assert state.message == "first: tuning.rank = 0 is wrong. Raise it"
    assert counter.read_text() == "x"
    assert not (project / "artifacts/evaluation").exists()


@pytest.mark.usefixtures("prefect_api")
def test_fetch_is_tried_again_when_the_network_fails(project, outer_commands, monkeypatch):
    monkeypatch.setattr(tasks.fetch, "retry_delay_seconds", [0, 0])
    broken = commands.Outcome(1, ("gemst: recbole==1.2.1 cannot be downloaded (no connection). Check the network",))
    outer_commands["fetch"] = [broken, commands.Outcome(0, ())]
    assert pipeline.pipeline(return_state=True).is_completed()
    outer_commands["fetch"] = [commands.Outcome(1, ("gemst: no space",)), commands.Outcome(0, ())]
    state = pipeline.pipeline(return_state=True)
    assert state.is_failed()
    assert state.message == "fetch: no space"


@pytest.mark.usefixtures("prefect_api", "outer_commands")
def test_data_that_lacks_files_of_its_version_does_not_become_the_new_one(project):
    """A fresh clone of a team's project, whose logs are on the DVC remote alone."""
    held = sum(path.is_file() for path in Path("data").rglob("*"))
    named = f"outs:\n- path: data\n  md5: {'0' * 32}.dir\n  nfiles: {held + 1}\n  hash: md5\n"
    (project / "data.dvc").write_text(named)
    state = pipeline.pipeline(return_state=True)
    assert state.is_failed()
    assert f"data/ holds {held} files where data.dvc names a version of {held + 1}. Run `dvc pull" in state.message
    assert (project / "data.dvc").read_text() == named


@pytest.mark.usefixtures("prefect_api", "outer_commands")
def test_a_wrong_parameter_fails_before_any_stage(project):
    (project / "params.yaml").write_text("sed: 1\n")
    state = pipeline.pipeline(return_state=True)
    assert state.is_failed()
    assert "sed is not a parameter (did you mean 'seed'?)" in state.message
    assert not (project / "one.json").exists()


def test_output_is_streamed_while_the_command_runs(tmp_path, monkeypatch):
    """The command's second line waits for its first to be heard."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slow.py").write_text(
        "import pathlib, time\nprint('one')\n"
        "for _ in range(600):\n    if pathlib.Path('heard').exists():\n        print('two')\n        break\n"
        "    time.sleep(0.1)\n"
    )
    outcome = commands.run("slow", say=lambda line: (tmp_path / "heard").touch())
    assert outcome == commands.Outcome(0, ("one", "two"))


def test_what_it_started_ends_with_it_children_of_children_too(tmp_path, monkeypatch):
    """As DVC starts a stage: SIGTERM to the outer program alone must not leave a tuning behind."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inner.py").write_text(
        "import os, pathlib, time\npathlib.Path('pid').write_text(str(os.getpid()))\ntime.sleep(600)\n"
    )
    (tmp_path / "outer.py").write_text("import subprocess, sys\nsubprocess.run([sys.executable, 'inner.py'])\n")
    (tmp_path / "whole.py").write_text(
        "from flows import commands\nfrom gemst.stopping import stop_cleanly\n"
        "stop_cleanly()\ncommands.run('outer', say=print)\n"
    )
    root = str(Path(__file__).resolve().parents[2])
    whole = subprocess.Popen([sys.executable, "whole.py"], env=os.environ | {"PYTHONPATH": f"{root}:{tmp_path}"})
    pid = tmp_path / "pid"
    for _ in range(600):
        if pid.exists() and pid.read_text():
            break
        time.sleep(0.1)
    inner = psutil.Process(int(pid.read_text()))
    whole.terminate()
    whole.wait(timeout=60)
    with contextlib.suppress(psutil.NoSuchProcess):
        inner.wait(timeout=10)
    assert not inner.is_running()


BUSY = (
    "Running stage 'tune':", "ERROR: '/x/artifacts/model' is busy, it is being blocked by:", "  (PID 7): dvc repro",
    "", "If there are no processes with such PIDs, you can manually remove '/x/.dvc/tmp/rwlock' and try again.",
)  # fmt: skip


def test_a_lock_of_another_dvc_is_waited_for_and_never_called_removable():
    state = tasks._settled(commands.Outcome(1, BUSY), unchanged=False)
    assert state.message == BUSY[1]
    assert tasks._may_pass(tasks.run_stage, None, state)
    broken = tasks._settled(commands.Outcome(1, ("ERROR: no such stage", "hint")), unchanged=False)
    assert broken.message == "no such stage"
    assert not tasks._may_pass(tasks.run_stage, None, broken)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A real `prefect server`, on a free port, with a home and a database of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    url = f"http://127.0.0.1:{port}/api"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment |= {
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_API_URL": url,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "true",
    }
    log = (tmp_path / "server.log").open("w")
    process = subprocess.Popen(
        [sys.executable, "-m", "prefect", "server", "start", "--port", port, "--no-ui"],
        env=environment, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        for _ in range(240):
            try:
                if httpx.get(f"{url}/health", timeout=1).status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.5)
        else:
            pytest.fail(f"the server did not start:\n{(tmp_path / 'server.log').read_text()}")
        yield url, environment
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        log.close()


@pytest.mark.parametrize("module", ["flows.pipeline", "flows.refresh", "flows.compare", "flows.deploy"])
def test_a_server_that_is_away_is_one_line(module, monkeypatch, capsys):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/api"
    monkeypatch.setattr("sys.argv", [module])
    with temporary_settings({PREFECT_API_URL: url}):
        assert importlib.import_module(module).main() == 1
    said = capsys.readouterr().err
    assert f"no Prefect server answers at {url}" in said
    assert said.count("\n") == 1


def test_deployments_are_made_and_nightly_is_scheduled(server):
    url, environment = server
    for _ in range(2):  # deploying again updates what is there
        deployed = subprocess.run(
            [sys.executable, "-m", "flows.deploy"],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=180,
        )
        assert deployed.returncode == 0, deployed.stdout + deployed.stderr
    deployments = {d["name"]: d for d in httpx.post(f"{url}/deployments/filter", json={}, timeout=20).json()}
    assert set(deployments) == {"demo", "nightly", "study", "today"}
    assert deployments["study"]["parameters"] == {"minutes": 480}
    assert deployments["demo"]["work_pool_name"] == "cpu"
    assert deployments["nightly"]["work_pool_name"] == "gpu"
    assert httpx.get(f"{url}/work_pools/gpu", timeout=20).json()["concurrency_limit"] == 1
    watches = httpx.post(f"{url}/automations/filter", json={}, timeout=20).json()
    (watch,) = [one for one in watches if one["name"].startswith("gemst")]
    assert watch["enabled"]
    assert [action["state"] for action in watch["actions"]] == ["CRASHED"]
    wanted = {
        "deployments": {"id": {"any_": [deployments["nightly"]["id"]]}},
        "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}},
    }
    for _ in range(120):
        runs = httpx.post(f"{url}/flow_runs/filter", json=wanted, timeout=20).json()
        if runs:
            break
        time.sleep(0.5)
    assert runs, "the scheduler made no run"
    assert runs[0]["state_type"] == "SCHEDULED"

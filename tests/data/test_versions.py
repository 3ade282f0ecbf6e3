"""Versions of the data between machines: git has the pointers, a DVC remote the bytes, `gemst data diff` compares."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from dvc.cli import main as dvc_main
from typer.testing import CliRunner

from gemst import cli, stages
from gemst.params import load

ROOT = Path(__file__).parents[2]
COPY = (
    "for out in validated quarantine validation; do mkdir -p artifacts/$out; cp artifacts/tables/* artifacts/$out; done"
)
FIRST, GROWN = range(60), range(75)


def write_logs(folder: Path, days: range) -> None:
    """One file of events per day; item `new` is met from day 60 on."""
    (folder / "events").mkdir(parents=True, exist_ok=True)
    for day in days:
        item = "new" if day >= 60 else f"i{day % 4}"
        rows = [f"u{day % 7},{item},2024-0{1 + day // 28}-{1 + day % 28:02},{'soap' if day % 2 else ''}\n"]
        rows += ["u,gone,2024-01-01,\n"] * 2  # of an unknown item, and given twice
        content = "user_id,item_id,timestamp,query\n" + "".join(rows)
        (folder / "events" / f"{day:03}.csv").write_text(content)
    items = ["i0", "i1", "i2", "i3", "new"]
    (folder / "items.csv").write_text("item_id,title\n" + "".join(f"{item},Thing {item}\n" for item in items))


def git(*arguments: str) -> None:
    who = ["-c", "user.name=gemst", "-c", "user.email=gemst@localhost", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *who, *arguments], check=True, capture_output=True)


def dvc(*arguments: str) -> None:
    """DVC in the working directory, without the second it takes to start it."""
    assert dvc_main([*arguments, "--quiet"]) == 0, arguments


def bytes_of(folder: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found
    return found


@pytest.fixture(scope="module")
def clones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`first` has version one and pulled version two from `second`, which had pulled version one and grown the logs.

    The stages and their parameters are the project's own; validation alone is a copy, to spare two starts of Great
    Expectations.
    """
    root = tmp_path_factory.mktemp("versions")
    first, second = root / "first", root / "second"
    first.mkdir()
    graph = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    graph = {name: graph[name] for name in ("ingest", "validate", "split")}
    graph["validate"]["cmd"] = COPY
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["data"] |= {"source": "table", "path": "data/logs"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.chdir(first)
        write_logs(first / "data" / "logs", FIRST)
        (first / "dvc.yaml").write_text(yaml.safe_dump({"stages": graph}))
        (first / "params.yaml").write_text(yaml.safe_dump(params))
        (first / "data.dvc").write_text("outs:\n- path: data\n")
        (first / ".gitignore").write_text("/data\n/artifacts\n")
        git("init", "--initial-branch", "main")
        dvc("init")
        dvc("remote", "add", "--default", "local", str(root / "remote"))
        publish("version one")
        git("clone", str(first), str(second))
        patch.chdir(second)
        dvc("pull")
        assert bytes_of(second / "data") == bytes_of(first / "data")
        assert outputs(second) == outputs(first)
        write_logs(second / "data" / "logs", GROWN)
        publish("version two")
        patch.chdir(first)
        git("pull", str(second))
        dvc("pull")
    return root


def publish(message: str) -> None:
    """What a person or the flow does with new logs: their version, the stages, the pointers to git, the bytes away."""
    dvc("commit", "--force", "data.dvc")
    dvc("repro")
    git("add", ".")
    git("commit", "--message", message)
    dvc("push")


def outputs(clone: Path) -> dict[str, bytes]:
    """The stages' outputs; summaries hold seconds and stay where they were made."""
    return {name: data for name, data in bytes_of(clone / "artifacts").items() if not name.startswith("summaries")}


def test_what_one_clone_pushes_another_pulls_byte_for_byte(clones):
    assert bytes_of(clones / "first" / "data") == bytes_of(clones / "second" / "data")
    assert outputs(clones / "first") == outputs(clones / "second")
    assert "examples/train.parquet" in outputs(clones / "first")


def test_nothing_is_stale_after_a_pull(clones, monkeypatch, capsys):
    monkeypatch.chdir(clones / "first")
    assert dvc_main(["status"]) == 0
    assert "up to date" in capsys.readouterr().out


def test_grown_logs_give_the_bytes_of_an_ingest_from_scratch(clones, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    write_logs(tmp_path / "data" / "logs", GROWN)
    shutil.copy(clones / "second" / "params.yaml", tmp_path)
    stages.ingest(load())
    assert bytes_of(tmp_path / "artifacts" / "tables") == bytes_of(clones / "second" / "artifacts" / "tables")


def test_diff_against_a_revision_that_only_the_remote_has(clones, monkeypatch, tmp_path):
    git("clone", str(clones / "second"), str(tmp_path / "third"))
    monkeypatch.chdir(tmp_path / "third")
    dvc("pull")
    shown = CliRunner().invoke(cli.app, ["data", "diff", "HEAD~1"])
    assert shown.exit_code == 0, shown.output
    said = {" ".join(line.split()) for line in shown.stdout.splitlines()}
    assert {"events 61 -> 76", "new events 15", "new items 0", "events of new items 0", "new users 0"} <= said
    assert {"newest 2024-03-04T00:00:00.000+00:00 -> 2024-03-19T00:00:00.000+00:00", "gone events 0"} <= said
    assert any(re.match(r"drift of item_id 0\.[0-9]*[1-9]", line) for line in said)
    with pytest.raises(cli.GemstError, match=r"no tables at revision 'nowhere'"):
        CliRunner().invoke(cli.app, ["data", "diff", "nowhere"], catch_exceptions=False)

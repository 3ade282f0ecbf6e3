"""The command line: help that teaches, one line for what can be mended, the right exit status."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest
from safetensors import SafetensorError
from typer.testing import CliRunner

from gemst import cli, show, stages, upkeep
from gemst.progress import Summary
from gemst.serving import champion

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = [
    "fetch", "ingest", "validate", "split", "tokenize", "item-rows", "null-space", "tune", "evaluate", "register",
    "append", "recommend", "search", "compare",
]  # fmt: skip


def gemst(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as a user runs it."""
    environment = os.environ | {"COLUMNS": "120", "NO_COLOR": "1"}
    return subprocess.run(
        [sys.executable, "-m", "gemst.cli", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "params.yaml").write_text("seed: 7\n")
    return tmp_path


def test_help_names_every_command_and_their_order(project):
    shown = gemst("--help", cwd=project)
    assert shown.returncode == 0
    places = [shown.stdout.index(f"│ {name} ") for name in COMMANDS]
    assert places == sorted(places)
    assert "--set tuning.rank=32" in shown.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_parameters(name):
    shown = CliRunner().invoke(cli.app, [name, "--help"], env={"COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"})
    assert "--set" in shown.stdout
    assert "--params" in shown.stdout
    assert "NAME=VALUE" in shown.stdout


def test_help_loads_nothing_heavy(project):
    code = (
        "import sys; from gemst import cli; sys.argv = ['gemst', '--help']\n"
        "try: cli.main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'polars', 'mlflow', 'numpy', 'pydantic', 'great_expectations', 'prefect'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=project, stdout=subprocess.DEVNULL, timeout=60).returncode == 0
    )


@pytest.mark.parametrize("name", [n for n in COMMANDS if n not in ("recommend", "search", "compare")])
def test_a_stage_command_is_its_stage_with_the_overrides(name, project, monkeypatch):
    monkeypatch.chdir(project)
    seen = []
    room = upkeep if name == "append" else stages
    monkeypatch.setattr(room, name.replace("-", "_"), lambda config: seen.append(config) or Summary(name))
    shown = CliRunner().invoke(cli.app, [name, "--set", "tuning.rank=32", "--set", "seed=9"])
    assert shown.exit_code == 0, shown.output
    assert (seen[0].tuning.rank, seen[0].seed) == (32, 9)


def test_results_are_a_table_of_tabs_in_a_pipe(project, monkeypatch):
    monkeypatch.chdir(project)
    asked = []
    frame = pl.DataFrame({"rank": [1], "item_id": ["5"], "title": ["Heat"], "score": [-1.5]})
    monkeypatch.setattr(champion, "search", lambda config, user, query, k: asked.append((user, query, k)) or frame)
    shown = CliRunner().invoke(cli.app, ["search", "--user", "196", "--k", "3", "a comedy"])
    assert asked == [("196", "a comedy", 3)]
    assert shown.stdout == "rank\titem_id\ttitle\tscore\n1\t5\tHeat\t-1.5\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tune", "--set", "tuning.rnk=3"], "gemst: params.yaml: tuning.rnk is not a parameter (did you mean 'rank'?)"),
        (["tune", "--set", "tuning.rank=-1"], "tuning.rank = -1"),
        (["tune", "--params", "none.yaml"], "gemst: none.yaml is no file. Run gemst in a project folder"),
        (["ingest"], "gemst: data.path = data/ml-100k is not a folder. Set it to the raw logs, or run `gemst fetch`"),
        (["validate"], "gemst: artifacts/tables/items.parquet does not exist. Run `gemst ingest` first"),
        (["split"], "Run `gemst validate` first"),
        (["tokenize"], "Run `gemst validate` first"),
        (["null-space"], "gemst: data/wikipedia/articles.parquet does not exist. Run `gemst fetch` first"),
        (["tune"], "Run `gemst validate` first"),
        (["evaluate"], "Run `gemst tune` first"),
        (["register"], "Run `gemst evaluate` first"),
        (["append"], "Run `gemst validate` first"),
        (["recommend", "--user", "1"], "Run `gemst validate` first"),
        (["search", "--user", "1", " "], "gemst: the query is empty"),
        (["compare", "nobody", "nothing"], "gemst: 'nobody' names no evaluated run"),
    ],
)
def test_what_can_be_mended_is_one_line_and_status_1(project, arguments, said):
    ended = gemst(*arguments, cwd=project)
    assert ended.returncode == 1
    assert said in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert ended.stdout == ""
    assert not (project / "artifacts").exists()


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["search", "comedy"], ["tune", "--rank", "3"], ["recommend", "--user"]]
)
def test_wrong_usage_is_status_2(project, arguments):
    ended = gemst(*arguments, cwd=project)
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr


@pytest.fixture
def versions(project: Path) -> Path:
    """A DVC project with two versions of the tables: one user in the first commit, two users now."""
    from gemst.data import tables

    items = pl.DataFrame(
        {"item_id": ["1"], "title": ["Heat"], "text": [None], "categories": [["crime"]]},
        schema=tables.ITEMS,
    )
    (project / "dvc.yaml").write_text(
        "stages:\n  v:\n    cmd: 'true'\n    outs: [{artifacts/validated: {persist: true}}]\n"
    )
    run = {"cwd": project, "check": True, "stdout": subprocess.DEVNULL, "env": os.environ | {"DVC_NO_ANALYTICS": "1"}}
    subprocess.run(["git", "init", "-q"], **run)
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], **run)
    for users in (["a"], ["a", "b"]):
        events = pl.DataFrame(
            {
                "user_id": users, "item_id": ["1"] * len(users), "timestamp": [0] * len(users),
                "task": ["recommendation"] * len(users), "query": [None] * len(users),
                "request_id": [None] * len(users), "shown": [None] * len(users),
            },
            schema=tables.EVENTS,
        )  # fmt: skip
        tables.write_items(items, project / "artifacts/validated/items.parquet")
        tables.write_events(events, project / "artifacts/validated/events.parquet")
        if users == ["a"]:
            subprocess.run([sys.executable, "-m", "dvc", "commit", "-q", "-f"], **run)
            subprocess.run(["git", "add", "."], **run)
            subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "x"], **run)
    return project


def test_data_diff_takes_a_revision_or_a_folder(versions):
    ended = gemst("data", "diff", "HEAD", cwd=versions)
    assert ended.returncode == 0, ended.stderr
    assert "new users" in ended.stdout
    counts = {line[:24].strip(): line[24:].split() for line in ended.stdout.splitlines()}
    assert counts["new users"] == ["1"]
    assert counts["gone users"] == ["0"]
    same = gemst("data", "diff", "artifacts/validated", cwd=versions)
    assert {line[:24].strip(): line[24:].split() for line in same.stdout.splitlines()}["new users"] == ["0"]
    unknown = gemst("data", "diff", "nowhere", cwd=versions)
    assert unknown.returncode == 1
    assert unknown.stderr.startswith("gemst: no tables at revision 'nowhere'")
    assert unknown.stderr.count("\n") == 1


def test_data_report_is_one_page(versions):
    ended = gemst("data", "report", "--out", "page.html", cwd=versions)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "page.html\n"
    assert "<html" in (versions / "page.html").read_text()


def test_an_empty_table_is_one_line(project):
    folder = project / "data" / "ml-100k"
    folder.mkdir(parents=True)
    (folder / "ml-100k.inter").write_text("user_id:token\titem_id:token\trating:float\ttimestamp:float\n")
    (folder / "ml-100k.item").write_text("item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n")
    ended = gemst("ingest", cwd=project)
    if ended.returncode == 0:
        ended = gemst("validate", cwd=project)
    assert ended.returncode == 1
    assert ended.stderr.startswith("gemst: ")
    assert ended.stderr.count("\n") == 1


def test_a_full_disk_is_one_line(project, monkeypatch, capsys):
    monkeypatch.chdir(project)

    def full(config):
        raise OSError(28, "No space left on device", "artifacts/tables/items.parquet")

    monkeypatch.setattr(stages, "ingest", full)
    monkeypatch.setattr(sys, "argv", ["gemst", "ingest"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert (
        capsys.readouterr().err
        == "gemst: artifacts/tables/items.parquet: No space left on device. Make room or allow writing there\n"
    )


@pytest.mark.parametrize("kind", [pl.exceptions.ComputeError, SafetensorError])
def test_a_full_disk_is_one_line_whichever_library_met_it(project, monkeypatch, capsys, kind):
    def full(config):
        raise kind("I/O error: No space left on device (os error 28)")

    monkeypatch.chdir(project)
    monkeypatch.setattr(stages, "ingest", full)
    monkeypatch.setattr(sys, "argv", ["gemst", "ingest"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert capsys.readouterr().err == "gemst: the disk: No space left on device. Make room there\n"


def test_brackets_of_titles_and_queries_are_shown_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    show.table(pl.DataFrame({"title": ["Kind of Blue [vinyl]", "[unknown]"]}), "Found for '[/b]'")
    shown = capsys.readouterr().out
    assert "Kind of Blue [vinyl]" in shown
    assert "[unknown]" in shown
    assert "[/b]" in shown


def test_ctrl_c_ends_without_a_traceback(project):
    (project / "gate.py").write_text(
        "import sys, time\nfrom gemst import cli, stages\n"
        "def slow(config):\n    print('started', flush=True)\n    time.sleep(60)\n"
        "stages.ingest = slow\nsys.argv = ['gemst', 'ingest']\ncli.main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "gate.py"], cwd=project, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=100)
    assert process.returncode != 0
    assert "Traceback" not in errors

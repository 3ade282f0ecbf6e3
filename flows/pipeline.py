"""The whole chain as one Prefect flow: `make demo`, or a deployment of prefect.yaml.

Every stage of dvc.yaml is one task, in the file's order. A task hands its stage to DVC, which knows what is stale;
a stage with nothing to do ends in the state "Unchanged". There is no second cache here.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import yaml
from prefect import Task, flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.states import Completed, Failed

from flows import data_docs, server
from flows.alone import alone
from flows.commands import Outcome, run
from gemst import assets, layout, params
from gemst.errors import GemstError
from gemst.files import read_json
from gemst.progress import duration, summary_path
from gemst.stopping import stop_cleanly

UNCHANGED = "Unchanged"
RESTORED = "Restored"

# What another attempt can mend: the network, and another DVC at work in this folder (its lock while it plans, those of
# single files while a stage runs). Nothing else is tried again.
_LOCKED = ("Unable to acquire lock", "is busy, it is being blocked by")
_PASSING = ("cannot be downloaded", *_LOCKED)


def _may_pass(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    return any(sign in (state.message or "") for sign in _PASSING)


def _settled(outcome: Outcome, unchanged: bool, name: str = "Completed") -> State[Any]:
    """The state a command's end stands for. A failure is returned, not raised: its message says it all."""
    if outcome.status != 0:
        locked = next((line for line in outcome.lines if any(sign in line for sign in _LOCKED)), None)
        return Failed(message=locked or outcome.reason)
    return Completed(name=UNCHANGED if unchanged else name, message="nothing to do" if unchanged else None)


@task(
    name="fetch", task_run_name="fetch", cache_policy=NO_CACHE, persist_result=False,
    retries=2, retry_delay_seconds=[5, 30], retry_condition_fn=_may_pass,
)  # fmt: skip
def fetch() -> State[Any]:
    """`gemst fetch`, then DVC's cache: `dvc push` passes the data on, data.dvc says which version it is."""
    say = get_run_logger().info
    outcome = run("gemst.cli", "fetch", say=say)
    unchanged = outcome.status == 0 and set(_summary("fetch").get("written", {}).values()) == {assets.UNCHANGED}
    if outcome.status == 0 and Path("data.dvc").exists():
        if missing := _fewer_files_than_named():
            return Failed(message=missing)
        outcome = run("dvc", "commit", "--force", "data.dvc", say=say)
    return _settled(outcome, unchanged)


def _fewer_files_than_named() -> str | None:
    """Why data/ must not become the new version: on a fresh clone a team's logs are still to be pulled."""
    named = int(yaml.safe_load(Path("data.dvc").read_text(encoding="utf-8"))["outs"][0].get("nfiles", 0))
    held = sum(len(files) for _, _, files in os.walk("data", followlinks=True))  # logs may be links to elsewhere
    if held >= named:
        return None
    return (
        f"data/ holds {held} files where data.dvc names a version of {named}. Run `dvc pull data.dvc`; if files were "
        "taken away on purpose, run `dvc commit --force data.dvc`"
    )


@task(
    name="stage", task_run_name="{stage}", cache_policy=NO_CACHE, persist_result=False,
    retries=3, retry_delay_seconds=10, retry_condition_fn=_may_pass,
)  # fmt: skip
def run_stage(stage: str) -> State[Any]:
    """One stage of dvc.yaml, run by DVC if it is stale."""
    outcome = run("dvc", "repro", "--single-item", stage, say=get_run_logger().info)
    said = "\n".join(outcome.lines)
    restored = f"Stage '{stage}' is cached" in said
    return _settled(outcome, f"Stage '{stage}' didn't change" in said, RESTORED if restored else "Completed")


@task(name="register", task_run_name="register", cache_policy=NO_CACHE, persist_result=False)
def register() -> State[Any]:
    """`gemst register`: the run and the model version in MLflow, the champion moved if it is beaten."""
    before = _summary("register").get("written")
    outcome = run("gemst.cli", "register", say=get_run_logger().info)
    return _settled(outcome, _summary("register").get("written") == before)


@flow(name="pipeline", flow_run_name="pipeline", retries=0, persist_result=False)
def pipeline() -> State[Any]:
    """From the package index and the logs to a registered model.

    Reads params.yaml in the working directory. Ends as Failed at the first stage that fails, with its one-line reason;
    outputs of the stages before it stay.
    """
    try:
        params.load()
    except GemstError as error:
        return Failed(message=str(error))
    # DVC's locks keep two runs of one stage apart, not one run's results from another's model.
    with alone(layout.ARTIFACTS / ".pipeline.lock", "another pipeline", get_run_logger().info):
        return _chain()


def _chain() -> State[Any]:
    states: dict[str, str] = {}
    for name in ("fetch", *stages(), "register"):
        step = {"fetch": fetch, "register": register}.get(name)
        state = step(return_state=True) if step else run_stage(name, return_state=True)
        if name == "validate":
            data_docs.publish(state.is_completed())
        if not state.is_completed():
            return Failed(message=f"{name}: {state.message}")
        states[name] = state.name or ""
    publish(states)
    return Completed(message=_registered(), data=states)


def stages(path: Path = Path("dvc.yaml")) -> list[str]:
    """The names of dvc.yaml's stages, in the file's order."""
    return list(yaml.safe_load(path.read_text(encoding="utf-8"))["stages"])


def publish(states: dict[str, str]) -> None:
    """The results as artefacts of the flow run: the measured table, what each stage cost, where the pages lie."""
    results, costs = result_rows(), cost_rows(states)
    pages = {
        "Evaluation report": layout.EVALUATION / "report.html",
        "Data Docs": layout.VALIDATION / "docs" / "index.html",
    }
    links = "\n".join(f"- [{name}]({path.resolve().as_uri()})" for name, path in pages.items() if path.exists())
    markdown = f"# {_registered()}\n\n{_markdown(results)}\n\n## Stages\n\n{_markdown(costs)}\n\n{links}\n"
    create_markdown_artifact(markdown, key="results", description="NDCG@10 over the full catalogue, and what it took")
    create_table_artifact(results, key="ndcg-at-10", description="NDCG@10 over the full catalogue, test examples")


def result_rows() -> list[dict[str, Any]]:
    """One row per ranker with its NDCG@10 per task, the model first, as metrics.json has them."""
    metrics = read_json(layout.EVALUATION / "metrics.json")
    rankers = {"gemst": metrics["model"]} | metrics["references"]
    tasks = ("recommendation", "search")
    return [
        {"ranker": name} | {task: round(scores[task]["ndcg@10"], 4) for task in tasks if task in scores}
        for name, scores in rankers.items()
    ]


def cost_rows(states: dict[str, str]) -> list[dict[str, Any]]:
    """One row per stage with how it ended, and the time and memory of the run that made its outputs."""
    rows = []
    for stage, state in states.items():
        summary = _summary(stage)
        cost = {"took": duration(summary["seconds"]), "peak memory": f"{summary['peak_mib']:,} MiB"} if summary else {}
        rows.append({"stage": stage, "state": state} | cost)
    return rows


def _summary(stage: str) -> dict[str, Any]:
    path = summary_path(stage)
    summary: dict[str, Any] = read_json(path) if path.exists() else {}
    return summary


def _registered() -> str:
    notes: list[str] = _summary("register").get("notes", [])
    return notes[0] if notes else "nothing is registered"


def _columns(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(column for row in rows for column in row))


def _markdown(rows: list[dict[str, Any]]) -> str:
    columns = _columns(rows)
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(str(row.get(column, "")) for column in columns) + " |" for row in rows])


def show(states: dict[str, str]) -> None:
    """The closing tables and the registered version, on the terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for title, rows in (("Stages", cost_rows(states)), ("NDCG@10, full catalogue, test examples", result_rows())):
        table = Table(title=title, title_justify="left")
        columns = _columns(rows)
        for column in columns:
            table.add_column(column, justify="right" if isinstance(rows[0].get(column), float) else "left")
        for row in rows:
            values = (row.get(column, "") for column in columns)
            table.add_row(*(f"{value:.4f}" if isinstance(value, float) else str(value) for value in values))
        console.print(table)
    console.print(_registered(), highlight=False, soft_wrap=True)


def main() -> int:
    """Run the flow here and now; its API is the one of PREFECT_API_URL or a server that lives as long as the flow."""
    argparse.ArgumentParser(prog="python -m flows.pipeline", description=__doc__).parse_args()
    stop_cleanly()
    if server.away("pipeline"):
        return 1
    state: State[Any] = pipeline(return_state=True)
    if not state.is_completed():
        print(f"pipeline: {state.message}", file=sys.stderr)
        return 1
    show(state.result())
    return 0


if __name__ == "__main__":
    sys.exit(main())

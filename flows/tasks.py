"""The tasks of the flows: a stage that DVC runs, and the commands beside DVC, as children whose output is streamed.

A task with nothing to do ends in the state "Unchanged". A failure is a state with its one-line reason.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from prefect import Task, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.states import Completed, Failed

from flows import data_docs
from flows.commands import Outcome, run
from gemst import assets, layout
from gemst.files import read_json
from gemst.progress import summary_path

# Flows that change the artefacts of one folder hold this, one at a time.
LOCK, OTHERS = layout.ARTIFACTS / ".pipeline.lock", "another pipeline or refresh"

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
    unchanged = outcome.status == 0 and set(summary("fetch").get("written", {}).values()) == {assets.UNCHANGED}
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
    before = summary("register").get("written")
    outcome = run("gemst.cli", "register", say=get_run_logger().info)
    return _settled(outcome, summary("register").get("written") == before)


@task(name="append", task_run_name="append", cache_policy=NO_CACHE, persist_result=False)
def append() -> State[Any]:
    """`gemst append`: the champion with today's items and counts, as a version in its place."""
    outcome = run("gemst.cli", "append", say=get_run_logger().info)
    return _settled(outcome, "version" not in summary("append").get("written", {}))


def chain(names: Iterable[str]) -> tuple[dict[str, str], str | None]:
    """Run these stages and commands in turn: how each ended, up to the first that failed, and why that one did."""
    states: dict[str, str] = {}
    for name in names:
        step = {"fetch": fetch, "register": register, "append": append}.get(name)
        state = step(return_state=True) if step else run_stage(name, return_state=True)
        if name == "validate":
            data_docs.publish(state.is_completed())
        if not state.is_completed():
            return states, f"{name}: {state.message}"
        states[name] = state.name or ""
    return states, None


def summary(stage: str) -> dict[str, Any]:
    """What a stage or command said of its last run: read, written, notes, seconds, peak_mib; empty before the first."""
    path = summary_path(stage)
    told: dict[str, Any] = read_json(path) if path.exists() else {}
    return told

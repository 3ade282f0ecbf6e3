"""The whole chain as one Prefect flow: `make demo`, or a deployment of prefect.yaml.

Every stage of dvc.yaml is one task, in the file's order. A task hands its stage to DVC, which knows what is stale;
a stage with nothing to do ends in the state "Unchanged". There is no second cache here.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml
from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from flows import server
from flows.alone import alone
from flows.tasks import LOCK, OTHERS, chain, summary
from gemst import layout, params
from gemst.errors import GemstError
from gemst.files import read_json
from gemst.progress import duration
from gemst.stopping import stop_cleanly


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
    with alone(LOCK, OTHERS, get_run_logger().info):
        return _chain()


def _chain() -> State[Any]:
    states, failed = chain(("fetch", *stages(), "register"))
    if failed:
        return Failed(message=failed)
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
        told = summary(stage)
        cost = {"took": duration(told["seconds"]), "peak memory": f"{told['peak_mib']:,} MiB"} if told else {}
        rows.append({"stage": stage, "state": state} | cost)
    return rows


def _registered() -> str:
    notes: list[str] = summary("register").get("notes", [])
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

"""Methods x seeds x data sets, as one Prefect flow: `python -m flows.compare --help`.

Which cells there are is data, in configs/study.yaml. A cell that has a result is not run again, one that was stopped
goes on, one that fails does not stop the others.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from flows import server
from flows.alone import alone
from flows.cells import run_cell
from gemst import params
from gemst.errors import GemstError
from gemst.evaluation import study as studies
from gemst.evaluation import study_page
from gemst.evaluation.study import Cell, Study
from gemst.evaluation.study_figure import quality_and_drift
from gemst.files import atomic_file
from gemst.progress import duration
from gemst.registry.runs import study_run
from gemst.stopping import stop_cleanly

STUDY = Path("configs/study.yaml")

_HELP = """Compare ways to tune, on the cells of a study (configs/study.yaml): methods x seeds x data sets.

Each cell runs the real stages (tune, evaluate, register) in a folder of its own under artifacts/study, over prepared
data, identifiers and null spaces that are made once; spends the study's token budget; and leaves a small JSON and its
scores by query under benchmarks/results/study, a run under the study's run in MLflow, and its report in its folder.
First come every method's trials, judged on validation; then the chosen settings with every seed.

A cell that has a result with the same parameters is not run again, so a stopped study goes on where it was:

  python -m flows.compare --list                             what is done, what is next
  python -m flows.compare                                    everything (hours to days without a GPU)
  python -m flows.compare --only 'ml-100k/gems/*' --minutes 60
  python -m flows.compare --path lastfm-2k=~/hetrec2011-lastfm-2k
  python -m flows.compare --table                            the tables of what there is, as the study's page
  gemst compare artifacts/study/ml-100k/full/lr=0.0001,seed=7/artifacts/evaluation RUN_ID

To look at the runs: make ui, experiment "study", select all, Compare."""


@task(name="cell", task_run_name="{name}", cache_policy=NO_CACHE, persist_result=False)
def run_one(study: Study, cell: Cell, paths: dict[str, Path], parent: str, name: str) -> State[Any]:
    """One cell; a failure is a state with the reason, not an exception."""
    try:
        found = run_cell(study, cell, paths, parent, get_run_logger().info)
    except GemstError as error:
        return Failed(message=str(error))
    return Completed(message=_line(found))


@flow(name="compare", flow_run_name="compare", retries=0, persist_result=False)
def compare(
    study: str = str(STUDY),
    only: list[str] | None = None,
    max_cells: int | None = None,
    minutes: float | None = None,
    paths: dict[str, str] | None = None,
) -> State[Any]:
    """Run the cells of a study that have no result yet.

    `only` are patterns of cell names; no cell starts after `max_cells` of them or `minutes`; `paths` says where data
    sets lie when not where the study says. Ends as Failed when a cell failed, after all others have been run.
    """
    say = get_run_logger().info
    began, states, failed = time.monotonic(), dict[str, str](), dict[str, str]()
    try:
        whole = studies.read(Path(study))
        places = {name: Path(path).expanduser() for name, path in (paths or {}).items()}
        check_patterns(whole, only)
        absent = away(whole, places)
        for name, where in absent.items():
            say(f"{name} is skipped: {where} does not exist. Give its folder with --path {name}=FOLDER")
        own = params.load(whole.base, [f"registry.experiment={whole.name}"])
        with alone(whole.work / ".lock", "another run of this study", say):  # both would take the same cell
            parent = study_run(own, Path(study))
            while (cell := following(whole, only, absent, states)) is not None:
                spent = (time.monotonic() - began) / 60
                if (max_cells is not None and len(states) >= max_cells) or (minutes is not None and spent >= minutes):
                    break
                state = run_one(whole, cell, places, parent, cell.name, return_state=True)
                states[cell.name] = state.name or ""
                if not state.is_completed():
                    failed[cell.name] = str(state.message)
        left = studies.missing(whole)
    except GemstError as error:
        return Failed(message=str(error))
    if states:
        rows = [{"cell": name, "state": state, "why": failed.get(name, "")} for name, state in states.items()]
        create_table_artifact(rows, key="study", description="The cells this run worked on")
    told = f"{len(states) - len(failed)} cells run, {left} of the tables' cells still without a result"
    if failed:
        reasons = "; ".join(f"{name}: {why}" for name, why in failed.items())
        return Failed(message=f"{told}; {len(failed)} failed: {reasons}")
    return Completed(message=told)


def following(study: Study, only: list[str] | None, absent: dict[str, Path], tried: dict[str, str]) -> Cell | None:
    """The next cell without a result that can be run and has not been tried."""
    for cell in studies.plan(study, only):
        if cell.data not in absent and cell.name not in tried and studies.result(study, cell) is None:
            return cell
    return None


def check_patterns(study: Study, only: list[str] | None) -> None:
    """Raises GemstError for a pattern that no cell matches: misspelt, or its trials are not done."""
    for pattern in only or []:
        if next(studies.plan(study, [pattern]), None) is None:
            raise GemstError(
                f"--only {pattern}: no cell is called so by now",
                "--list has their names; a method's cells appear once its trials have all been run",
            )


def away(study: Study, paths: dict[str, Path]) -> dict[str, Path]:
    """Data sets whose folder is not there. Raises GemstError for a path of a data set the study does not know."""
    unknown = sorted(set(paths) - set(study.data))
    if unknown:
        raise GemstError(f"--path {unknown[0]}: the study has no such data set", f"It has {', '.join(study.data)}")
    given = params.load(study.base).data.path
    folders = {name: paths.get(name, Path(settings.get("data.path", given))) for name, settings in study.data.items()}
    return {name: folder for name, folder in folders.items() if not folder.exists()}


def _line(found: dict[str, Any]) -> str:
    """A cell's result as one line."""
    scores = found.get("test", {})
    tested = ", ".join(f"{name} {by['ndcg@10']:.4f}" for name, by in scores.items() if isinstance(by, dict))
    told = [f"validation {found['valid']['joint']:.4f}", f"NDCG@10 {tested}" if tested else ""]
    if "drift" in found:
        told.append(f"perplexity {found['drift']['rise']:+.2%}")
    told.append(f"tuned in {duration(found['seconds']['tune'])}")
    return ", ".join(part for part in told if part)


def listing(study: Study, only: list[str] | None, absent: dict[str, Path]) -> str:
    """Every cell that is known by now, and what it gave."""
    lines, counts = [], Counter[str]()
    for cell in studies.plan(study, only):
        found = studies.result(study, cell)
        state = "done" if found else "no data" if cell.data in absent else "waits"
        counts[state] += 1
        lines.append(f"{state:<8} {cell.name}  {_line(found) if found else ''}".rstrip())
    lines.append(", ".join(f"{count} {state}" for state, count in counts.items()))
    return "\n".join([*lines, "Cells of a method appear once its trials have all been run."])


def write_page(study: Study, path: Path) -> None:
    """Write the page of the study in the file `path`. Raises GemstError when a result cannot be read."""
    command = "python -m flows.compare" if path == STUDY else f"python -m flows.compare {path.as_posix()}"
    figures = {}
    for key, table in study.tables.items():
        for data in table.data if table.figure else []:
            if drawn := quality_and_drift(study, table, data):
                figures[key, data] = f"images/{study.name}-{key}-{data}.svg"
                with atomic_file(study.page.parent / figures[key, data]) as temporary:
                    temporary.write_text(drawn, encoding="utf-8")
    text = study_page.markdown(study, command, figures)
    with atomic_file(study.page) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(study.page)


def main() -> int:
    """Run the study here and now."""
    stop_cleanly()
    parser = argparse.ArgumentParser(
        prog="python -m flows.compare", description=_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", nargs="?", type=Path, default=STUDY, help=f"the study, {STUDY} by default")
    parser.add_argument(
        "--only", action="append", metavar="PATTERN", help="cells by name, such as 'ml-100k/*'; may be given again"
    )
    parser.add_argument("--max-cells", type=int, metavar="N", help="start no more than N cells")
    parser.add_argument("--minutes", type=float, metavar="M", help="start no cell after M minutes")
    parser.add_argument("--path", action="append", default=[], metavar="DATA=FOLDER", help="where a data set lies")
    parser.add_argument("--list", action="store_true", help="print every cell and what it gave; run nothing")
    parser.add_argument("--table", action="store_true", help="write the page of what there is; run nothing")
    given = parser.parse_args()
    for text in given.path:
        if "=" not in text:
            parser.error(f"--path {text}: write DATA=FOLDER, such as lastfm-2k=~/hetrec2011-lastfm-2k")
    paths = {name: str(Path(path).expanduser()) for name, path in (text.split("=", 1) for text in given.path)}
    if given.list or given.table:
        try:
            whole = studies.read(given.study)
            if given.list:
                check_patterns(whole, given.only)
                print(listing(whole, given.only, away(whole, {name: Path(one) for name, one in paths.items()})))
            if given.table:
                write_page(whole, given.study)
        except GemstError as error:
            print(f"compare: {error}", file=sys.stderr)
            return 1
        return 0
    if server.away("compare"):
        return 1
    state: State[Any] = compare(str(given.study), given.only, given.max_cells, given.minutes, paths, return_state=True)
    print(f"compare: {state.message}", file=sys.stdout if state.is_completed() else sys.stderr)
    return 0 if state.is_completed() else 1


if __name__ == "__main__":
    sys.exit(main())

"""A cell of a study: the real stages in a folder of its own, over prepared stages that cells with equal settings share.

What a stage before tuning depends on is read from dvc.yaml: its parameters and the stages whose outputs it reads. Two
cells that agree on those read one folder, `shared/<stage>-<key>`; nothing is computed twice. Everything there is made
with the base seed, so that all seeds of a study see the same examples and identifiers.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from flows.commands import run
from gemst import layout, params
from gemst.config import Config
from gemst.errors import GemstError
from gemst.evaluation.study import HEADLINE, Cell, Study, queries_path, result_path
from gemst.files import atomic_file, read_json, sha256, write_json
from gemst.provenance import code_tags, machine
from gemst.registry.runs import name_cell
from gemst.registry.store import address

Say = Callable[[str], None]
PREPARED = ("ingest", "validate", "split", "tokenize", "item-rows", "null-space")

# Parameters that name a file or folder: linked into the cell's own folder under the same relative name.
_PATHS = ("data.path", "backbone.name", "item_ids.encoder", "item_ids.extends", "null_space.corpus")
_RAW = {"data.path", "null_space.corpus"}  # those whose files people replace under the same name


def run_cell(study: Study, cell: Cell, paths: dict[str, Path], parent: str, say: Say) -> dict[str, Any]:
    """Run one cell and write its JSON; returns it.

    `paths` says where data sets lie (name -> folder) when not where the study says; `parent` is the MLflow run the
    cell is shown under. Raises GemstError with the reason when a stage fails; what it has done so far stays, and the
    next call goes on from its last checkpoint.
    """
    folder = study.work / cell.name
    base = params.load(study.base, [f"registry.experiment={json.dumps(study.name)}"]).registry
    own = {"experiment": base.experiment, "model_name": None, "run_name": cell.name, "parent": parent}
    full = cell.config.model_copy(update={"registry": base.model_copy(update=own)})
    seed = params.load(study.base).seed
    prepared = full.model_copy(update={"seed": seed})
    for stage in stages_of(full):
        _prepare(study, stage, prepared, paths.get(cell.data), say)
    _furnish(study, folder, full, paths.get(cell.data), [(stage, prepared) for stage in stages_of(full)])
    made_of = {"params": full.model_dump(mode="json", exclude={"registry"})} | {
        stage: key(stage, prepared, paths.get(cell.data)) for stage in stages_of(full)
    }
    for stage in ("tune",) if cell.trial else ("tune", "evaluate", "register"):
        # A cell that failed after tuning has its model: only a change of its parameters or its data tunes again.
        if not (stage == "tune" and _tuned(folder, made_of)):
            _stage(stage, folder, say)
            if stage == "tune":
                write_json(folder / "tuned.json", made_of)
        if stage == "tune":  # again on a second try: the first may have failed right here
            run_id = read_json(folder / layout.TUNING / "run.json")["run_id"]
            name_cell(run_id, {"study.data": cell.data, "study.method": cell.method, "study.trial": str(cell.trial)})
    found = _result(study, cell, folder)
    if not cell.trial:
        with atomic_file(queries_path(study, cell)) as place:
            headline(pl.read_parquet(folder / layout.EVALUATION / "per_query.parquet")).write_parquet(place)
    write_json(result_path(study, cell), found)
    shutil.rmtree(folder / layout.MODEL, ignore_errors=True)
    return found


def stages_of(full: Config) -> list[str]:
    """The stages before tuning that a cell needs."""
    return [stage for stage in PREPARED if stage != "null-space" or full.null_space.rule != "none"]


def key(stage: str, full: Config, source: Path | None = None, graph: Path = Path("dvc.yaml")) -> str:
    """A hash of all a prepared stage depends on: parameters in dvc.yaml, raw files, the stages it reads from."""
    tree = yaml.safe_load(graph.read_text(encoding="utf-8"))["stages"]
    values = full.flat()
    named = tree[stage].get("params", [])
    mine = {
        name: value for name, value in values.items() if any(name == one or name.startswith(f"{one}.") for one in named)
    }
    for name in _RAW & mine.keys():
        origin = source if name == "data.path" and source is not None else Path(mine[name])
        mine[name] = _content(origin) if origin.exists() else str(origin)
    before = {other: key(other, full, source, graph) for other in _reads(stage, tree)}
    return hashlib.sha256(json.dumps([stage, mine, before], sort_keys=True).encode()).hexdigest()[:12]


def _content(origin: Path) -> list[list[str]]:
    """Names and hashes of a file, or of all files of a folder, those behind links too."""
    files = [origin]
    if origin.is_dir():
        files = sorted(path for path in _below(origin) if path.is_file())
    return [[path.relative_to(origin).as_posix(), _hashed(path, path.stat().st_mtime_ns)] for path in files]


def _below(origin: Path) -> Iterator[Path]:
    """All paths below a folder and below the folders its links lead to, each folder once."""
    met = set()
    for place, folders, names in os.walk(origin, followlinks=True):
        if (real := os.path.realpath(place)) in met:
            folders.clear()
            continue
        met.add(real)
        yield from (Path(place) / name for name in names)


@cache
def _hashed(path: Path, changed: int) -> str:
    """SHA-256 of a file as of `changed`: a study asks for the same one many times."""
    return sha256(path)


def _reads(stage: str, tree: dict[str, Any]) -> list[str]:
    """The prepared stages whose outputs a stage depends on."""
    deps = tree[stage].get("deps", [])
    return [
        other
        for other in PREPARED
        if other != stage and any(dep == out or dep.startswith(f"{out}/") for dep in deps for out in _outs(other, tree))
    ]


def _outs(stage: str, tree: dict[str, Any]) -> list[str]:
    return [next(iter(out)) if isinstance(out, dict) else out for out in tree[stage]["outs"]]


def _shared(study: Study, stage: str, full: Config, source: Path | None) -> Path:
    return study.work / "shared" / f"{stage}-{key(stage, full, source)}"


def _prepare(study: Study, stage: str, full: Config, source: Path | None, say: Say) -> None:
    """Run a stage before tuning in its shared folder, unless it has ended there before."""
    folder = _shared(study, stage, full, source)
    if (folder / "done.json").exists():
        return
    tree = yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8"))["stages"]
    _furnish(study, folder, full, source, [(other, full) for other in _reads(stage, tree)])
    _stage(stage, folder, say)
    write_json(folder / "done.json", full.model_dump(mode="json"))


def _furnish(study: Study, folder: Path, full: Config, source: Path | None, reads: list[tuple[str, Config]]) -> None:
    """A project folder: params.yaml, links to the inputs, links to the outputs of the stages `reads`."""
    folder.mkdir(parents=True, exist_ok=True)
    if source is not None and full.data.path.is_absolute():
        full = full.model_copy(update={"data": full.data.model_copy(update={"path": source.resolve()})})
    (folder / "params.yaml").write_text(yaml.safe_dump(full.model_dump(mode="json"), sort_keys=False))
    values = full.flat()
    for name in _PATHS:
        if values[name] is not None and not Path(values[name]).is_absolute():
            origin = source if name == "data.path" and source is not None else Path(values[name])
            if origin.exists():
                _link(folder / values[name], origin)
    tree = yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8"))["stages"]
    for stage, made_with in reads:
        for out in _outs(stage, tree):
            _link(folder / out, _shared(study, stage, made_with, source) / out)


def _link(place: Path, origin: Path) -> None:
    origin = origin.resolve()
    if place.resolve() == origin:  # linked before, or below a folder that is linked
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.is_symlink():
        place.unlink()
    place.symlink_to(origin)


def _stage(stage: str, folder: Path, say: Say) -> None:
    """One `gemst` command in a folder; its runs go to the project's MLflow database."""
    outcome = run("gemst.cli", stage, say=say, folder=folder, extra={"MLFLOW_TRACKING_URI": address()})
    if outcome.status != 0:
        raise GemstError(f"{stage}: {outcome.reason}")


def _tuned(folder: Path, made_of: dict[str, Any]) -> bool:
    """Whether the folder holds the model of these very parameters and prepared stages."""
    done = folder / "tuned.json"
    return done.exists() and (folder / layout.MODEL / "gemst.json").exists() and read_json(done) == made_of


def _result(study: Study, cell: Cell, folder: Path) -> dict[str, Any]:
    """What a cell leaves for the tables."""
    tuned = read_json(folder / layout.TUNING / "run.json")
    curves = pl.read_parquet(folder / layout.TUNING / "curves.parquet").filter(pl.col("name").str.starts_with("valid/"))
    best = curves.filter(name="valid/joint").sort("value", "step", descending=[True, False])["step"][0]
    by_step = {
        step: {name.removeprefix("valid/"): value for _, name, value in part.rows()}
        for (step,), part in curves.group_by("step", maintain_order=True)
    }
    summaries = {
        path.stem: read_json(path) for path in sorted((folder / layout.ARTIFACTS / "summaries").glob("*.json"))
    }
    seconds = {"per_step": tuned["seconds_per_step"]} | {name: one["seconds"] for name, one in summaries.items()}
    # A resumed stage tells its last process's seconds, tuning all of them.
    seconds["tune"] = max(seconds["tune"], tuned["seconds"])
    commit = code_tags()
    found = {
        "cell": cell.name, "data": cell.data, "method": cell.method, "seed": cell.seed, "trial": cell.trial,
        "params": cell.params,
        "valid": {**by_step[best], "step": best}, **({"start": by_step[0]["joint"]} if 0 in by_step else {}),
        "validations": [{"step": step, **values} for step, values in by_step.items()],
        "tokens": tuned["tokens"], "steps": tuned["steps"], "epochs": tuned["epochs"],
        "largest_leak": tuned["largest_leak"],
        "seconds": seconds,
        "peak_mib": {name: one["peak_mib"] for name, one in summaries.items()},
        "machine": machine(), "commit": commit.get("mlflow.source.git.commit"), "dirty": commit.get("git.dirty"),
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip
    if not cell.trial:
        metrics = read_json(folder / layout.EVALUATION / "metrics.json")
        shown = ("ndcg@10", "hit@10")
        found |= {
            "test": metrics["model"], "drift": metrics["drift"], "counts": metrics["counts"],
            "intervals": metrics["intervals"]["model"], "slices": metrics["slices"],
            "references": {
                name: {task: {at: by[at] for at in shown} for task, by in tasks.items() if isinstance(by, dict)}
                for name, tasks in metrics["references"].items()
            },
        }  # fmt: skip
    return found


def headline(per_query: pl.DataFrame) -> pl.DataFrame:
    """The model's NDCG@10 of every query over the full catalogue: what paired intervals of a study need."""
    columns = ("ranker", "protocol", "row", "user_id", "task", "timestamp", HEADLINE)
    return per_query.filter(ranker="model", protocol="full").select(columns).cast({HEADLINE: pl.Float32})

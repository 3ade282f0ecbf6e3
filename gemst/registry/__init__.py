"""MLflow: every run with its parameters, curves and results, every model version with its run.

The tuning stage logs live (`live`). Registering (`register`) is not a DVC stage, for DVC may restore outputs without
running anything; it finds the run that made the model, or makes one from the artefacts. In MLflow's metric names "@"
reads "_at_": test/search/ndcg_at_10.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemst import layout
from gemst.errors import GemstError
from gemst.files import read_json, require
from gemst.provenance import dvc_hashes, fingerprint, of_examples, of_model
from gemst.registry.runs import start_run
from gemst.registry.store import as_metrics, connect, explained, log_metrics, metric_name, summary_metrics
from gemst.registry.versions import (
    CHAMPION,
    EXAMPLES,
    FINGERPRINT,
    JOINT,
    JUDGED,
    Champion,
    Registered,
    Rescore,
    alias,
    champion,
    crown,
    new_version,
    role,
    succeed,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    from gemst.config import Config

__all__ = ["Champion", "LiveRun", "Registered", "champion", "live", "per_query", "register", "succeed"]

CURVES, VERSION = "gemst.curves", "gemst.version"  # tags of a run; VERSION is NAME/NUMBER

_FLUSH_EVERY = 2.0  # seconds between writes of live metrics
_FIRST_PAUSE, _LAST_PAUSE = 60.0, 900.0  # seconds after a write that failed; the pause doubles


class LiveRun:
    """A run that is going on.

    `log` never fails and seldom waits: what cannot be written now is written later, at last by register, and a server
    that is away is asked less and less often.
    """

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self.run_id = run_id
        self._client = client
        self._waiting: list[Metric] = []
        self._pause = _FLUSH_EVERY
        self._tried = time.monotonic()

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Add a step's scalars; names may hold "@"."""
        self._waiting += as_metrics(scalars, step)
        if time.monotonic() - self._tried < self._pause:
            return
        try:
            self.flush()
            self._pause = _FLUSH_EVERY
        except GemstError:
            self._pause = min(max(2 * self._pause, _FIRST_PAUSE), _LAST_PAUSE)
        self._tried = time.monotonic()

    def flush(self) -> None:
        """Write what waits. Raises GemstError when the database does not take it."""
        with explained():
            log_metrics(self._client, self.run_id, self._waiting)
        self._waiting.clear()


@contextlib.contextmanager
def live(config: Config) -> Iterator[LiveRun]:
    """A new run with the flat parameters; it ends as FINISHED, KILLED (Ctrl-C) or FAILED.

    Raises GemstError before anything is computed when the database cannot be used.
    """
    with explained():
        client = connect()
        run = LiveRun(client, start_run(client, config))
    status = "FAILED"
    try:
        yield run
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        with contextlib.suppress(GemstError), explained():
            run.flush()
            client.set_tag(run.run_id, CURVES, "complete")
            client.set_terminated(run.run_id, status)


def register(config: Config, rescore: Rescore) -> Registered:
    """Log results and artefacts to the model's run, make a model version of it, and move the champion if it is better.

    Reads the artefacts of layout.py. Registering the same artefacts again makes nothing new: it finishes what was
    interrupted, and returns their version. `rescore` measures a champion whose score is of other examples.
    Raises GemstError when an artefact is missing, the results are of another model or other examples, or the database
    cannot be used.
    """
    results = require(layout.EVALUATION / "metrics.json", made_by="gemst evaluate")
    require(layout.MODEL / "gemst.json", made_by="gemst tune")
    metrics = read_json(results)
    measured = metrics.get("of", {})
    if measured.get("model") != of_model():
        raise GemstError(f"{results} is of another model than {layout.MODEL}", "Run `gemst evaluate` first")
    if measured.get("examples") != of_examples(config):
        raise GemstError(
            f"{results} is of other test examples, items or evaluation.exclude_seen than there are now",
            "Run `gemst evaluate` first",
        )
    joint = float(metrics["model"]["joint"])
    mark = fingerprint()
    with explained():
        client = connect()
        from mlflow.exceptions import MlflowException

        name = config.registry.model_name
        if name is None:
            run_id = _run_of_model(client, config, mark)
            _log_results(client, run_id, metrics)
            return Registered(None, run_id, None, joint, "registry.model_name is null")
        known = client.search_model_versions(f"name = '{name}'")
        version = next((one for one in known if one.run_id and one.tags.get(FINGERPRINT) == mark), None)
        if version is None:
            run_id = _run_of_model(client, config, mark)
            _log_results(client, run_id, metrics)
            gone = _gone(client, config, name, mark)
            if gone is not None:  # somebody did not want it: it does not come back by itself
                return Registered(None, run_id, None, joint, gone)
            tags = {FINGERPRINT: mark, JOINT: repr(joint), EXAMPLES: measured["examples"]}
            version = new_version(client, config, name, run_id, tags)
        with contextlib.suppress(MlflowException):  # its run may have been deleted
            client.set_tag(str(version.run_id), VERSION, f"{name}/{version.version}")
        reigning = alias(client, name, CHAMPION) is not None  # the alias may have been taken away in the UI
        words = (reigning and version.tags.get(JUDGED)) or crown(client, name, version, rescore)
        return Registered(int(version.version), str(version.run_id), role(client, name, version), joint, words)


def evaluated(config: Config, run: str, name: str = "per_query.parquet") -> Path:
    """A file of the evaluation of a run id, a version number, an alias of the model, or of an evaluation folder."""
    folder = Path(run)
    if folder.is_dir():
        return require(folder / name, made_by="gemst evaluate")
    with explained():
        client = connect(absent=_unknown(run))
        import mlflow
        from mlflow.exceptions import MlflowException

        try:
            model, version = config.registry.model_name, None
            if model is not None:
                version = client.get_model_version(model, run) if run.isdigit() else alias(client, model, run)
            run_id = run if version is None else version.run_id
            return Path(mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path=f"evaluation/{name}"))
        except (MlflowException, OSError):
            raise _unknown(run) from None


def _unknown(run: str) -> GemstError:
    return GemstError(
        f"{run!r} names no evaluated run",
        "Give a run id, a model version, `champion` or a folder; `make ui` lists the runs",
    )


def _run_of_model(client: MlflowClient, config: Config, mark: str) -> str:
    """The run that tuned the model, or one made from the artefacts where MLflow does not know it."""
    from mlflow.exceptions import MlflowException

    made_by = layout.TUNING / "run.json"
    run_id = read_json(made_by).get("run_id") if made_by.exists() else None
    run = None
    if run_id:
        with contextlib.suppress(MlflowException):
            run = client.get_run(run_id)
    if run is None or run.info.lifecycle_stage == "deleted" or run.data.tags.get(FINGERPRINT, mark) != mark:
        run = client.get_run(start_run(client, config))
    run_id = run.info.run_id
    if run.data.tags.get(CURVES) != "complete":
        _log_curves(client, run_id)
        client.set_tag(run_id, CURVES, "complete")
        client.set_terminated(run_id, "FINISHED")
    client.set_tag(run_id, FINGERPRINT, mark)
    return str(run_id)


def _gone(client: MlflowClient, config: Config, name: str, mark: str) -> str | None:
    """What to say where these artefacts were a version of the model before, which has been deleted since."""
    from mlflow.entities import ViewType

    experiment = client.get_experiment_by_name(config.registry.experiment)
    if experiment is None or not client.search_registered_models(f"name = '{name}'"):
        return None  # all of it was deleted, to start over
    same = client.search_runs([experiment.experiment_id], f"tags.`{FINGERPRINT}` = '{mark}'", ViewType.ALL)
    found = next((run for run in same if run.data.tags.get(VERSION, "").startswith(f"{name}/")), None)
    if found is None:
        return None
    number = found.data.tags[VERSION].removeprefix(f"{name}/")
    restore = "restore the run and " if found.info.lifecycle_stage == "deleted" else ""
    return (
        f"version {number} of {name} was this model and has been deleted: "
        f"to have it again, {restore}delete the tag {VERSION} of run {found.info.run_id}"
    )


def _log_curves(client: MlflowClient, run_id: str) -> None:
    import polars as pl
    from mlflow.entities import Metric

    path = layout.TUNING / "curves.parquet"
    if path.exists():
        now = int(time.time() * 1000)
        curves = pl.read_parquet(path).filter(pl.col("value").is_finite())
        points = [Metric(metric_name(name), value, now, step) for step, name, value in curves.rows()]
        log_metrics(client, run_id, points)


def _log_results(client: MlflowClient, run_id: str, metrics: dict[str, Any]) -> None:
    """Test metrics, what each stage cost, DVC's hashes, and the files a person wants to look at."""
    numbers = summary_metrics(metrics)
    for path in sorted((layout.ARTIFACTS / "summaries").glob("*.json")):
        summary = read_json(path)
        numbers[f"stage/{summary['stage']}/seconds"] = summary["seconds"]
        numbers[f"stage/{summary['stage']}/peak_mib"] = summary["peak_mib"]
    if (layout.TUNING / "run.json").exists():
        tuned = read_json(layout.TUNING / "run.json")
        costs = ("steps", "tokens", "seconds_per_step", "largest_leak")
        numbers |= {f"tuning/{name}": tuned[name] for name in costs if tuned.get(name) is not None}
    log_metrics(client, run_id, as_metrics(numbers, step=0))
    for key, value in dvc_hashes().items():
        client.set_tag(run_id, key, value)
    client.log_artifacts(run_id, str(layout.EVALUATION), "evaluation")
    for folder in (layout.VALIDATION, layout.NULL_SPACE, layout.ITEM_IDS, layout.TUNING):
        for path in sorted(folder.rglob("*")) if folder.is_dir() else []:
            if path.suffix not in (".safetensors", ".pt") and path.is_file():
                inside = path.parent.relative_to(layout.ARTIFACTS)
                client.log_artifact(run_id, str(path), inside.as_posix())
    for name in ("dvc.lock", "params.yaml"):
        if Path(name).exists():
            client.log_artifact(run_id, name)

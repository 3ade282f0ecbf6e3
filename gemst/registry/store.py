"""The MLflow store: reach it, write to it, and say in one line why that failed."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from gemst import layout
from gemst.errors import GemstError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

DATABASE = layout.MLRUNS / "mlflow.db"

_LOCK_PATIENCE = 5.0  # seconds to wait for a database another program has locked


def metric_name(name: str) -> str:
    """The name under which MLflow takes a metric.

    >>> metric_name("test/search/ndcg@10")
    'test/search/ndcg_at_10'
    """
    return re.sub(r"[^\w\-. :/]", "_", name.replace("@", "_at_"))


def flatten(tree: dict[str, Any], under: str = "") -> dict[str, float]:
    """The numbers of a nested dict by their path.

    >>> flatten({"search": {"ndcg@10": 0.18, "note": "x"}}, under="test")
    {'test/search/ndcg@10': 0.18}
    """
    flat: dict[str, float] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}/{key}" if prefix else str(key), inner)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[prefix] = float(value)

    walk(under, tree)
    return flat


_OF_REFERENCES = ("ndcg@10", "hit@10", "joint")


def summary_metrics(metrics: dict[str, Any]) -> dict[str, float]:
    """What of metrics.json is worth a chart: test/search/ndcg@10, references/bm25/search/ndcg@10, drift/kl...

    All of the model's numbers, the references' headlines, the drift. Slices, intervals and paired differences stay in
    the artefact.
    """
    references = flatten(metrics.get("references", {}), "references")
    headlines = {name: value for name, value in references.items() if name.rsplit("/", 1)[1] in _OF_REFERENCES}
    return flatten(metrics.get("model", {}), "test") | headlines | flatten(metrics.get("drift", {}), "drift")


def connect(absent: GemstError | None = None) -> MlflowClient:
    """A client on the project's database, or on MLFLOW_TRACKING_URI where a team has a server.

    Where there is no database yet, one is made, or `absent` raised if given.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # by default a lost server costs minutes
    uri = address()
    if uri == _local():
        if absent is not None and not DATABASE.exists():
            raise absent
        _check_unlocked()
    logging.getLogger("alembic").setLevel(logging.WARNING)
    import mlflow

    named = "MLFLOW_TRACKING_URI" in os.environ
    mlflow.set_tracking_uri(uri)
    if not named:  # MLflow exports the address; in another folder of this process it would be the wrong one
        os.environ.pop("MLFLOW_TRACKING_URI", None)
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    return mlflow.MlflowClient()


def address() -> str:
    """Where runs go, the same from every folder: MLFLOW_TRACKING_URI, or the project's database."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or _local()
    database = uri.removeprefix("sqlite:///")
    return uri if database == uri else f"sqlite:///{Path(database).resolve()}"


def _local() -> str:
    return f"sqlite:///{DATABASE.resolve()}"  # absolute: MLflow keeps one connection per address in a process


def _check_unlocked() -> None:
    """Fail at once, with a reason, where MLflow would retry for minutes."""
    DATABASE.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(DATABASE, timeout=_LOCK_PATIENCE)
    try:
        connection.execute("BEGIN IMMEDIATE")
        connection.rollback()
    except sqlite3.OperationalError:
        raise GemstError(
            f"{DATABASE} is locked by another program",
            "Close what holds it (an open sqlite shell, another run), then try again",
        ) from None
    except sqlite3.DatabaseError:
        raise GemstError(f"{DATABASE} is not a database MLflow can read", "Move it away; a new one is made") from None
    finally:
        connection.close()


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """What MLflow and its database raise, as a GemstError of one line."""
    try:
        yield
    except GemstError:
        raise
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("mlflow", "sqlalchemy", "sqlite3", "requests", "urllib3"):
            raise
        reason = " ".join(str(error).split())[:300]
        raise GemstError(
            f"MLflow cannot be used ({reason})",
            f"Check {os.environ.get('MLFLOW_TRACKING_URI') or DATABASE}, then try again",
        ) from None


def no_model(name: str) -> GemstError:
    """The error of whoever looks for a champion that is not there."""
    return GemstError(
        f"{name} has no champion in the registry yet", "Run `make demo`, or `gemst register` after `gemst evaluate`"
    )


def experiment(client: MlflowClient, name: str) -> str:
    """The id of an experiment, made where it is missing. Raises GemstError when it is deleted or its folder moved."""
    import mlflow

    found = client.get_experiment_by_name(name)
    uri = mlflow.get_tracking_uri()
    local = uri.startswith("sqlite:///")
    location = (Path(uri.removeprefix("sqlite:///")).parent / "artifacts").resolve().as_uri() if local else None
    if found is None:
        # Said once and for all, beside the database: MLflow would otherwise put the artefacts where it was started.
        made: str = client.create_experiment(name, artifact_location=location)
        return made
    kept = str(found.artifact_location)
    if local and kept.startswith("file:") and kept != location and not Path(url2pathname(urlsplit(kept).path)).exists():
        raise GemstError(
            f"the experiment {name!r} keeps its files in {kept}, which is gone: the project was moved",
            "Move it back, or name another registry.experiment; MLflow would write to the old place",
        )
    if found.lifecycle_stage == "deleted":
        raise GemstError(
            f"the experiment {name!r} is deleted in MLflow",
            f"Run `mlflow experiments restore -x {found.experiment_id}`, or use another registry.experiment",
        )
    identity: str = found.experiment_id
    return identity


def as_metrics(scalars: dict[str, float], step: int) -> list[Metric]:
    """MLflow metrics of one step; what is NaN or infinite is left out."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    return [
        Metric(metric_name(name), float(value), now, step) for name, value in scalars.items() if math.isfinite(value)
    ]


def log_metrics(client: MlflowClient, run_id: str, metrics: list[Metric]) -> None:
    """Log them in batches of MLflow's size."""
    for first in range(0, len(metrics), 1000):
        client.log_batch(run_id, metrics=metrics[first : first + 1000])

"""Runs of an experiment: a new one for a model, one that holds the cells of a study."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from gemst.provenance import code_tags
from gemst.registry.store import connect, experiment, explained

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from gemst.config import Config

STUDY = "gemst.study"


def study_run(config: Config, study: Path) -> str:
    """The run that holds the cells of a study, by the study file's name: the one there is, or a new one.

    Raises GemstError when the database cannot be used.
    """
    with explained():
        client = connect()
        identity = experiment(client, config.registry.experiment)
        found = client.search_runs([identity], f"tags.`{STUDY}` = '{study.stem}'", max_results=1)
        if found:
            return str(found[0].info.run_id)
        run = client.create_run(identity, run_name=study.stem, tags={STUDY: study.stem} | code_tags())
        client.log_artifact(run.info.run_id, str(study))
        client.set_terminated(run.info.run_id, "FINISHED")
        return str(run.info.run_id)


def name_cell(run_id: str, params: dict[str, str]) -> None:
    """Add the columns by which a study's runs are told apart, such as study.method. Raises GemstError as above."""
    with explained():
        client = connect()
        for key, value in params.items():
            client.log_param(run_id, key, value)


def start_run(client: MlflowClient, config: Config) -> str:
    """A new run in the project's experiment, with parameters and the code's version."""
    from mlflow.entities import Param
    from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

    name = config.registry.run_name or f"{config.tuning.method}-{time.strftime('%Y%m%d-%H%M%S')}"
    parent = {MLFLOW_PARENT_RUN_ID: config.registry.parent} if config.registry.parent else {}
    run = client.create_run(experiment(client, config.registry.experiment), run_name=name, tags=code_tags() | parent)
    params = [Param(key, str(value)) for key, value in config.flat().items() if not key.startswith("registry.")]
    for first in range(0, len(params), 100):
        client.log_batch(run.info.run_id, params=params[first : first + 100])
    return str(run.info.run_id)

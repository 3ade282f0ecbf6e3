"""Builds of item IDs in MLflow: a run each, so that they can be compared before anything is trained on them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gemst.files import read_json
from gemst.provenance import code_tags
from gemst.registry.store import as_metrics, connect, experiment, explained, flatten, log_metrics

if TYPE_CHECKING:
    from gemst.config import Config

_SHOWN = ("quality.json", "quality.png", "manifest.json", "ids.parquet")


def log_build(config: Config, folder: Path) -> str:
    """Log the build in `folder` to the experiment `<registry.experiment>-item-ids`; return the run's id.

    Parameters are those of `item_ids`, metrics the quality report's numbers (level/0/coverage, ...), artefacts the
    report, its plot, the map and the manifest. Raises GemstError when the database cannot be used.
    """
    from mlflow.entities import Param

    quality, manifest = read_json(folder / "quality.json"), read_json(folder / "manifest.json")
    levels = {str(number): level for number, level in enumerate(quality.pop("levels"))}
    name = f"{manifest['strategy']}, generation {manifest['generation']}, {manifest['items']} items"
    with explained():
        client = connect()
        identity = experiment(client, f"{config.registry.experiment}-item-ids")
        run_id: str = client.create_run(identity, run_name=name, tags=code_tags()).info.run_id
        params = {key: value for key, value in config.flat().items() if key.startswith("item_ids.")}
        client.log_batch(run_id, params=[Param(key, str(value)) for key, value in params.items()])
        log_metrics(client, run_id, as_metrics(flatten({**quality, "level": levels}), step=0))
        for file in _SHOWN:
            client.log_artifact(run_id, str(folder / file))
        client.set_terminated(run_id, "FINISHED")
    return run_id

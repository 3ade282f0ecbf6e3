"""A build of item IDs is a run that can be looked at before anything is trained."""

import mlflow
from mlflow import MlflowClient

from gemst import layout
from gemst.config import Config
from gemst.files import read_json
from gemst.registry.builds import log_build


def test_a_build_is_a_run_with_its_report_plot_and_map(artifacts):
    run_id = log_build(Config(), layout.ITEM_IDS)
    mlflow.set_tracking_uri(f"sqlite:///{(layout.MLRUNS / 'mlflow.db').resolve()}")
    client = MlflowClient()
    run = client.get_run(run_id)
    assert client.get_experiment(run.info.experiment_id).name == "gemst-item-ids"
    assert (run.info.run_name, run.info.status) == ("atomic, generation 0, 4 items", "FINISHED")
    quality = read_json(layout.ITEM_IDS / "quality.json")
    assert run.data.metrics["unique_ratio_after"] == quality["unique_ratio_after"] == 1.0
    assert run.data.metrics["level/0/coverage"] == quality["levels"][0]["coverage"]
    assert run.data.params["item_ids.strategy"] == "atomic"
    assert "tuning.rank" not in run.data.params
    logged = {artifact.path for artifact in client.list_artifacts(run_id)}
    assert logged == {"quality.json", "quality.png", "manifest.json", "ids.parquet"}

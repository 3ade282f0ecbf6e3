"""Fixtures that several rooms share. Heavy imports stay inside them: most tests need none."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest

from gemst import layout


@pytest.fixture(autouse=True)
def no_tracking_server() -> Iterator[None]:
    """Every test starts and ends without MLflow's address in the environment: `set_tracking_uri` exports it."""
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    yield
    os.environ.pop("MLFLOW_TRACKING_URI", None)


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's database with its tables: making them takes ten seconds, a copy none."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def artifacts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_database: Path) -> Path:
    """A project folder (the working directory) where everything up to evaluate has run; MLflow knows nothing yet."""
    monkeypatch.chdir(tmp_path)
    layout.MLRUNS.mkdir()
    shutil.copy(empty_database, layout.MLRUNS / "mlflow.db")
    from gemst import item_ids
    from gemst.config import Config
    from tests.small_run import ITEMS, make_model, write_results

    layout.VALIDATED.mkdir(parents=True)
    ITEMS.write_parquet(layout.VALIDATED / "items.parquet")
    train = pl.DataFrame(
        {"user_id": ["u"], "task": ["search"], "query": ["comedy"], "history": [["a"]], "targets": [["b"]]}
    )
    item_ids.build(ITEMS, train, Config(), layout.ITEM_IDS)
    make_model(layout.MODEL, layout.ITEM_IDS)
    layout.TUNING.mkdir()
    pl.DataFrame(
        {"step": [1, 2, 2], "name": ["train/loss_rec", "train/loss_rec", "valid/ndcg@10"], "value": [7.0, 6.5, 0.2]}
    ).write_parquet(layout.TUNING / "curves.parquet")
    write_results(joint=0.25)
    (tmp_path / "dvc.lock").write_text(
        "schema: '2.0'\nstages:\n  tune:\n    cmd: x\n"
        "    outs:\n    - {path: artifacts/model, hash: md5, md5: abc.dir}\n"
    )
    (tmp_path / "data.dvc").write_text("outs:\n- {path: data, hash: md5, md5: def.dir}\n")
    return tmp_path

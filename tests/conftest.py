"""Fixtures that several rooms share. Heavy imports stay inside them: most tests need none."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
from filelock import FileLock

from gemst import layout

SLOWEST = ("tests/flows/", "tests/tuning/test_resume.py", "tests/tuning/test_parallel.py", "tests/test_stages.py")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slowest files first: at the end no process works on one alone."""
    items.sort(key=lambda item: not item.nodeid.startswith(SLOWEST))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """A whole file goes to one process, and so does all of tests/flows: its server is started once."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "tests/flows/" if nodeid.startswith("tests/flows/") else nodeid.split("::")[0]

    return ByFile(config, log)


@pytest.fixture(autouse=True)
def no_tracking_server() -> Iterator[None]:
    """Every test starts and ends without MLflow's address in the environment: `set_tracking_uri` exports it."""
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    yield
    os.environ.pop("MLFLOW_TRACKING_URI", None)


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """MLflow's database with its tables, as gemst makes it: once for all processes, a copy costs next to nothing."""
    from gemst.registry.store import connect

    folder = tmp_path_factory.getbasetemp()
    if worker_id != "master":
        folder = folder.parent  # each process has a folder of its own in the run's
    made = folder / "mlflow-made"
    with FileLock(folder / "mlflow.lock"), pytest.MonkeyPatch.context() as patch:
        if not made.exists():
            making = tmp_path_factory.mktemp("mlflow")
            patch.chdir(making)
            connect().search_experiments()
            making.rename(made)
    return made / layout.MLRUNS / "mlflow.db"


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

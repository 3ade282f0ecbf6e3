"""The real stage: kill -9 at any moment and it goes on as if nothing had happened, in one process and in two."""

from __future__ import annotations

import json
import random
import shutil
import signal
from pathlib import Path

import polars as pl
import pytest
import torch
import yaml
from safetensors.torch import load_file

from gemst import layout, stages
from gemst.config import Config
from gemst.files import read_json
from tests import tiny_project
from tests.launch import TWO_PROCESSES, python

pytestmark = pytest.mark.timeout(900)  # processes have a patience of their own
# What the killed process runs: `gemst tune`, and SIGKILL from inside at a chosen moment.
DRIVER = """
import os, signal, sys
import torch
from gemst import cli
from gemst.tuning import loop
moment, number = sys.argv.pop(1), int(sys.argv.pop(1))
def die(): os.kill(os.getpid(), signal.SIGKILL)
if moment == "step":
    count = loop._count
    loop._count = lambda state, born: die() if state.step == number else count(state, born)
elif moment == "writing":
    save = torch.save
    def save_or_die(value, path):
        save(value, path)
        if f"last-{number:08}" in str(path): die()
    torch.save = save_or_die
cli.main()
"""


@pytest.fixture(scope="module")
def config() -> Config:
    """A learned gate, decay, accumulation, dropout, a drift limit and early stopping: all that must be remembered."""
    tree = Config.model_validate(tiny_project.SETTINGS).model_dump(mode="json")
    tree["tuning"] |= {
        "epochs": 16.0, "batch_tokens": 200, "accumulate": 2, "validate_every": 5, "checkpoint_every": 4, "patience": 3,
        "weight_decay": 0.1, "refresh_every": 6, "lr": 3e-3, "item_lr": 3e-3, "drift_limit": 1e-4,
        "gates": {"kind": "learned", "rec": 0.5, "lr": 0.05},
    }  # fmt: skip
    tree["item_rows"]["tokens"] = 400  # output rows are tuned in the base of a fit
    tree["threads"] = 1  # another count sums in another order, and a test before these may have set one
    return Config.model_validate(tree)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, config: Config, empty_database: Path) -> Path:
    """A project with everything ready to tune; attention drops out, so that generators count."""
    root = tmp_path_factory.mktemp("start")
    tiny_project.build(root)
    (root / "mlruns").mkdir()
    shutil.copy(empty_database, root / "mlruns" / "mlflow.db")
    backbone = read_json(root / "backbone" / "config.json") | {"attention_dropout": 0.1}
    (root / "backbone" / "config.json").write_text(json.dumps(backbone))
    (root / "params.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        stages.ingest(config)
        shutil.copytree(layout.TABLES, layout.VALIDATED)  # clean as they are
        for stage in (stages.split, stages.tokenize, stages.item_rows, stages.null_space):
            stage(config)
    return root


def copied(start: Path, to: Path) -> Path:
    return Path(shutil.copytree(start, to))


def curves(folder: Path) -> pl.DataFrame:
    return pl.read_parquet(folder / layout.TUNING / "curves.parquet").filter(pl.col("name") != "tokens_per_s")


@pytest.fixture(scope="module")
def whole(start: Path, config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    folder = copied(start, tmp_path_factory.mktemp("whole") / "project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        stages.tune(config)
    return folder


@pytest.mark.parametrize("moment", ["step", "writing"])
def test_kill_9_and_the_loss_curve_is_identical(
    start: Path, whole: Path, config, tmp_path, monkeypatch, moment
) -> None:
    steps = read_json(whole / layout.TUNING / "run.json")["steps"]
    at = random.randrange(5, steps) if moment == "step" else 4 * random.randrange(2, steps // 4)
    folder = copied(start, tmp_path / "project")
    killed = python(folder, "-c", DRIVER, moment, str(at), "tune")
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert not (folder / layout.MODEL).exists()
    left = sorted(path.name for path in (folder / layout.ARTIFACTS / ".tuning.checkpoints").glob("last-*"))
    assert left == [f"last-{(at if moment == 'step' else at - 1) // 4 * 4:08}"]
    monkeypatch.chdir(folder)
    stages.tune(config)
    assert curves(folder).equals(curves(whole)), f"killed at {at}"
    ours, theirs = (load_file(side / layout.MODEL / "model.safetensors") for side in (folder, whole))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items()), f"killed at {at}"
    assert not (folder / layout.ARTIFACTS / ".tuning.checkpoints").exists()
    diagnostics = [pl.read_parquet(side / layout.TUNING / "diagnostics.parquet") for side in (folder, whole)]
    assert diagnostics[0].equals(diagnostics[1], null_equal=True)


def test_the_stage_in_two_sharded_processes_survives_a_kill_and_equals_one_process(
    start: Path, config, tmp_path, monkeypatch
) -> None:
    """torchrun, FSDP2, checkpointing, a process killed, torchrun again: the model of one that nobody killed."""
    alone, folder = copied(start, tmp_path / "alone"), copied(start, tmp_path / "two")
    for root in (alone, folder):  # dropout differs from process to process
        backbone = read_json(root / "backbone" / "config.json") | {"attention_dropout": 0.0}
        (root / "backbone" / "config.json").write_text(json.dumps(backbone))
    (folder / "driver.py").write_text(DRIVER)
    settings = ("--set", "tuning.distributed=fsdp", "--set", "tuning.epochs=12", "--set", "tuning.checkpointing=true")
    killed = python(folder, *TWO_PROCESSES, "driver.py", "step", "9", "tune", *settings)
    assert killed.returncode != 0
    assert not (folder / layout.MODEL).exists()
    ended = python(folder, *TWO_PROCESSES, "-m", "gemst.cli", "tune", *settings)
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert ended.stdout.count("tune: done") == 1  # the first process alone speaks
    monkeypatch.chdir(alone)
    stages.tune(
        Config.model_validate({**config.model_dump(), "tuning": {**config.model_dump()["tuning"], "epochs": 12.0}})
    )
    ours, theirs = (load_file(side / layout.MODEL / "model.safetensors") for side in (folder, alone))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    one, two = (read_json(side / layout.TUNING / "run.json") for side in (alone, folder))
    assert two["steps"] == one["steps"]
    assert two["best_valid_joint"] == pytest.approx(one["best_valid_joint"], abs=1e-3)
    assert two["largest_leak"] < 1e-6
    assert set(read_json(folder / layout.MODEL / "gemst.json")["leak_certificate"])
    first = read_json(folder / layout.ARTIFACTS / "summaries" / "tune.json")
    assert first["written"]["steps"] == two["steps"]

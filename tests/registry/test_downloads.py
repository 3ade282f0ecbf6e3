"""Models on a real tracking server: brought here once, and not for ever."""

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import mlflow
import pytest

from gemst import layout, registry
from gemst.config import Config
from gemst.errors import GemstError
from tests.small_run import write_results

CONFIG = Config()


@pytest.fixture
def stored(artifacts: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch) -> Iterator[Path]:
    """Where a server keeps the artefacts of this project's runs."""
    place = tmp_path_factory.mktemp("server")
    shutil.move(layout.MLRUNS / "mlflow.db", place / "mlflow.db")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--port", port, "--workers", "1", "--backend-store-uri",
         f"sqlite:///{place / 'mlflow.db'}", "--artifacts-destination", str(place / "artifacts")],
        cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", server)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        yield place / "artifacts"
    finally:
        server.terminate()
        server.wait()
        mlflow.set_tracking_uri(None)


def _wait_for(address: str, server: subprocess.Popen) -> None:
    for _ in range(240):
        assert server.poll() is None, "the server ended"
        try:
            if httpx.get(address, timeout=1).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.25)
    pytest.fail("the server does not answer")


def crowned(joint: float) -> Path:
    write_results(joint=joint)
    assert registry.register(CONFIG, lambda folder: pytest.fail(f"{folder} was measured again")).role == "champion"
    return registry.champion(CONFIG).folder


def test_a_champion_is_brought_once_and_older_ones_go(stored):
    first = crowned(0.2)
    assert first.is_relative_to(layout.MLRUNS / "downloads" / "gemst")
    assert (first / "gemst.json").read_bytes() == (layout.MODEL / "gemst.json").read_bytes()
    second, third = crowned(0.3), crowned(0.4)
    assert [folder.exists() for folder in (first, second, third)] == [False, True, True]
    shutil.rmtree(stored)
    assert registry.champion(CONFIG).folder == third
    shutil.rmtree(layout.MLRUNS / "downloads")
    with pytest.raises(GemstError, match=r"files of gemst version 3 cannot be had"):
        registry.champion(CONFIG)
    assert not [*(layout.MLRUNS / "downloads" / "gemst").iterdir()]  # no half of one

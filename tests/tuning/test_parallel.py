"""Two processes equal one, whole or sharded, and go on exactly where they were broken off.

The processes talk over gloo on the CPU. Batches have more targets than a basis has columns: where a gradient has fewer
directions than its basis, Adam magnifies the rounding of what is left, and no two orders of summation agree.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gemst.config import Config
from gemst.errors import GemstError
from gemst.tuning import parallel
from tests.launch import ROOT, TWO_PROCESSES, python
from tests.tuning import parallel_worker as worker

pytestmark = pytest.mark.timeout(900)  # processes have a patience of their own
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes have run every scenario."""
    folder = tmp_path_factory.mktemp("two")
    ended = python(ROOT, *TWO_PROCESSES, worker.__file__, str(folder))
    assert ended.returncode == 0, ended.stderr[-4000:]
    return folder


@pytest.mark.parametrize("name", worker.SCENARIOS)
def test_two_processes_equal_one_over_twenty_steps(two: Path, tmp_path: Path, name: str) -> None:
    there, here = torch.load(two / f"{name}.pt", weights_only=True), worker.run(name, tmp_path)
    assert there["step"] == here["step"] == 20
    torch.testing.assert_close(torch.tensor(there["losses"]), torch.tensor(here["losses"]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(there["weights"], here["weights"], **CLOSE)
    assert there["weights"].keys() == here["weights"].keys()


def test_the_comparison_would_see_another_split_of_the_tasks(two: Path, tmp_path: Path, monkeypatch) -> None:
    """Task weights of each process's own share, instead of the step's, give other weights."""
    monkeypatch.setattr(parallel.Processes, "totals", lambda self, values: [values[1], values[0], *values[2:]])
    there, here = torch.load(two / "ddp-llama-chain.pt", weights_only=True), worker.run("ddp-llama-chain", tmp_path)
    worst = max(float((there["weights"][name] - value).abs().max()) for name, value in here["weights"].items())
    assert worst > 1e-3


def test_shards_hold_half_of_the_moments(two: Path, tmp_path: Path) -> None:
    for name in ("fsdp-llama-chain", "fsdp-gpt2-single"):
        assert 2 * torch.load(two / f"{name}.pt", weights_only=True)["moments"] == worker.run(name, tmp_path)["moments"]


@pytest.mark.parametrize("name", worker.RESUMED)
def test_two_processes_go_on_as_if_nothing_had_happened(two: Path, name: str) -> None:
    whole, resumed = (torch.load(two / f"{name}{end}.pt", weights_only=True) for end in ("", "-resumed"))
    assert resumed["losses"] == whole["losses"]
    assert resumed["curves"] == whole["curves"]
    for key, value in whole["weights"].items():
        assert torch.equal(resumed["weights"][key], value), key


@pytest.mark.parametrize("name", worker.RESUMED)
def test_one_process_goes_on_where_two_stopped(two: Path, name: str) -> None:
    whole, resumed = torch.load(two / f"{name}.pt", weights_only=True), worker.run(name, two / "left")
    assert len(resumed["losses"]) == 20  # those of the checkpoint are logged again
    torch.testing.assert_close(resumed["weights"], whole["weights"], **CLOSE)


def test_a_method_that_cannot_be_shared_says_so(monkeypatch) -> None:
    monkeypatch.setattr(parallel, "world", lambda: 2)
    monkeypatch.setattr(parallel, "rank", lambda: 0)
    for settings, says in (
        ({"method": "pcgrad"}, "pcgrad runs in one process.*without torchrun"),
        ({"fidelity": "paper"}, "paper runs in one process"),
        ({"method": "lora", "distributed": "fsdp"}, "lora cannot be sharded.*distributed to ddp"),
        ({"precision": "bf16-weights", "distributed": "fsdp"}, "bf16-weights cannot be sharded.*distributed to ddp"),
    ):
        with pytest.raises(GemstError, match=says):
            parallel.Processes(Config.model_validate({"tuning": settings}).tuning)


def test_one_process_takes_all_and_changes_nothing() -> None:
    alone = parallel.Processes(Config().tuning)
    assert alone.shares([3, 4, 5]) == [[3, 4, 5]]
    assert alone.first
    tensor = torch.ones(2)
    assert parallel.mean_(tensor) is tensor
    assert parallel.local(tensor) is tensor
    assert alone.totals([1.5, 2]) == [1.5, 2]
    assert (alone.agreed("a"), alone.gathered("a")) == ("a", ["a"])

"""Checkpoints a killed run goes on from exactly: safetensors, JSON, a weights-only optimizer state; atomic.

A folder is written under a temporary name and renamed to one that does not exist yet, so a kill at any instant leaves
the previous checkpoint or the new one. Sharded tensors are written whole by process 0: a run may go on with another
number of processes, or without sharding.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from gemst.errors import GemstError
from gemst.files import atomic_folder, read_json, remove_folder
from gemst.tuning.parallel import local, on_first, rank, shard_like, whole, world

if TYPE_CHECKING:
    from gemst.tuning.loop import State
    from gemst.tuning.methods import Method
    from gemst.tuning.model import ItemModel


class Checkpoints:
    """`last-<step>` resumes a run, `best-<step>` holds the weights of its best validation.

    `identity` names what the run is made of (config, data, IDs): a checkpoint of another run is not resumed, nor one of
    a gemst that keeps another state. Every process calls every method; `folder` must be the same for all of them.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        from gemst.tuning.drift_limit import Brake
        from gemst.tuning.loop import State

        kept = [field.name for kind in (State, Brake) for field in fields(kind)]
        self.folder, self.identity = folder, " ".join([identity, *kept])
        self._best_of_last: int | None = None  # the best step that `last` refers to

    def save(self, state: State, items: ItemModel, method: Method) -> None:
        """Write `last`: weights, item rows, optimizer, place in the data."""
        weights, optimizer = on_first(tensors(items, method)), _whole_state(method.optimizer)
        if rank() > 0:
            return
        with atomic_folder(self._path("last", state.step)) as folder:
            _write(weights, folder)
            with (folder / "optimizer.pt").open("wb") as file:  # given a path, a full disk is not called so
                torch.save(optimizer, file)
            (folder / "state.json").write_text(json.dumps({"identity": self.identity, **asdict(state)}))
        self._prune("last", {state.step})
        self._prune("best", {state.best_step})
        self._best_of_last = state.best_step

    def resume(self, items: ItemModel, method: Method) -> State | None:
        """Load `last` into the model and optimizer; None when there is none of this run.

        Raises GemstError when not every process sees it.
        """
        from gemst.tuning.drift_limit import Brake
        from gemst.tuning.loop import State

        found = [self._latest() if rank() == 0 else None]
        if world() > 1:
            dist.broadcast_object_list(found, 0, device=items.items_in.device)
        if found[0] is None:
            return None
        folder = _seen(self.folder / found[0])
        saved = read_json(folder / "state.json")
        del saved["identity"]
        _load(folder, items, method)
        optimizer = torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu")
        method.optimizer.load_state_dict(_sharded_state(optimizer, method.optimizer))
        saved["curves"] = [tuple(point) for point in saved["curves"]]
        saved["brake"] = Brake(**saved["brake"])
        self._best_of_last = saved["best_step"]
        return State(**saved)

    def keep_best(self, state: State, items: ItemModel, method: Method) -> None:
        """Write `best`: the weights alone."""
        weights = on_first(tensors(items, method))
        if rank() > 0:
            return
        with atomic_folder(self._path("best", state.step)) as folder:
            _write(weights, folder)
        self._prune("best", {state.step, self._best_of_last})  # a killed run goes back to that of its `last`

    def restore_best(self, state: State, items: ItemModel, method: Method) -> None:
        """Put the best validation's weights into the model. Raises GemstError when not every process sees them."""
        if world() > 1:
            dist.barrier()  # process 0 may still be writing
        if state.best_step is not None:
            _load(_seen(self._path("best", state.best_step)), items, method)

    def clear(self) -> None:
        """Forget the run: it has ended."""
        if rank() == 0:
            remove_folder(self.folder)

    def _path(self, kind: str, step: int | None) -> Path:
        return self.folder / f"{kind}-{step or 0:08}"

    def _latest(self) -> str | None:
        """Name of the newest `last` of this run; what a kill left half-written, or another run, is removed."""
        if not self.folder.exists():
            return None
        for path in self.folder.iterdir():
            if path.name.startswith("."):
                shutil.rmtree(path)
        newest = max(self.folder.glob("last-*"), default=None)
        if newest is not None and read_json(newest / "state.json")["identity"] == self.identity:
            return newest.name
        remove_folder(self.folder)
        return None

    def _prune(self, kind: str, keep: set[int | None]) -> None:
        kept = {self._path(kind, step) for step in keep}
        for path in self.folder.glob(f"{kind}-*"):
            if path not in kept:
                remove_folder(path)


def tensors(items: ItemModel, method: Method) -> dict[str, Tensor]:
    """Everything that training changes, by name."""
    return {**method.weights(), "items_in": items.items_in.detach(), "items_out": items.items_out.detach()}


def _seen(folder: Path) -> Path:
    """`folder`, which process 0 has written. Raises GemstError where it is not."""
    if not folder.exists():
        raise GemstError(
            f"process {rank()} does not see {folder}", "Give all machines of the run one shared project folder"
        )
    return folder


def _write(weights: dict[str, Tensor], folder: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "weights.safetensors")


@torch.no_grad()
def _load(folder: Path, items: ItemModel, method: Method) -> None:
    from safetensors import safe_open

    with safe_open(folder / "weights.safetensors", "pt") as saved:
        for name, tensor in tensors(items, method).items():
            local(tensor).copy_(local(shard_like(saved.get_tensor(name), tensor)))


def _whole_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state dict with whole tensors; on other processes than 0 it stays empty."""
    saved = optimizer.state_dict()
    states = {
        number: {key: (whole(value) if isinstance(value, Tensor) else value) for key, value in state.items()}
        for number, state in saved["state"].items()
    }
    return {**saved, "state": states} if rank() == 0 else {}


def _sharded_state(saved: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A whole state dict with tensors sharded as those they replace, or as the parameter whose shape they have."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states: dict[int, dict[str, Any]] = {}
    for number, state in saved["state"].items():
        parameter = parameters[number]
        current = optimizer.state.get(parameter, {})
        states[number] = {}
        for key, value in state.items():
            like = current.get(key, parameter if getattr(value, "shape", None) == parameter.shape else None)
            states[number][key] = shard_like(value, like) if isinstance(like, DTensor) else value
    return {**saved, "state": states}

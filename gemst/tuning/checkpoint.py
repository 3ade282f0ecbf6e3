"""Checkpoints a killed run goes on from exactly: safetensors, JSON, a weights-only optimizer state; atomic."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gemst.files import atomic_folder, read_json

if TYPE_CHECKING:
    from gemst.tuning.loop import State
    from gemst.tuning.methods import Method
    from gemst.tuning.model import ItemModel


class Checkpoints:
    """`folder/last` resumes a run, `folder/best` holds the weights of its best validation.

    `identity` names what the run is made of (config, data, IDs): a checkpoint of another run is not resumed.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder, self.identity = folder, identity

    def save(self, state: State, items: ItemModel, method: Method) -> None:
        """Write `last`: weights, item rows, optimizer, place in the data."""
        with atomic_folder(self.folder / "last") as folder:
            _save_weights(folder / "weights.safetensors", items, method)
            torch.save(method.optimizer.state_dict(), folder / "optimizer.pt")
            extra = {"gate_logit": method.optimizer.gate.logit} if hasattr(method.optimizer, "gate") else {}
            generator = getattr(method.optimizer, "generator", None)
            if generator is not None:
                torch.save(generator.get_state(), folder / "generator.pt")
            (folder / "state.json").write_text(json.dumps({"identity": self.identity, **extra, **asdict(state)}))

    def resume(self, items: ItemModel, method: Method) -> State | None:
        """Load `last` into the model and optimizer; None when there is none of this run."""
        from gemst.tuning.loop import State

        folder = self.folder / "last"
        if not (folder / "state.json").exists():
            return None
        saved = read_json(folder / "state.json")
        if saved.pop("identity") != self.identity:
            shutil.rmtree(self.folder)
            return None
        _load_weights(folder / "weights.safetensors", items, method)
        optimizer: Any = method.optimizer
        optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
        if "gate_logit" in saved:
            optimizer.gate.logit = saved.pop("gate_logit")
            optimizer.generator.set_state(torch.load(folder / "generator.pt", weights_only=True))
        saved["curves"] = [tuple(point) for point in saved["curves"]]
        return State(**saved)

    def keep_best(self, items: ItemModel, method: Method) -> None:
        """Write `best`: the weights alone."""
        with atomic_folder(self.folder / "best") as folder:
            _save_weights(folder / "weights.safetensors", items, method)

    def restore_best(self, items: ItemModel, method: Method) -> None:
        """Put the best validation's weights into the model."""
        path = self.folder / "best" / "weights.safetensors"
        if path.exists():
            _load_weights(path, items, method)

    def clear(self) -> None:
        """Forget the run: it has ended."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _tensors(items: ItemModel, method: Method) -> dict[str, Tensor]:
    return {**method.weights(), "items_in": items.items_in.detach(), "items_out": items.items_out.detach()}


def _save_weights(path: Path, items: ItemModel, method: Method) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in _tensors(items, method).items()}, path)


@torch.no_grad()
def _load_weights(path: Path, items: ItemModel, method: Method) -> None:
    from safetensors.torch import load_file

    saved = load_file(path)
    for name, tensor in _tensors(items, method).items():
        tensor.copy_(saved[name])

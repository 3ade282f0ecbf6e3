"""GEMS: three subspaces, gates, and every update inside the null space of general text (arXiv 2601.09496)."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from gemst.config import Config
from gemst.errors import GemstError
from gemst.tuning import null_space
from gemst.tuning.batches import Batch
from gemst.tuning.gates import Gate, Signals
from gemst.tuning.methods import Facts
from gemst.tuning.model import ItemModel
from gemst.tuning.optimizer import Gems
from gemst.tuning.parallel import local, mean_, world
from gemst.tuning.subspace import attach, halves, joined


class GemsMethod:
    """Subspace Linears, the Gems optimizer and its gate."""

    def __init__(self, config: Config, items: ItemModel, folder: Path, shard: Callable[[ItemModel], None]) -> None:
        tuning = config.tuning
        self.projectors: dict[str, null_space.Range] = {}
        if config.null_space.rule != "none":
            self.projectors, _ = null_space.load(folder, items.model, config.null_space)
        rooms = {name: space.dimensions for name, space in self.projectors.items()} or None
        self.attached = attach(items.model, tuning.modules, tuning.rank, tuning.subspaces, rooms)
        shard(items)
        if tuning.precision == "bf16-weights":
            for layer in self.attached.layers.values():
                layer.narrow()
        self.targets = (1, 1)
        self.optimizer = Gems(
            self.attached,
            [items.items_in, items.items_out],
            Gate(tuning.gates),
            dict(self.projectors),
            lr=tuning.lr,
            item_lr=tuning.item_lr,
            betas=tuning.betas,
            scale=tuning.scale,
            weight_decay=tuning.weight_decay,
            refresh_every=tuning.refresh_every,
            seed=config.seed,
        )

    @property
    def needs_start(self) -> bool:
        return self.optimizer.needs_first_bases

    def prepare(self, targets: tuple[int, int], observe: bool) -> None:
        self.targets = targets
        self.optimizer.signals = Signals((0.0, 0.0), targets)
        self.attached.route.observe = observe
        self.optimizer.prepare()

    def enter(self, batch: Batch) -> None:
        lengths = [ids.shape[1] for ids in (batch.input_ids, batch.decoder_ids) if ids is not None]
        self.attached.announce(batch.boundary, self.targets, (len(batch.input_ids), tuple(lengths)))

    def backward(self, losses: Tensor, batch: Batch) -> None:
        """One pass; one per task where a layer mixes rows (`Route.coupled`)."""
        if not self.attached.route.coupled:
            losses.sum().backward()
            return
        if world() > 1:  # the second pass would go past what reduces gradients
            raise GemstError(
                "a Linear of this model sees only a part of the positions: each task takes a pass of its own",
                "Start without torchrun, or leave that Linear out of tuning.modules",
            )
        parts = (losses[: batch.targets[0]], losses[batch.targets[0] :])
        present = [task for task, part in enumerate(parts) if len(part)]
        for task in present:
            self.attached.route.backward = task
            parts[task].sum().backward(retain_graph=task != present[-1])

    def skip(self) -> None:
        self.optimizer.skip()

    def catch_up(self) -> None:
        self.optimizer.catch_up()

    def start(self) -> None:
        self.optimizer.start()

    def merge(self) -> None:
        """Nothing to do: the subspaces come apart in the backward pass."""

    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def finite(self) -> bool:
        return True

    def step(self, facts: Facts) -> None:
        self.optimizer.signals = Signals(facts.losses, facts.targets)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def weights(self) -> dict[str, Tensor]:
        found = {name: layer.weight.detach() for name, layer in self.attached.layers.items()}
        low = {name: layer.remainder for name, layer in self.attached.layers.items()}
        return found | {f"{name}.remainder": part for name, part in low.items() if part is not None}

    def pull(self, start: dict[str, Tensor], keep: float) -> None:
        for name, layer in self.attached.layers.items():
            before = joined(local(start[name]), start.get(f"{name}.remainder"))
            change = layer.exact() - (before.t() if layer.transposed else before)
            layer.add(change, keep - 1)

    def observations(self) -> tuple[dict[str, float], list[dict[str, float | str]]]:
        """Gradient cosine between the tasks by layer, from shared-basis coefficients; captured energy; gates."""
        rows: list[dict[str, float | str]] = []
        for name, layer in self.attached.layers.items():
            if layer.shared_by_task is None:
                continue
            rec, src = mean_(layer.shared_by_task).flatten(1)
            both = bool(rec.any()) and bool(src.any())  # a task alone has no angle
            cosine = float(torch.nn.functional.cosine_similarity(rec, src, dim=0)) if both else math.nan
            rows.append(
                {"module": name, "cosine": cosine, "energy_shared": self.optimizer.energy.get(name, float("nan"))}
            )
            layer.shared_by_task = None
        energy = list(self.optimizer.energy.values())
        scalars = {
            "gate/rec": self.optimizer.gates[0],
            "gate/src": self.optimizer.gates[1],
            "cosine/rec_src": sum(float(row["cosine"]) for row in rows) / len(rows) if rows else math.nan,
        }
        if energy:
            scalars["energy/shared"] = sum(energy) / len(energy)
        return scalars, rows

    def finish(self) -> None:
        for layer in self.attached.layers.values():
            layer.widen()
        self.attached.detach()

    @torch.no_grad()
    def settle(self, before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
        """W = W0 + P (W - W0) for the tensors of `after`, in place: every step's rounding of W to float32 leaves P."""
        for name, layer in self.attached.layers.items():
            space, low = self.projectors.get(name), after.get(f"{name}.remainder")
            if space is None:
                continue
            change = (joined(after[name], low) - before[name]).double()
            held = space(change).t() if layer.transposed else space(change.t().contiguous())
            settled = before[name] + held.t()
            if low is None:
                after[name].copy_(settled)
            else:
                for half, tensor in zip(halves(settled.float()), (after[name], low), strict=True):
                    tensor.copy_(half)

    def certificate(self, before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, float]:
        """|dW K0| / (|dW| |K0|) by layer, K0 the directions general text uses; weights before and after by name.

        Raises GemstError when more leaves a null space than every step's rounding of W to float32 can take out.
        """
        leaks = {}
        roundings = 4 * torch.finfo(torch.float32).eps * (self.optimizer.param_groups[0]["steps"] + 1) ** 0.5
        for name, layer in self.attached.layers.items():
            space = self.projectors.get(name)
            change = joined(after[name], after.get(f"{name}.remainder")) - before[name]
            change = (change.t() if layer.transposed else change).double()
            if space is None or not bool(change.any()):
                continue
            outside = change - space(change.t().contiguous()).t()
            used = change.shape[1] - space.dimensions
            leaks[name] = float(outside.norm() / (change.norm() * used**0.5))
            if float(outside.norm()) > 1e-4 * float(change.norm()) + roundings * float(before[name].norm()):
                raise GemstError(
                    f"tuning has left the null space of {name} (leak {leaks[name]:.1e}): the model is not written",
                    "Something beside the optimizer has changed its weight",
                )
        return leaks

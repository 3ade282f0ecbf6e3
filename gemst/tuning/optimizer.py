"""Gems: Adam on subspace coefficients, folded into the weights inside the null space (docs/tuning.md)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from gemst.errors import GemstError
from gemst.tuning.adam import adam_
from gemst.tuning.bases import (
    Projector,
    captured_energy,
    check_inside,
    check_rooms,
    first_sketch,
    refreshed,
    rotate_,
    warm_sketch,
    whole_space,
    without_bases,
)
from gemst.tuning.gates import Gate, Signals
from gemst.tuning.parallel import everywhere, from_first_, local, whole
from gemst.tuning.route import UNSAID
from gemst.tuning.signals import alignment, gradient_norm
from gemst.tuning.subspace import Attached, SubspaceLinear

P = ParamSpec("P")
T = TypeVar("T")


def in_float32(method: Callable[P, T]) -> Callable[P, T]:
    """Run a method without autocast: matrix products in bfloat16 would leave the null space."""

    @functools.wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return method(*args, **kwargs)

    return run


class Gems(torch.optim.Optimizer):
    """W <- W - lr * scale * (N_sh Q_sh^T + g_rec N_rec Q_rec^T + g_src N_src Q_src^T), N from Adam on C_s = G_s Q_s.

    Group 0 holds the coefficient parameters of `attached`, group 1 the item-token rows (plain Adam). Bases are
    refreshed every `refresh_every` steps, staggered over layers; moments are rotated into the new basis. A task without
    rows in a step leaves its basis, its moments, its bias-correction count and its share of the weights untouched; one
    that the first step lacks gets its bases from the first step that has it. Steps with a NaN or Inf gradient are
    skipped and counted in `skipped`.

    Before a step's first forward pass set `signals` (which tasks the whole step has, over all its batches and all
    processes) and call `prepare()`, which arms due refreshes; before each one say with `attached.announce` where the
    search rows begin. `begin()` does all three where a step has one batch and one process. The very first step takes
    the bases from its gradients and changes no weight. Weight decay is made up for when a layer's basis is refreshed;
    `catch_up()` does so at once, before the model is judged or saved.

    Raises GemstError when `projectors` lack a layer or leave less room than its subspaces take, or when the decay of
    one step would be the whole weight.
    """

    def __init__(
        self,
        attached: Attached,
        items: Iterable[nn.Parameter],
        gate: Gate,
        projectors: dict[str, Projector] | None = None,
        *,
        lr: float = 1e-3,
        item_lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        scale: float = 1.0,
        weight_decay: float = 0.0,
        refresh_every: int = 100,
        seed: int = 0,
    ) -> None:
        self.attached, self.gate = attached, gate
        self.projectors: dict[str, Projector] = projectors or {}
        self.refresh_every = refresh_every
        self.generator = torch.Generator().manual_seed(seed)
        self.signals = Signals((0.0, 0.0), (0, 0))
        self.skipped = 0
        self.gates = (gate.config.rec, 1 - gate.config.rec)
        self.energy: dict[str, float] = {}  # captured energy by layer, as of its last refresh
        self._names = list(attached.layers)
        self._scratch: dict[tuple[int, ...], Tensor] = {}
        self._by_column: dict[Any, Tensor] = {}  # of the present step
        self._unborn: set[str] = set()  # tasks that no backward pass has shown yet: their bases are zero
        if lr * weight_decay >= 1:
            raise GemstError(f"lr {lr} times weight_decay {weight_decay} is 1 or more", "Lower tuning.weight_decay")
        check_rooms(attached.layers, self.projectors)
        groups: list[dict[str, Any]] = [
            {"params": [layer.coefficients for layer in attached.layers.values()], "lr": lr, "kind": "subspace",
             "scale": scale, "weight_decay": weight_decay, "steps": 0, "shrunk": [0.0] * len(attached.layers)},
            {"params": list(items), "lr": item_lr, "kind": "items"},
        ]  # fmt: skip
        super().__init__(groups, {"betas": betas, "eps": eps})
        for layer in attached.layers.values():
            self.state[layer.coefficients] = {
                "exp_avg": torch.zeros_like(layer.coefficients),
                "exp_avg_sq": torch.zeros_like(layer.coefficients),
                "counts": torch.zeros(3),  # bias-correction counts of rec, shared, src
                "basis": layer.basis,
            }

    @property
    def needs_first_bases(self) -> bool:
        """True until the first backward pass has given every layer a basis."""
        return not any(bool(layer.basis.any()) for layer in self.attached.layers.values())

    def _due(self, place: int) -> bool:
        """Whether this step refreshes the basis of the layer at `place`: the layers take turns."""
        step = self.param_groups[0]["steps"]
        return bool(step and (step + place * self.refresh_every // len(self._names)) % self.refresh_every == 0)

    @in_float32
    def prepare(self) -> None:
        """Arm the layers whose basis is due, before the forward pass that their new basis is taken from.

        Raises GemstError when `signals` do not say which tasks the step has.
        """
        self._check_said()
        first = self.needs_first_bases
        born = any(self._present()[task] for task in self._unborn)
        for place, (name, layer) in enumerate(self.attached.layers.items()):
            if layer.sketch is not None or not (first or born or self._due(place)):
                continue
            project = self.projectors.get(name, whole_space)
            if first:
                layer.sketch = first_sketch(layer, project, self.generator)
            else:
                momentum = self.state[layer.coefficients]["exp_avg"]
                layer.sketch = warm_sketch(layer, whole(momentum), project, self.generator)

    def _check_said(self) -> None:
        if not any(self.signals.samples):
            raise GemstError(
                "nothing says how many targets of each task this step has",
                "Set Gems.signals before Gems.prepare(), or call Gems.begin(...)",
            )

    def begin(
        self,
        boundary: int,
        targets: tuple[int, int],
        losses: tuple[float, float] = (0.0, 0.0),
        shape: tuple[int, tuple[int, ...]] | None = None,
    ) -> None:
        """Before the forward pass of a step's only batch: rows [0, boundary) are recommendation, the rest search.

        `targets` counts the labels of both tasks in the mean loss; `losses` is for the heuristic gate, if known;
        `shape`, (rows, (positions,)), is needed where Linears see flattened rows, as in OPT.
        """
        self.attached.announce(boundary, targets, shape)
        self.signals = Signals(losses, targets)
        self.prepare()

    @in_float32
    def start(self) -> None:
        """Take the first bases from the backward pass just done; its gradients are dropped.

        A pass with NaN or Inf in it gives none and counts as skipped. Raises GemstError when it was not prepared for.
        """
        right = [layer.sketch.right for layer in self.attached.layers.values() if layer.sketch is not None]
        if len(right) < len(self.attached.layers):
            raise GemstError("the first step was not prepared for", "Call Gems.begin(...) before its forward pass")
        if not self._finite(right):
            self.skip()
            return
        for name, layer in self.attached.layers.items():
            layer.basis.copy_(self._new_basis(name, layer))
            layer.sketch = layer.shared_by_task = None
        self._unborn = without_bases(self.attached.layers.values())
        self.zero_grad()

    def skip(self) -> None:
        """Drop the step's gradients, which are no numbers, and count it."""
        self.skipped += 1
        for layer in self.attached.layers.values():
            layer.sketch = layer.shared_by_task = None
        self.zero_grad()

    @staticmethod
    def _finite(tensors: list[Tensor]) -> bool:
        """Whether all of `tensors` are, on every process."""
        return bool(everywhere(torch.stack(torch._foreach_norm(tensors)).isfinite().all()))

    @in_float32
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every layer and of the item rows; returns the closure's value, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = [local(p.grad) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if gradients:
            self._check_said()
            self._update(gradients)
        self.attached.route.boundary = UNSAID  # the next step's rows are for its caller to say, and its tasks
        self.signals = Signals((0.0, 0.0), (0, 0))
        return loss

    def _update(self, gradients: list[Tensor]) -> None:
        if not self._finite(gradients):
            self.skip()
            return
        if self.needs_first_bases:
            self.start()
            return
        layers = list(self.attached.layers.values())
        armed = all(layer.sketch is not None for layer in layers)
        group = self.param_groups[0]
        if self.gate.config.kind == "heuristic":
            self.signals.norms = (gradient_norm(layers, "rec"), gradient_norm(layers, "src"))
        elif self.gate.config.kind == "learned":
            states = [(layer, self.state[layer.coefficients]) for layer in layers]
            applied = [(layer, state["applied"]) for layer, state in states if "applied" in state]
            self.signals.alignment = (alignment(applied, "rec"), alignment(applied, "src"))
        self.gates = self.gate.update(self.signals)
        self._by_column.clear()
        shrink = math.log1p(-group["lr"] * group["weight_decay"])
        for place, (name, layer) in enumerate(self.attached.layers.items()):
            self._step_layer(name, layer, group)
            group["shrunk"][place] += shrink
            if shrink and self._due(place):
                self._decay(name, layer, -math.expm1(group["shrunk"][place]))
                group["shrunk"][place] = 0.0
        group["steps"] += 1
        if armed and self._unborn:
            self._unborn = without_bases(self.attached.layers.values())
        for parameter in self.param_groups[1]["params"]:
            if parameter.grad is not None:
                adam_(parameter, self.state[parameter], self.param_groups[1])

    @in_float32
    def catch_up(self) -> None:
        """Apply the weight decay of the steps since each layer's last turn."""
        group = self.param_groups[0]
        for place, (name, layer) in enumerate(self.attached.layers.items()):
            if group["shrunk"][place]:
                self._decay(name, layer, -math.expm1(group["shrunk"][place]))
                group["shrunk"][place] = 0.0

    def _present(self) -> dict[str, bool]:
        """Subspaces with rows in this step."""
        rec, src = self.signals.samples
        return {"rec": rec > 0, "shared": True, "src": src > 0}

    def _active(self) -> tuple[bool, ...]:
        """By subspace, whether it takes part in this step: it has rows, and a basis to see them in."""
        return tuple(there and name not in self._unborn for name, there in self._present().items())

    def _step_layer(self, name: str, layer: SubspaceLinear, group: dict[str, Any]) -> None:
        if layer.coefficients.grad is None:
            return
        gradient = local(layer.coefficients.grad)
        state = self.state[layer.coefficients]
        moment, square = local(state["exp_avg"]), local(state["exp_avg_sq"])
        active = torch.tensor(self._active(), dtype=torch.float32)
        state["counts"] += active
        fresh1, fresh2, correct1, correct2, weight = self._columns(layer, active, state["counts"], group, gradient)
        moment.lerp_(gradient, fresh1)
        # One scratch per shape: on CPU a fresh buffer per operation costs more than the arithmetic.
        shape = tuple(gradient.shape)
        if shape not in self._scratch:
            self._scratch[shape] = torch.empty_like(gradient)
        scratch = self._scratch[shape]
        square.lerp_(torch.mul(gradient, gradient, out=scratch), fresh2)
        size = torch.div(square, correct2, out=scratch).sqrt_().add_(group["eps"])
        normalised = torch.div(moment, size, out=scratch).mul_(correct1)
        if self.gate.config.kind == "learned":
            applied = state.setdefault("applied", torch.zeros_like(layer.coefficients))
            local(applied).copy_(normalised)
        normalised *= weight
        layer.fold(normalised, layer.basis, -group["lr"] * group["scale"])
        if layer.sketch is not None:
            self._refresh(name, layer, state)

    def _columns(
        self, layer: SubspaceLinear, active: Tensor, counts: Tensor, group: dict[str, Any], like: Tensor
    ) -> Tensor:
        """By basis column, (5, R): what both moments take of the new gradient, the corrections of their bias, the gate.

        Nearly all layers of a step share them: they are made once a step for each width and count.
        """
        widths = (layer.widths.rec, layer.widths.shared, layer.widths.src)
        key = (widths, tuple(counts.tolist()), like.device)
        if key not in self._by_column:
            beta1, beta2 = group["betas"]
            seen = counts.clamp(min=1)
            live, correct1, correct2, weight = torch.stack([
                active, 1 - beta1**seen, 1 - beta2**seen, active * torch.tensor([self.gates[0], 1.0, self.gates[1]]),
            ]).repeat_interleave(torch.tensor(widths), dim=1).to(like)  # fmt: skip
            values = [live * (1 - beta1), live * (1 - beta2), live / correct1, correct2, weight]
            self._by_column[key] = torch.stack(values)
        return self._by_column[key]

    def _decay(self, name: str, layer: SubspaceLinear, amount: float) -> None:
        """Shrink the W P component by what the steps since the last time amount to; W (I - P) stays."""
        layer.add(self.projectors.get(name, whole_space)(layer.exact().t()).t(), -amount)

    def _new_basis(self, name: str, layer: SubspaceLinear) -> Tensor:
        """The basis that the sketch of all processes gives; process 0's, so that replicas cannot drift apart."""
        present = self._present()
        return from_first_(refreshed(layer, self.projectors.get(name, whole_space), self.generator, present))

    def _refresh(self, name: str, layer: SubspaceLinear, state: dict[str, Tensor]) -> None:
        """New basis from the sketch, and the moments on it."""
        if layer.widths.shared:
            self.energy[name] = captured_energy(layer)
        basis = self._new_basis(name, layer)
        rotate_({key: local(state[key]) for key in ("exp_avg", "exp_avg_sq", "applied") if key in state}, layer, basis)
        layer.basis.copy_(basis)
        layer.sketch = None

    def state_dict(self) -> dict[str, Any]:
        """Moments, counts and bases, and what the next step depends on beside them: gate, generator, counters."""
        for layer in self.attached.layers.values():  # the model may have been moved since
            self.state[layer.coefficients]["basis"] = layer.basis
        own = {
            "gate_logit": self.gate.logit, "gates": self.gates, "generator": self.generator.get_state(),
            "skipped": self.skipped, "energy": dict(self.energy),
        }  # fmt: skip
        return {**super().state_dict(), "gems": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; the layers' bases are overwritten with the saved ones.

        Raises GemstError when these were made for another null space.
        """
        super().load_state_dict(state_dict)
        own = state_dict["gems"]
        self.gate.logit, self.gates, self.skipped = own["gate_logit"], tuple(own["gates"]), own["skipped"]
        self.energy = dict(own["energy"])
        self.generator.set_state(own["generator"].cpu())
        for name, layer in self.attached.layers.items():
            state = self.state[layer.coefficients]
            basis = state["basis"]
            check_inside(name, basis, self.projectors.get(name, whole_space))
            layer.basis.copy_(basis)
            state["basis"], state["counts"] = layer.basis, state["counts"].cpu()
        self._unborn = without_bases(self.attached.layers.values())

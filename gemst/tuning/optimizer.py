"""Gems: Adam on subspace coefficients, folded into the weights inside the null space (DESIGN.md §4.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gemst.tuning.bases import Projector, captured_energy, first_sketch, refreshed, warm_sketch
from gemst.tuning.gates import Gate, Signals
from gemst.tuning.parallel import everywhere, from_first_, local, over_shards, whole
from gemst.tuning.subspace import Attached, SubspaceLinear

SUBSPACES = ("rec", "shared", "src")


def whole_space(vectors: Tensor) -> Tensor:
    """The projector of a layer without a null space."""
    return vectors


class Gems(torch.optim.Optimizer):
    """W <- W - lr * scale * (N_sh Q_sh^T + g_rec N_rec Q_rec^T + g_src N_src Q_src^T), N from Adam on C_s = G_s Q_s.

    Group 0 holds the coefficient parameters of `attached`, group 1 the item-token rows (plain Adam). Bases are
    refreshed every `refresh_every` steps, staggered over layers; moments are rotated into the new basis. A task without
    rows in a step leaves its moments, its bias-correction count and its share of the weights untouched. Steps with a
    NaN or Inf gradient are skipped and counted in `skipped`.

    Call `prepare()` before each backward pass of a step (it arms due refreshes) and set `signals` before `step()`.
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
        self.signals = Signals((0.0, 0.0), (0.0, 0.0), (0, 0))
        self.skipped = 0
        self.gates = (gate.config.rec, 1 - gate.config.rec)
        self.energy: dict[str, float] = {}  # captured energy by layer, as of its last refresh
        self._names = list(attached.layers)
        self._scratch: dict[tuple[int, ...], Tensor] = {}
        groups: list[dict[str, Any]] = [
            {"params": [layer.coefficients for layer in attached.layers.values()], "lr": lr, "kind": "subspace",
             "scale": scale, "weight_decay": weight_decay, "steps": 0, "decay": 0.0},
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

    def prepare(self) -> None:
        """Arm the layers whose basis is due, before the backward pass that their new basis is taken from."""
        first, step = self.needs_first_bases, self.param_groups[0]["steps"]
        for place, (name, layer) in enumerate(self.attached.layers.items()):
            project = self.projectors.get(name, whole_space)
            if first:
                layer.sketch = first_sketch(layer, project, self.generator)
            elif step and (step + place * self.refresh_every // len(self._names)) % self.refresh_every == 0:
                momentum = self.state[layer.coefficients]["exp_avg"]
                layer.sketch = warm_sketch(layer, whole(momentum), project, self.generator)

    @torch.no_grad()
    def start(self) -> None:
        """Take the first bases from the backward pass just done; its gradients are dropped."""
        for name, layer in self.attached.layers.items():
            layer.basis.copy_(self._new_basis(name, layer))
            layer.sketch = layer.shared_by_task = None
        self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every layer and of the item rows; returns the closure's value, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = [local(p.grad) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not everywhere(torch.stack(torch._foreach_norm(gradients)).isfinite().all()):
            self.skipped += 1
            for layer in self.attached.layers.values():
                layer.sketch = layer.shared_by_task = None
            return loss
        group = self.param_groups[0]
        if self.gate.config.kind == "learned":
            self.signals.alignment = (self._alignment("rec"), self._alignment("src"))
        self.gates = self.gate.update(self.signals, group["lr"] * group["scale"])
        group["steps"] += 1
        group["decay"] = 1 - (1 - group["decay"]) * (1 - group["lr"] * group["weight_decay"])
        for name, layer in self.attached.layers.items():
            self._step_layer(name, layer, group)
        if group["steps"] % self.refresh_every == 0:
            group["decay"] = 0.0
        for parameter in self.param_groups[1]["params"]:
            self._step_rows(parameter, self.param_groups[1])
        return loss

    def _active(self) -> tuple[bool, bool, bool]:
        rec, src = self.signals.samples
        return rec > 0, True, src > 0

    def _alignment(self, subspace: str) -> float:
        """<C_s(t+1), N_s(t)> over all layers: positive where the last update still points downhill."""
        total = 0.0
        for layer in self.attached.layers.values():
            applied, gradient = self.state[layer.coefficients].get("applied"), layer.coefficients.grad
            if applied is not None and gradient is not None:
                columns = layer.widths.columns(subspace)
                both = (local(applied)[:, columns] * local(gradient)[:, columns]).sum()
                total += float(over_shards(both, of=gradient))
        return total

    def _step_layer(self, name: str, layer: SubspaceLinear, group: dict[str, Any]) -> None:
        if layer.coefficients.grad is None:
            return
        gradient = local(layer.coefficients.grad)
        state, (beta1, beta2) = self.state[layer.coefficients], group["betas"]
        moment, square, weights = local(state["exp_avg"]), local(state["exp_avg_sq"]), local(layer.weight)
        active = torch.tensor(self._active(), dtype=torch.float32)
        state["counts"] += active
        by_column = self._columns(layer, torch.stack([
            active, 1 - beta1 ** state["counts"].clamp(min=1), 1 - beta2 ** state["counts"].clamp(min=1),
            active * torch.tensor([self.gates[0], 1.0, self.gates[1]]),
        ]))  # fmt: skip
        live, correct1, correct2, weight = by_column.to(gradient)
        moment.lerp_(gradient, live * (1 - beta1))
        # One scratch per shape: on CPU a fresh buffer per operation costs more than the arithmetic.
        shape = tuple(gradient.shape)
        if shape not in self._scratch:
            self._scratch[shape] = torch.empty_like(gradient)
        scratch = self._scratch[shape]
        square.lerp_(torch.mul(gradient, gradient, out=scratch), live * (1 - beta2))
        size = torch.div(square, correct2, out=scratch).sqrt_().add_(group["eps"])
        normalised = torch.div(moment, size, out=scratch).mul_(live / correct1)
        if self.gate.config.kind == "learned":
            applied = state.setdefault("applied", torch.zeros_like(layer.coefficients))
            local(applied).copy_(normalised)
        normalised *= weight
        delta = -group["lr"] * group["scale"]
        if layer.transposed:
            weights.addmm_(layer.basis, normalised.t(), alpha=delta)
        else:
            weights.addmm_(normalised, layer.basis.t(), alpha=delta)
        if group["decay"] and group["steps"] % self.refresh_every == 0:
            self._decay(name, layer, group["decay"])
        if layer.sketch is not None:
            self._refresh(name, layer, state)

    @staticmethod
    def _columns(layer: SubspaceLinear, values: Tensor) -> Tensor:
        """Spread values per subspace (k, 3) over the basis columns (k, R)."""
        widths = torch.tensor([layer.widths.rec, layer.widths.shared, layer.widths.src])
        return values.repeat_interleave(widths, dim=1)

    def _decay(self, name: str, layer: SubspaceLinear, amount: float) -> None:
        """Shrink the W P component by what `refresh_every` steps of decay amount to; W (I - P) stays."""
        inside = self.projectors.get(name, whole_space)(local(layer.matrix).t())
        local(layer.weight).add_(inside if layer.transposed else inside.t(), alpha=-amount)

    def _new_basis(self, name: str, layer: SubspaceLinear) -> Tensor:
        """The basis that the sketch of all processes gives; process 0's, so that replicas cannot drift apart."""
        return from_first_(refreshed(layer, self.projectors.get(name, whole_space), self.generator))

    def _refresh(self, name: str, layer: SubspaceLinear, state: dict[str, Tensor]) -> None:
        """New basis from the sketch; each subspace's moments are rotated by R = Q_old^T Q_new (squares by R^2)."""
        self.energy[name] = captured_energy(layer)
        basis = self._new_basis(name, layer)
        moments = {key: local(state[key]) for key in ("exp_avg", "exp_avg_sq", "applied") if key in state}
        for subspace in SUBSPACES:
            columns = layer.widths.columns(subspace)
            rotation = layer.basis[:, columns].t() @ basis[:, columns]
            for key, moment in moments.items():
                by = rotation.pow(2) if key == "exp_avg_sq" else rotation
                moment[:, columns] = moment[:, columns] @ by
        layer.basis.copy_(basis)
        layer.sketch = None

    def _step_rows(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        if parameter.grad is None:
            return
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if not state:
            state.update(
                step=torch.zeros(()), exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter)
            )
        state["step"] += 1
        count = float(state["step"])
        gradient, moment, square = local(parameter.grad), local(state["exp_avg"]), local(state["exp_avg_sq"])
        moment.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        size = (square / (1 - beta2**count)).sqrt_().add_(group["eps"])
        local(parameter).addcdiv_(moment, size, value=-group["lr"] / (1 - beta1**count))

    def state_dict(self) -> dict[str, Any]:
        """Moments, counts and bases, and what the next step depends on beside them: gate, generator, counters."""
        own = {
            "gate_logit": self.gate.logit, "gates": self.gates, "generator": self.generator.get_state(),
            "skipped": self.skipped, "energy": dict(self.energy),
        }  # fmt: skip
        return {**super().state_dict(), "gems": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; the layers' bases are overwritten with the saved ones."""
        super().load_state_dict(state_dict)
        own = state_dict["gems"]
        self.gate.logit, self.gates, self.skipped = own["gate_logit"], tuple(own["gates"]), own["skipped"]
        self.energy = dict(own["energy"])
        self.generator.set_state(own["generator"])
        for layer in self.attached.layers.values():
            layer.basis.copy_(self.state[layer.coefficients]["basis"])
            self.state[layer.coefficients]["basis"] = layer.basis

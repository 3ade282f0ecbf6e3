"""Subspace Linear: coefficient gradients of three subspaces from one backward pass, never an m x n gradient.

A Linear with weight W (m, n) = (out, in) gets an orthonormal basis Q (n, R), columns ordered [rec | shared | src], and
a zero parameter `coefficients` (m, R) that the forward ignores. Rows of a batch are sorted by task, so in the backward

    C_rec = dY_rec^T (X_rec Q_rec),  C_src = dY_src^T (X_src Q_src),  C_shared = dY^T (X Q_shared)

are slices of one pass. They arrive as the gradient of `coefficients`; W itself requires none.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gemst.errors import GemstError
from gemst.tuning.parallel import local
from gemst.tuning.route import UNSAID, Route, Sketch, Widths


class SubspaceLinear(nn.Module):
    """Takes the place of a Linear (or GPT-2's Conv1D) while it is tuned; holds the very same weight parameter."""

    def __init__(self, inner: nn.Module, widths: Widths, route: Route) -> None:
        super().__init__()
        self.transposed = not isinstance(inner, nn.Linear)  # Conv1D keeps W^T
        self.weight: nn.Parameter = inner.weight  # type: ignore[assignment]
        self.bias: nn.Parameter | None = inner.bias  # type: ignore[assignment]
        self.widths, self.route = widths, route
        out_features, in_features = self.matrix.shape
        self.coefficients = nn.Parameter(torch.zeros(out_features, widths.total, device=self.weight.device))
        self.register_buffer(
            "basis", torch.zeros(in_features, widths.total, device=self.weight.device), persistent=False
        )
        self.basis: Tensor
        self.sketch: Sketch | None = None
        self.shared_by_task: Tensor | None = None  # (2, m, r_shared): C_shared of rec and src, when observed
        # The low half of the float32 whose high half is a bfloat16 `weight`, see `narrow`.
        narrow = self.weight.dtype == torch.bfloat16
        self.remainder = torch.zeros_like(self.weight, dtype=torch.int16) if narrow else None
        self.keeps_copies = True  # of W in the compute type; not where W itself is there for one pass only
        self._copies: dict[torch.dtype, tuple[int, Tensor]] = {}

    @property
    def matrix(self) -> Tensor:
        """W as (out, in)."""
        return self.weight.detach().t() if self.transposed else self.weight.detach()

    def exact(self) -> Tensor:
        """W as (out, in) in float32, however it is stored."""
        whole = self._whole()
        return whole.t() if self.transposed else whole

    def narrow(self) -> None:
        """Store W as the bfloat16 that the forward pass reads and 16 bits more: together they are its float32."""
        self._store(self._whole())

    def widen(self) -> None:
        """Undo `narrow`: W is one float32 tensor again."""
        self.weight.data, self.remainder = self._whole(), None

    def _whole(self) -> Tensor:
        return joined(local(self.weight.detach()), self.remainder)

    def _store(self, whole: Tensor) -> None:
        self.weight.data, self.remainder = halves(whole)

    @torch.no_grad()
    def fold(self, left: Tensor, right: Tensor, alpha: float) -> None:
        """W += alpha * left right^T, for left (m, k) and right (n, k) in float32."""
        rows, columns = (right, left) if self.transposed else (left, right)
        whole = self._whole()
        whole.addmm_(rows.to(whole), columns.t().to(whole), alpha=alpha)
        if self.remainder is not None:
            self._store(whole)

    @torch.no_grad()
    def add(self, change: Tensor, alpha: float) -> None:
        """W += alpha * change, (m, n) in float32."""
        whole = self._whole()
        whole.add_((change.t() if self.transposed else change).to(whole), alpha=alpha)
        if self.remainder is not None:
            self._store(whole)

    def cast_matrix(self, dtype: torch.dtype) -> Tensor:
        """W in the compute type; the copy is remade only after W changed."""
        if dtype == self.weight.dtype:
            return self.matrix
        if not self.keeps_copies:
            return self.matrix.to(dtype)
        version, copy = self._copies.get(dtype, (-1, torch.empty(0)))
        if version != self.weight._version or copy.device != self.weight.device:
            version, copy = self.weight._version, self.matrix.to(dtype)
            self._copies[dtype] = (version, copy)
        return copy

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.weight.dtype
        with torch.autocast(kind, enabled=False):
            bias = None if self.bias is None else self.bias.to(dtype)
            if torch.is_grad_enabled() and self.coefficients.requires_grad:
                y: Tensor = _Project.apply(x.to(dtype), self.coefficients, self)
                return y if bias is None else y + bias
            return functional.linear(x.to(dtype), self.cast_matrix(dtype), bias)


def halves(whole: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 as the nearest bfloat16 and an int16, the rest of its bits: `joined` gives back every bit.

    Ties go away from zero, not to the even neighbour as torch has it: the rest of one that went down were 2^15.
    """
    bits = whole.view(torch.int32)
    high = (bits + 2**15) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def joined(high: Tensor, low: Tensor | None) -> Tensor:
    """The float32 whose halves are the bfloat16 `high` and the int16 `low`; `high` itself where there is no `low`."""
    return high if low is None else (high.float().view(torch.int32) + low).view(torch.float32)


class _Project(torch.autograd.Function):
    """y = x W^T; the gradient of `coefficients` is C = dY^T (X Q), task by task."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, coefficients: Tensor, layer: SubspaceLinear) -> Tensor:
        ctx.layer, ctx.thin = layer, False
        ctx.boundary = boundary = layer.route.split(x)
        if layer.sketch is None and boundary not in (None, UNSAID):
            # X Q is all the backward needs of X, and it is several times thinner.
            basis, widths = layer.basis.to(x.dtype), layer.widths
            rec = x[:boundary].flatten(0, -2) @ basis[:, : widths.rec + widths.shared]
            src = x[boundary:].flatten(0, -2) @ basis[:, widths.rec :]
            ctx.save_for_backward(rec, src)
            ctx.thin = True
        else:
            ctx.save_for_backward(x)
        return functional.linear(x, layer.cast_matrix(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (dy,) = grads
        layer: SubspaceLinear = ctx.layer
        dx = dy @ layer.cast_matrix(dy.dtype) if ctx.needs_input_grad[0] else None
        coefficients = _coefficients(ctx, dy, layer) if ctx.needs_input_grad[1] else None
        return dx, coefficients, None


def _coefficients(ctx: Any, dy: Tensor, layer: SubspaceLinear) -> Tensor:
    """C (m, R) in float32, and the sketch of a due refresh on the way."""
    widths, route = layer.widths, layer.route
    if ctx.boundary == UNSAID:
        raise GemstError(
            "nobody said which rows of the batch are search", "Call Gems.begin(...) before each step's forward pass"
        )
    total = torch.zeros_like(layer.coefficients)
    shared = widths.columns("shared")
    if ctx.boundary is None:
        rows = [(route.backward, dy, ctx.saved_tensors[0])]
    else:
        halves = _split(dy, ctx.boundary)
        saved = ctx.saved_tensors if ctx.thin else _split(ctx.saved_tensors[0], ctx.boundary)
        rows = [(task, halves[task], saved[task]) for task in (0, 1) if halves[task].shape[0]]
    if route.observe and layer.shared_by_task is None:
        layer.shared_by_task = total.new_zeros(2, total.shape[0], widths.shared)
    for task, part, known in rows:
        part = part.flatten(0, -2)
        columns = slice(0, shared.stop) if task == 0 else slice(shared.start, widths.total)
        own = layer.widths.columns("rec" if task == 0 else "src")
        if ctx.thin:
            thin = known
        else:
            known = known.flatten(0, -2)
            thin = known @ layer.basis[:, columns].to(known.dtype)
        product = (part.t() @ thin).float()
        at = own.start - columns.start
        in_shared = shared.start - columns.start
        total[:, own] += product[:, at : at + (own.stop - own.start)] * route.weights[task]
        of_shared = product[:, in_shared : in_shared + widths.shared]
        total[:, shared] += of_shared
        if route.observe and layer.shared_by_task is not None:
            layer.shared_by_task[task] += of_shared
        if layer.sketch is not None:
            layer.sketch.shared += of_shared
            _accumulate(layer.sketch, part, known, widths, task, route.weights[task])
    return total


def _accumulate(sketch: Sketch, dy: Tensor, x: Tensor, widths: Widths, task: int, weight: float) -> None:
    own, shared = widths.columns("rec" if task == 0 else "src"), widths.columns("shared")
    left = sketch.left.to(dy.dtype)
    sketch.right[:, own] += (x.t() @ (dy @ left[:, own])).float() * weight
    sketch.right[:, shared] += (x.t() @ (dy @ left[:, shared])).float()
    sketch.probed += (dy.t() @ (x @ sketch.probe.to(x.dtype))).float()


def _split(x: Tensor, boundary: int) -> tuple[Tensor, Tensor]:
    return x[:boundary], x[boundary:]


@dataclass
class Attached:
    """The subspace layers of a model, by module name, and the route they share."""

    model: nn.Module
    layers: dict[str, SubspaceLinear]
    route: Route = field(default_factory=Route)

    def announce(
        self,
        boundary: int | None,
        targets: tuple[int, int],
        shape: tuple[int, tuple[int, ...]] | None = None,
    ) -> None:
        """What the next pass needs: where search rows begin, the labels of both tasks in its mean loss, and `Route`'s
        `shape` for models whose Linears see flattened rows."""
        total = sum(targets)
        self.route.coupled, self.route.shape = False, shape
        self.route.boundary, self.route.weights = boundary, (total / max(targets[0], 1), total / max(targets[1], 1))

    def detach(self) -> None:
        """Put the plain modules back; the tuned weights are in them already."""
        for name, layer in self.layers.items():
            parent, leaf = _parent(self.model, name)
            setattr(parent, leaf, _plain(layer))


def matching(model: nn.Module, pattern: str) -> dict[str, nn.Module]:
    """Linear and Conv1D modules whose name matches `pattern`, but for the head: item tokens have their own rows there.

    Raises GemstError when none does.
    """
    from transformers.pytorch_utils import Conv1D

    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise GemstError(f"tuning.modules = {pattern!r} is no regular expression: {error}") from None
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    linears: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
    found = {name: module for name, module in linears.items() if expression.search(name)}
    if not found:
        leaves = sorted({name.rsplit(".", 1)[-1] for name in linears})
        raise GemstError(
            f"tuning.modules = {pattern!r} matches no Linear of the backbone",
            f"Its Linears are named {', '.join(leaves)}",
        )
    return found


def attach(
    model: nn.Module, pattern: str, rank: int, subspaces: str = "all", rooms: dict[str, int] | None = None
) -> Attached:
    """Freeze `model` and replace every matching Linear by a SubspaceLinear, in place.

    `rank` is that of the shared subspace; rec and src take half of it each. `rooms` gives, per module, the dimensions
    of the null space; ranks shrink to fit it. Raises GemstError when `rank` exceeds a layer's width, when `rooms` lacks
    a layer, or when a weight is neither float32 (or float64) nor bfloat16.
    """
    modules = matching(model, pattern)
    if rooms is not None:
        require_rooms(modules, rooms)
    model.requires_grad_(False)
    attached = Attached(model, {})
    for name, module in modules.items():
        rows: Tensor = module.weight  # type: ignore[assignment]
        width = int(rows.shape[1] if isinstance(module, nn.Linear) else rows.shape[0])
        if rank > width:
            raise GemstError(
                f"tuning.rank = {rank} exceeds the width {width} of {name}", f"Set tuning.rank to {width} or less"
            )
        if rows.dtype not in (torch.float32, torch.float64, torch.bfloat16):
            raise GemstError(f"{name} is stored as {rows.dtype}", "Load the model in torch.float32 or torch.bfloat16")
        room = width if rooms is None else rooms[name]
        layer = SubspaceLinear(module, _widths(rank, subspaces, room), attached.route)
        parent, leaf = _parent(model, name)
        setattr(parent, leaf, layer)
        attached.layers[name] = layer
    return attached


def require_rooms(modules: Iterable[str], spaces: Container[str]) -> None:
    """Raises GemstError naming the first module that the null space has no part for."""
    absent = next((name for name in modules if name not in spaces), None)
    if absent is not None:
        raise GemstError(
            f"the null space has no part for {absent}", "It was made for other tuning.modules: run `gemst null-space`"
        )


def _widths(rank: int, subspaces: str, room: int) -> Widths:
    half = max(1, rank // 2)
    rec, shared, src = {"all": (half, rank, half), "shared": (0, rank, 0), "specific": (half, 0, half)}[subspaces]
    if subspaces == "specific":
        return Widths(min(rec, room), 0, min(src, room))
    shared = min(shared, room if subspaces == "shared" else max(1, room * 2 // 3))
    # A specific basis is orthogonal to the shared one, so both together have to fit.
    return Widths(min(rec, room - shared), shared, min(src, room - shared))


def _plain(layer: SubspaceLinear) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    out_features, in_features = layer.matrix.shape
    plain: nn.Module
    if layer.transposed:
        plain = Conv1D(out_features, in_features)
    else:
        plain = nn.Linear(in_features, out_features, bias=layer.bias is not None, device="meta")
    plain.weight = layer.weight
    plain.bias = layer.bias  # type: ignore[assignment]
    return plain


def _parent(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf

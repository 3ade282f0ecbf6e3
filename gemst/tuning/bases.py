"""Orthonormal bases inside the null space, by warm subspace iteration from thin products."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from gemst.errors import GemstError
from gemst.tuning.parallel import mean_
from gemst.tuning.route import Sketch
from gemst.tuning.subspace import SubspaceLinear

_OUTSIDE = 1e-4  # the most of a basis vector that may lie outside range(P): float32 leaves 1e-7


class Projector(Protocol):
    """An orthogonal projector P (n, n), applied without being formed."""

    def __call__(self, vectors: Tensor) -> Tensor:
        """P @ vectors, (n, k) -> (n, k)."""
        ...


def whole_space(vectors: Tensor) -> Tensor:
    """The projector of a layer without a null space."""
    return vectors


def check_rooms(layers: dict[str, SubspaceLinear], projectors: dict[str, Projector]) -> None:
    """Raises GemstError when a null space that is given lacks a layer, or has no room for its subspaces."""
    for name, layer in layers.items() if projectors else ():
        if name not in projectors:
            raise GemstError(
                f"projectors have no entry for {name}", "Name them like the layers of `attached`, or give none"
            )
        room = getattr(projectors[name], "dimensions", None)
        need = layer.widths.shared + max(layer.widths.rec, layer.widths.src)
        if room is not None and need > room:
            raise GemstError(
                f"the null space of {name} has {room} dimensions, its subspaces take {need}",
                "Give `rooms` to attach: ranks shrink to fit",
            )


def check_inside(name: str, basis: Tensor, project: Projector) -> None:
    """Raises GemstError when a saved basis (n, r) of layer `name` does not lie in the null space of this run."""
    if float((basis - project(basis)).norm()) > _OUTSIDE * max(1.0, float(basis.norm())):
        raise GemstError(
            f"the bases of this optimizer state leave the null space of {name}: it was another one",
            "Resume with the null space the run began with, or begin anew",
        )


def orthonormal(vectors: Tensor, project: Projector, apart_from: Tensor, generator: torch.Generator) -> Tensor:
    """Orthonormal basis (n, r) of `vectors` within range(P), orthogonal to the basis `apart_from` (n, s).

    QR of a nearly rank-deficient matrix fills up with directions of its own choice, which need not lie in range(P): the
    gaps are filled with random directions first, and everything is projected and orthonormalised twice (float32 leaks
    1e-4 after one round, 1e-7 after two). Needs s + r <= rank P.
    """
    if vectors.shape[1] == 0:
        return vectors
    noise = torch.randn(vectors.shape, generator=generator).to(vectors)
    norm = torch.linalg.vector_norm(vectors)
    basis = vectors / norm.clamp(min=1e-30) + 1e-5 * noise / noise.norm()
    for _ in range(3):
        basis = project(basis)
        basis = basis - apart_from @ (apart_from.t() @ basis)
        basis = torch.linalg.qr(basis).Q
    return project(basis)


def first_sketch(layer: SubspaceLinear, project: Projector, generator: torch.Generator) -> Sketch:
    """Left factors of the randomised range finder (Halko et al. 2011): a Gaussian test matrix."""
    out_features, width = layer.coefficients.shape
    left = torch.randn(out_features, width, generator=generator).to(layer.basis)
    return _sketch(layer, left / out_features**0.5, project, generator)


def warm_sketch(layer: SubspaceLinear, momentum: Tensor, project: Projector, generator: torch.Generator) -> Sketch:
    """Left factors of a warm step: the range of the coefficients' first moment, which averages many batches."""
    left = torch.zeros_like(momentum)
    for name in ("rec", "shared", "src"):
        columns = layer.widths.columns(name)
        if columns.stop > columns.start:
            part = momentum[:, columns]
            noise = torch.randn(part.shape, generator=generator).to(part)
            scale = part.norm().clamp(min=1e-30)
            left[:, columns] = _tall_orthonormal(part / scale + 1e-6 * noise)
    return _sketch(layer, left, project, generator)


def _tall_orthonormal(matrix: Tensor) -> Tensor:
    """QR's Q, also for a matrix wider than tall (the surplus columns are zero and get filled later)."""
    q = torch.linalg.qr(matrix).Q
    return q if q.shape[1] == matrix.shape[1] else torch.nn.functional.pad(q, (0, matrix.shape[1] - q.shape[1]))


def _sketch(
    layer: SubspaceLinear, left: Tensor, project: Projector, generator: torch.Generator, probes: int = 8
) -> Sketch:
    probe = project(torch.randn(layer.basis.shape[0], probes, generator=generator).to(left))
    held = layer.basis[:, layer.widths.columns("shared")]
    probe = probe - held @ (held.t() @ probe)
    probed = left.new_zeros(left.shape[0], probes)
    shared = left.new_zeros(left.shape[0], layer.widths.shared)
    return Sketch(left, probe, torch.zeros_like(layer.basis), probed, shared)


def refreshed(
    layer: SubspaceLinear, project: Projector, generator: torch.Generator, present: dict[str, bool]
) -> Tensor:
    """The layer's new basis (n, R) = orth(P G^T U), specific subspaces orthogonal to the shared one.

    G is the gradient of all processes: their sketches are averaged first. A task that is not `present` showed no
    gradient: its subspace stays, but for what the new shared one takes; one that has none yet (zero) stays without.
    """
    sketch, widths = layer.sketch, layer.widths
    assert sketch is not None
    mean_(sketch.right)
    basis = torch.zeros_like(layer.basis)
    nothing = basis[:, :0]
    shared = orthonormal(sketch.right[:, widths.columns("shared")], project, nothing, generator)
    basis[:, widths.columns("shared")] = shared
    for name in ("rec", "src"):
        columns = widths.columns(name)
        vectors = sketch.right[:, columns] if present[name] else layer.basis[:, columns]
        if present[name] or bool(vectors.any()):
            basis[:, columns] = orthonormal(vectors, project, shared, generator)
    return basis


def captured_energy(layer: SubspaceLinear) -> float:
    """Share of |G P|^2 of the joint gradient that the shared basis Q holds: |G Q|^2 over it and the estimated rest."""
    sketch = layer.sketch
    assert sketch is not None
    rest = float(mean_(sketch.probed).pow(2).sum()) / sketch.probe.shape[1]
    held = float(mean_(sketch.shared).pow(2).sum())
    return held / max(held + rest, 1e-30)


def without_bases(layers: Iterable[SubspaceLinear]) -> set[str]:
    """Tasks whose basis is zero in every layer: no backward pass has shown them yet."""
    found = set()
    for task in ("rec", "src"):
        bases = [layer.basis[:, layer.widths.columns(task)] for layer in layers]
        if any(basis.shape[1] for basis in bases) and not any(bool(basis.any()) for basis in bases):
            found.add(task)
    return found


def rotate_(moments: dict[str, Tensor], layer: SubspaceLinear, basis: Tensor) -> None:
    """Turn coefficients (m, R) on the layer's basis into those on `basis`, subspace by subspace: R = Q_old^T Q_new.

    Squares (`exp_avg_sq`) are rotated by R^2, as if coefficients were uncorrelated. What a new direction has outside
    the old basis is unknown and counts as the row's mean: as zero it would make the next steps too large.
    """
    for subspace in ("rec", "shared", "src"):
        columns = layer.widths.columns(subspace)
        if columns.start == columns.stop:
            continue
        rotation = layer.basis[:, columns].t() @ basis[:, columns]
        known = rotation.pow(2)
        unknown = (1 - known.sum(0)).clamp(min=0)
        for key, moment in moments.items():
            old = moment[:, columns]
            if key == "exp_avg_sq":
                moment[:, columns] = old @ known + old.mean(1, keepdim=True) * unknown
            else:
                moment[:, columns] = old @ rotation

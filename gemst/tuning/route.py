"""What all subspace layers of a model must know of a batch, and what a refresh gathers on the way."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gemst.errors import GemstError

UNSAID = -1  # a boundary nobody has set


@dataclass
class Route:
    """What the backward pass of the current batch must know; one object shared by all layers of a model.

    Rows [0, boundary) are recommendation, the rest search. `weights` = (N / N_rec, N / N_src) turns the gradient of the
    joint mean loss over N targets into that of each task's own mean. `shape` holds the batch's rows and how long they
    are (an encoder-decoder has two lengths): a Linear that sees (rows x positions, n) is split in its right place.
    Where a layer sees something else, or `boundary` is None, the rows are coupled: all it sees then belongs to the task
    `backward` (0 or 1) whose loss is being differentiated.
    """

    boundary: int | None = UNSAID
    shape: tuple[int, tuple[int, ...]] | None = None
    coupled: bool = False  # a layer could not be split: one backward pass per task is needed
    weights: tuple[float, float] = (1.0, 1.0)
    backward: int = 0
    observe: bool = False  # keep the tasks' shared coefficients apart, for the gradient cosine

    def split(self, x: Tensor) -> int | None:
        """Where the search part of `x` begins along its first dimension; None where it has no such place.

        Raises GemstError when a row was said that is not there, or when rows may be flattened and nobody said how.
        """
        if self.boundary is None or self.boundary == UNSAID:
            return self.boundary
        if self.shape is None:
            if x.dim() == 2:
                raise GemstError(
                    f"a Linear sees {x.shape[0]} rows without positions: is each a row of the batch, or a position?",
                    "Say it: give Gems.begin or Attached.announce the `shape`, (rows, (positions,))",
                )
            if self.boundary > x.shape[0]:
                raise GemstError(f"search rows begin at {self.boundary}, the batch has {x.shape[0]}", "See Gems.begin")
            return self.boundary
        rows, lengths = self.shape
        if x.dim() > 2 and x.shape[0] == rows:
            return self.boundary
        if x.dim() == 2 and x.shape[0] in {rows * length for length in lengths}:
            return self.boundary * (x.shape[0] // rows)
        self.coupled = True
        return None


@dataclass
class Sketch:
    """Left factors of a refresh and what the backward pass gathers for it."""

    left: Tensor  # U (m, R), columns as in the basis
    probe: Tensor  # (n, p) random directions of range(P) outside the shared basis Q: they estimate |G (P - Q Q^T)|^2
    right: Tensor  # V = G^T U (n, R), accumulated
    probed: Tensor  # G probe of the joint gradient, (m, p), accumulated
    shared: Tensor  # its C_shared (m, r_shared), accumulated: clipping does not reach it


@dataclass(eq=False)
class Widths:
    """Columns of each subspace in a basis."""

    rec: int
    shared: int
    src: int

    @property
    def total(self) -> int:
        """R, columns of all three."""
        return self.rec + self.shared + self.src

    def columns(self, name: str) -> slice:
        """Slice of `rec`, `shared` or `src`."""
        start = {"rec": 0, "shared": self.rec, "src": self.rec + self.shared}[name]
        return slice(start, start + getattr(self, name))

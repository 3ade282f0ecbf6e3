"""What the loop trains on: token batches whose rows are sorted by task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gemst.errors import GemstError

if TYPE_CHECKING:
    import numpy as np
    import polars as pl
    from numpy.typing import NDArray

    from gemst.config import Config
    from gemst.prompts import Prompter


@dataclass
class Batch:
    """Rows [0, boundary) are recommendation, the rest search."""

    input_ids: Tensor  # (B, S)
    mask: Tensor  # chain: (B, 1, S, S) bool, True = may look; else (B, S)
    position_ids: Tensor | None  # (B, S)
    at: Tensor  # (targets,) flat positions whose state predicts a label
    labels: Tensor  # (targets,) vocabulary ids
    level: Tensor  # (targets,) ID level of each label
    boundary: int
    targets: tuple[int, int]  # labels of rec, src
    tokens: int  # real tokens, padding left out
    decoder_ids: Tensor | None = None  # encoder-decoder: (B, levels)

    def silent(self) -> Batch:
        """The same rows without a target: what a process runs that has no share of a batch."""
        none = {name: getattr(self, name)[:0] for name in ("at", "labels", "level")}
        return replace(self, **none, targets=(0, 0), tokens=0)

    def to(self, device: torch.device) -> Batch:
        """The batch on another device."""
        moved = {k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return Batch(**{**vars(self), **moved})


class Batches(ABC):
    """The batches of every epoch, cheap to plan and made one at a time. Planning an epoch again gives the same plan.

    A batch's rows are sorted by task, and any subset in their order is a batch too: that is how several processes
    share one.
    """

    @abstractmethod
    def plan(self, epoch: int) -> Sequence[Any]:
        """What `collate` makes each batch of the epoch from: a sequence of rows."""

    @abstractmethod
    def collate(self, rows: Any) -> Batch:
        """Tensors of one batch."""

    @abstractmethod
    def tokens(self, rows: Any) -> int:
        """`collate(rows).tokens` without making the batch: cheap enough to plan a whole run by."""

    def steps_per_epoch(self, accumulate: int) -> float:
        """Optimizer steps in the first epoch when each takes `accumulate` batches; later epochs differ by a few.

        A fraction: a step may take the last batches of one epoch and the first ones of the next.
        """
        return len(self.plan(0)) / accumulate

    def __call__(self, epoch: int) -> Iterator[Batch]:
        """The batches of one epoch."""
        return (self.collate(rows) for rows in self.plan(epoch))


def make_batches(config: Config, train: pl.DataFrame, prompter: Prompter, decoder_start: int | None) -> Batches:
    """The batches of `tuning.layout`; `decoder_start` is an encoder-decoder's first decoder token, else None.

    Raises GemstError when there is nothing to train on: no example of `tuning.tasks`, or none whose target has an ID.
    """
    from gemst.tuning.chain import ChainBatches
    from gemst.tuning.events import load_events
    from gemst.tuning.single import SingleBatches

    tuning = config.tuning
    tasks = {"both": (0, 1), "recommendation": (0,), "search": (1,)}[tuning.tasks]
    wanted = train if tuning.tasks == "both" else train.filter(task=tuning.tasks)
    if wanted.is_empty():
        of = "" if tuning.tasks == "both" else f" for tuning.tasks: {tuning.tasks}"
        raise GemstError(
            f"there is no training example{of}", "Look at artifacts/examples/split.json for what was dropped"
        )
    if decoder_start is not None or tuning.layout == "single":
        return SingleBatches(
            wanted, prompter, batch_tokens=tuning.batch_tokens, decoder_start=decoder_start,
            equal=tuning.mixing == "equal", seed=config.seed,
        )  # fmt: skip
    events = load_events(train, prompter, own=config.data.history == "own")  # the other task's events are history
    return ChainBatches(
        events, prompter, chain_items=tuning.chain_items, batch_tokens=tuning.batch_tokens, tasks=tasks,
        equal=tuning.mixing == "equal", seed=config.seed,
    )  # fmt: skip


def require_targets(known: NDArray[np.bool_]) -> None:
    """`known` (targets,) says which train targets have an ID. Raises GemstError when none has."""
    if not known.any():
        raise GemstError("no train target has an ID", "Run `gemst tokenize` on the same data")

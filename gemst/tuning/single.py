"""Single layout: one row per example, for encoder-decoder models and as the yardstick of the chain layout."""

from __future__ import annotations

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from gemst.item_ids.ids import rows_by
from gemst.prompts import SEARCH, Prompter
from gemst.tuning.batches import Batch, Batches, require_targets


class SingleBatches(Batches):
    """Batches of about as many rows each, of similar histories, recommendation first; fewer where rows are long.

    Rows are drawn without regard to their task: a batch holds as many of each as chance gives it, and a small one may
    lack a task. `equal`: an epoch has as many examples of each task (equal mixing, Raffel et al. 2020, section 3.5.2).
    Examples whose target has no ID are left out; raises GemstError when none is left.
    """

    def __init__(
        self, train: pl.DataFrame, prompter: Prompter, *, batch_tokens: int, decoder_start: int | None,
        equal: bool = False, seed: int,
    ) -> None:  # fmt: skip
        self.prompter, self.decoder_start, self.batch_tokens = prompter, decoder_start, batch_tokens
        self.equal, self.seed = equal, seed
        target = rows_by(prompter.index, train["targets"].list.first())
        known = target >= 0
        require_targets(known)
        self.train, self.target = train.filter(known), target[known]
        self.search = (self.train["task"] == SEARCH).to_numpy()
        history = self.train["history"].list.len().to_numpy().astype(np.int64)
        self.history = np.minimum(history, prompter.max_history)
        longest = len(prompter.prefix) + prompter.max_history * prompter.token_ids.shape[1] + 24
        self.rows = max(2, batch_tokens // longest)
        self.sizes = (prompter.token_ids >= 0).sum(1)  # ID tokens of each item
        self.counted = np.full(len(self.train), -1, np.int64)  # tokens of each example, once somebody asked

    def plan(self, epoch: int) -> list[np.ndarray]:
        """Row numbers of every batch, recommendation first: shuffled, bucketed by length in windows of 50 batches."""
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(len(self.train))
        if self.equal and 0 < self.search.sum() < len(self.search):
            of_task = [np.flatnonzero(self.search[order] == task) for task in (False, True)]
            fewest = min(map(len, of_task))
            order = order[np.sort(np.concatenate([places[:fewest] for places in of_task]))]
        window = 50 * self.rows
        pieces = [order[i : i + window] for i in range(0, len(order), window)]
        bucketed = np.concatenate([piece[np.argsort(self.history[piece], kind="stable")] for piece in pieces])
        batches = np.array_split(bucketed, max(1, round(len(bucketed) / self.rows)))
        chosen = [part for i in rng.permutation(len(batches)) for part in self._fitting(batches[i])]
        return [rows[np.argsort(self.search[rows], kind="stable")] for rows in chosen]

    def _fitting(self, rows: np.ndarray) -> list[np.ndarray]:
        """The batch, or its shorter and its longer half where padding makes it too long: queries can be pages."""
        lengths = self._lengths(rows)
        if len(rows) == 1 or len(rows) * lengths.max() <= self.batch_tokens:
            return [rows]
        order = rows[np.argsort(lengths, kind="stable")]
        middle = len(order) // 2
        return self._fitting(order[:middle]) + self._fitting(order[middle:])

    def collate(self, rows: np.ndarray) -> Batch:
        """Tensors of the examples `rows`, recommendation first."""
        prompts = self.prompter.encode(self.train[rows])
        codes = [code[code >= 0] for code in self.prompter.token_ids[self.target[rows]]]
        sizes = np.array([len(code) for code in codes])
        appended = [] if self.decoder_start is not None else [code[:-1].tolist() for code in codes]
        full = [p + a for p, a in zip(prompts, appended, strict=True)] if appended else prompts
        length = max(map(len, full))
        ids = np.array([row + [0] * (length - len(row)) for row in full])
        mask = np.array([[1] * len(row) + [0] * (length - len(row)) for row in full])
        level = np.concatenate([np.arange(size) for size in sizes])
        owner = np.repeat(np.arange(len(rows)), sizes)
        boundary = int((~self.search[rows]).sum())
        decoder = None
        if self.decoder_start is not None:
            width = sizes.max()
            start = self.decoder_start
            decoder = torch.from_numpy(np.array([[start, *code[:-1], *[0] * (width - len(code))] for code in codes]))
            at = owner * width + level
        else:
            at = owner * length + np.array([len(p) for p in prompts])[owner] - 1 + level
        return Batch(
            input_ids=torch.from_numpy(ids),
            mask=torch.from_numpy(mask),
            position_ids=None,
            at=torch.from_numpy(at),
            labels=torch.from_numpy(np.concatenate(codes).astype(np.int64)),
            level=torch.from_numpy(level),
            boundary=boundary,
            targets=(int(sizes[:boundary].sum()), int(sizes[boundary:].sum())),
            tokens=int(mask.sum()) + (0 if decoder is None else int(sizes.sum())),
            decoder_ids=decoder,
        )

    def tokens(self, rows: np.ndarray) -> int:
        """`collate(rows).tokens`: prompts and IDs, and for decoder-only models all of an ID but its last token."""
        return int(self._lengths(rows).sum())

    def _lengths(self, rows: np.ndarray) -> NDArray[np.int64]:
        """Tokens of each of the examples `rows`, (len(rows),); counted once."""
        new = rows[self.counted[rows] < 0]
        if len(new):
            self.counted[new] = self._count(new)
        return self.counted[rows]

    def _count(self, rows: np.ndarray) -> NDArray[np.int64]:
        examples = self.train[rows]
        history = self.prompter.history_rows(examples["history"])
        owner = np.repeat(np.arange(len(rows)), [len(items) for items in history])
        past = np.bincount(owner, self.sizes[np.concatenate(history)], len(rows)).astype(np.int64)
        asked = np.array([len(suffix) for suffix in self.prompter.suffixes(examples["query"].to_list())])
        answer = self.sizes[self.target[rows]] - (self.decoder_start is None)
        return len(self.prompter.prefix) + past + asked + answer

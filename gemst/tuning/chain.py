"""Chain layout: one row carries many targets of a user and task, at a fraction of the tokens (decoder-only models).

A segment is a stretch of one user's events. Its trunk is the prefix and the ID tokens of the events; each event of
the segment's task hangs a branch on the trunk: suffix (with its query) and ID tokens, seeing the trunk strictly before
its page's time and nothing of other branches. An empty suffix hangs nothing: the trunk's last visible token predicts.
Masks and positions make every branch equal to the single-target prompt of the same history. Segments are packed into
rows, rows into batches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gemst.prompts import Prompter
from gemst.tuning.batches import Batch, Batches, require_targets
from gemst.tuning.events import Events, Ints, visible

_OPEN = 64  # rows kept open while packing


@dataclass
class Segment:
    """Events [low, high) of one user as trunk; those of `task` from `fresh` on are targets."""

    low: int
    high: int
    fresh: int
    task: int


class ChainBatches(Batches):
    """Packs segments into rows of `row_tokens` tokens and rows into batches of `batch_tokens`.

    `equal`: an epoch has as many rows of each task (equal mixing, Raffel et al. 2020, section 3.5.2).
    Events without an ID are no targets and no history. Raises GemstError when no target of `tasks` has one.
    """

    def __init__(
        self,
        events: Events,
        prompter: Prompter,
        *,
        chain_items: int,
        batch_tokens: int,
        tasks: tuple[int, ...] = (0, 1),
        equal: bool = False,
        seed: int = 0,
    ) -> None:
        self.events, self.prompter, self.tasks, self.equal, self.seed = events, prompter, tasks, equal, seed
        self.chain_items, self.batch_tokens = chain_items, batch_tokens
        self.overlap = min(prompter.max_history // 2, chain_items // 2)
        known = events.items >= 0
        self.asked = np.where(known, events.task, -1)  # the task each event is a target of
        require_targets(np.isin(self.asked, tasks))
        # Sums over [low, high) are differences of these: an event's tokens in the trunk, and in its branch by task.
        tokens = np.where(known, (prompter.token_ids >= 0).sum(1)[events.items], 0)
        lengths = np.array([len(suffix) for suffix in events.suffixes])
        branch = tokens - 1 + lengths[events.query]
        self.trunk_tokens = np.r_[0, np.cumsum(tokens)]
        self.branch_tokens = {task: np.r_[0, np.cumsum(np.where(self.asked == task, branch, 0))] for task in tasks}
        # All suffixes in one array: suffix q is suffix_ids[suffix_start[q] : suffix_start[q + 1]].
        self.suffix_ids = np.concatenate([np.zeros(0, np.int64), *events.suffixes]).astype(np.int64)
        self.suffix_start = np.r_[0, np.cumsum(lengths)]
        self.visible = visible(events)

    def segments(self, epoch: int) -> list[Segment]:
        """All segments of an epoch in random order, cut at other places every epoch; each target is in exactly one."""
        rng = np.random.default_rng((self.seed, epoch))
        step = self.chain_items - self.overlap
        found = []
        for task in self.tasks:
            for start, stop in zip(self.events.start[:-1], self.events.start[1:], strict=True):
                cut = int(start) - int(rng.integers(step))
                for fresh in range(cut, int(stop), step):
                    low, high = max(int(start), fresh - self.overlap), min(fresh + step, int(stop))
                    fresh = max(fresh, int(start))
                    if (self.asked[fresh:high] == task).any():
                        found += self._fitting(Segment(low, high, fresh, task), int(start))
        return [found[i] for i in rng.permutation(len(found))]

    def _fitting(self, segment: Segment, start: int) -> list[Segment]:
        """The segment, or its halves where a row per task would be more than a batch: queries can be pages.

        `start` is where its user's events begin. What one event alone makes too long stays so.
        """
        if self.length(segment) <= self.batch_tokens // len(self.tasks) or segment.high - segment.fresh == 1:
            return [segment]
        middle = (segment.fresh + segment.high) // 2
        halves = [replace(segment, high=middle), replace(segment, low=max(start, middle - self.overlap), fresh=middle)]
        asking = [half for half in halves if (self.asked[half.fresh : half.high] == half.task).any()]
        return [part for half in asking for part in self._fitting(half, start)]

    def longest_prompt(self) -> int:
        """Tokens of the longest prompt that a cut of any epoch can give: what a model must be able to read.

        No single epoch shows it: each is cut elsewhere. Exact where no segment has to be halved, else never too low.
        """
        most = self._longest(self.chain_items - self.overlap)
        # A halved segment is no longer than its row, but for what one event alone makes too long.
        return min(most, max(self.batch_tokens // len(self.tasks), self._longest(1)))

    def _longest(self, fresh: int) -> int:
        """Tokens of the longest prompt over all segments of `fresh` events and the overlap before them."""
        start, ends, trunk = self.events.start, np.arange(1, len(self.asked) + 1), self.trunk_tokens
        first = np.repeat(start[:-1], np.diff(start))
        low = np.maximum(first, ends - fresh - self.overlap)
        asked = np.isin(self.asked, self.tasks)
        targets = np.r_[0, np.cumsum(asked)]
        used = targets[ends] > targets[np.maximum(first, ends - fresh)]  # segments that no target is in are not made
        branch = sum(np.diff(sums) for sums in self.branch_tokens.values())
        hung = trunk[np.maximum(self.visible, low)] - trunk[low] + branch
        return len(self.prompter.prefix) + int(max((trunk[ends] - trunk[low])[used].max(), hung[asked].max()))

    def length(self, segment: Segment) -> int:
        """Tokens of a segment."""
        trunk, branch = self.trunk_tokens, self.branch_tokens[segment.task]
        own = trunk[segment.high] - trunk[segment.low] + branch[segment.high] - branch[segment.fresh]
        return len(self.prompter.prefix) + int(own)

    def tokens(self, rows: list[list[Segment]]) -> int:
        """`collate(rows).tokens`: the segments' tokens."""
        return sum(self.length(segment) for row in rows for segment in row)

    def targets(self, segment: Segment) -> Ints:
        """The events that `collate` makes targets of, in its order."""
        return segment.fresh + np.flatnonzero(self.asked[segment.fresh : segment.high] == segment.task)

    def plan(self, epoch: int) -> list[list[list[Segment]]]:
        """Batches of rows of segments, recommendation first: the rows of each task are dealt evenly over the batches.

        Where a task has fewer rows than there are batches, as when the other one's queries are long, some go without
        it; equal mixing, a larger `batch_tokens`, or several batches a step, mend that.
        """
        segments = self.segments(epoch)
        lengths = [self.length(s) for s in segments]
        row_tokens = min(
            max(lengths), max(1, self.batch_tokens // len(self.tasks))
        )  # a longer segment has a row of its own
        rows: dict[int, list[list[Segment]]] = {task: [] for task in self.tasks}
        for task in self.tasks:
            rooms: list[int] = []  # best fit: the fullest open row that still takes the segment
            for segment, length in zip(segments, lengths, strict=True):
                if segment.task != task:
                    continue
                fits = [
                    (room, i) for i, room in enumerate(rooms[-_OPEN:], max(len(rooms) - _OPEN, 0)) if room >= length
                ]
                if fits:
                    room, at = min(fits)
                    rows[task][at].append(segment)
                    rooms[at] = room - length
                else:
                    rows[task].append([segment])
                    rooms.append(row_tokens - length)
        if self.equal:  # rows are in random order: these are drawn from all
            fewest = min(len(of_task) for of_task in rows.values() if of_task)
            rows = {task: of_task[:fewest] for task, of_task in rows.items()}
        per_batch = max(self.batch_tokens // row_tokens, len(self.tasks))
        count = max(1, round(sum(map(len, rows.values())) / per_batch))
        cuts = {task: np.linspace(0, len(rows[task]), count + 1).round().astype(int) for task in self.tasks}
        return [
            [row for task in self.tasks for row in rows[task][cuts[task][i] : cuts[task][i + 1]]] for i in range(count)
        ]

    def collate(self, rows: list[list[Segment]]) -> Batch:
        """Tensors of one batch."""
        built = [self._row(row) for row in rows]
        length = (
            -(-max(len(row.ids) for row in built) // 32) * 32
        )  # few distinct shapes keep the allocator from growing
        pad = {"ids": 0, "position": 0, "segment": -1, "branch": 0, "trunk": 0, "limit": 0}
        stacked = {
            key: torch.from_numpy(
                np.stack(
                    [np.pad(getattr(row, key), (0, length - len(row.ids)), constant_values=value) for row in built]
                )
            )
            for key, value in pad.items()
        }
        targets = [
            sum(len(row.labels) for row, segs in zip(built, rows, strict=True) if segs[0].task == task)
            for task in (0, 1)
        ]
        return Batch(
            input_ids=stacked["ids"],
            mask=chain_mask(stacked["segment"], stacked["branch"], stacked["trunk"], stacked["limit"]),
            position_ids=stacked["position"],
            at=torch.from_numpy(np.concatenate([row.at + i * length for i, row in enumerate(built)])),
            labels=torch.from_numpy(np.concatenate([row.labels for row in built])),
            level=torch.from_numpy(np.concatenate([row.level for row in built])),
            boundary=sum(segs[0].task == 0 for segs in rows),
            targets=(targets[0], targets[1]),
            tokens=sum(len(row.ids) for row in built),
        )

    def _row(self, segments: list[Segment]) -> _Row:
        parts = [self._segment(segment, number) for number, segment in enumerate(segments)]
        offsets = np.cumsum([0] + [len(part.ids) for part in parts[:-1]])
        joined = {
            key: np.concatenate([getattr(part, key) for part in parts])
            for key in ("ids", "position", "segment", "branch", "trunk", "limit", "labels", "level")
        }
        return _Row(
            **joined, at=np.concatenate([part.at + offset for part, offset in zip(parts, offsets, strict=True)])
        )

    def _segment(self, segment: Segment, number: int) -> _Row:
        events, prefix = self.events, self.prompter.prefix
        items = events.items[segment.low : segment.high]
        tokens = self.prompter.token_ids[items]
        real = (tokens >= 0) & (items >= 0)[:, None]
        trunk_ids = np.concatenate([prefix, tokens[real]]).astype(np.int64)
        ends = len(prefix) + np.r_[0, np.cumsum(real.sum(1))]  # ends[i]: trunk tokens before event i
        wanted = self.targets(segment)
        codes = self.prompter.token_ids[events.items[wanted]]
        labels = codes[codes >= 0]
        lengths = (codes >= 0).sum(1)  # of each target's ID
        level = _within(lengths)
        query = events.query[wanted]
        asked = self.suffix_start[query + 1] - self.suffix_start[query]  # tokens of each target's suffix
        sizes = asked + lengths - 1  # of each branch: suffix, then all of the ID but its last token
        seen = ends[np.maximum(self.visible[wanted], segment.low) - segment.low]
        inside = _within(sizes)
        trunk = np.arange(len(trunk_ids))
        hung = len(trunk_ids) + np.cumsum(sizes) - sizes  # where each branch begins
        code_at = np.repeat(hung + asked, lengths) + level  # where each ID token stands, or would, in the row
        at = np.where(level > 0, code_at - 1, np.repeat(np.where(asked > 0, hung + asked, seen) - 1, lengths))
        ids = np.concatenate([trunk_ids, np.empty(sizes.sum(), np.int64)])
        suffix_at = _within(asked)
        ids[np.repeat(hung, asked) + suffix_at] = self.suffix_ids[
            np.repeat(self.suffix_start[query], asked) + suffix_at
        ]
        read = level < np.repeat(lengths - 1, lengths)
        ids[code_at[read]] = labels[read]
        return _Row(
            ids=ids,
            position=np.concatenate([trunk, np.repeat(seen, sizes) + inside]),
            segment=np.full(len(ids), number),
            branch=np.concatenate([np.zeros_like(trunk), np.repeat(np.arange(1, len(wanted) + 1), sizes)]),
            trunk=np.concatenate([trunk, np.zeros(sizes.sum(), np.int64)]),
            limit=np.concatenate([trunk, np.repeat(seen - 1, sizes)]),
            at=at,  # without a suffix the trunk itself predicts the first token
            labels=labels,
            level=level,
        )


def _within(lengths: Ints) -> Ints:
    """0, 1, ... of each stretch, for stretches of these lengths one after another, (lengths.sum(),)."""
    ends = np.cumsum(lengths)
    return np.arange(lengths.sum()) - np.repeat(ends - lengths, lengths)


@dataclass
class _Row:
    """Token-wise arrays of a row (or of one segment of it)."""

    ids: Ints
    position: Ints
    segment: Ints  # which segment of the row; -1 is padding
    branch: Ints  # 0 trunk, else the branch's number within its segment
    trunk: Ints  # index within the trunk
    limit: Ints  # last trunk index a token may look at
    at: Ints
    labels: Ints
    level: Ints


def chain_mask(segment: Tensor, branch: Tensor, trunk: Tensor, limit: Tensor) -> Tensor:
    """(B, 1, S, S) bool: token i may look at j. All arguments are (B, S).

    Same segment, and j is trunk within i's limit, or j is earlier in i's own branch. Padding looks at itself alone, so
    that no softmax is empty.
    """
    order = torch.arange(segment.shape[1])
    same = (segment[:, :, None] == segment[:, None, :]) & (segment >= 0)[:, :, None]
    in_trunk = (branch == 0)[:, None, :] & (trunk[:, None, :] <= limit[:, :, None])
    in_branch = (
        (branch > 0)[:, :, None] & (branch[:, :, None] == branch[:, None, :]) & (order[:, None] >= order[None, :])
    )
    return ((same & (in_trunk | in_branch)) | torch.eye(len(order), dtype=torch.bool))[:, None]

"""Constrained beam search: every step gathers the children of the beams' trie nodes, so no other ID can come out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gemst.backbone import item_logits
from gemst.item_ids.trie import Trie
from gemst.ranking.context import encode

if TYPE_CHECKING:
    from gemst.backbone import Tuned

Longs = NDArray[np.int64]


@dataclass(frozen=True)
class Dead:
    """Edges an example must not take on one level, each (m,) int64: position in the batch, parent node, edge."""

    rows: Tensor
    parents: Tensor
    edges: Tensor


class TrieWalk:
    """A Trie's arrays on the model's device, read a level at a time."""

    def __init__(self, trie: Trie, device: torch.device) -> None:
        self.trie, self.device = trie, device
        self.offsets, self.codes, self.items = (
            torch.from_numpy(array).to(device) for array in (trie.offsets, trie.codes, trie.items)
        )

    def step(
        self, scores: Tensor, log_probs: Tensor, nodes: Tensor, level: int, keep: int, dead: Dead
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One constrained step: the `keep` best children of all beams, per example.

        `scores`, `nodes` (batch, beams): the beams and where they stand; `log_probs` (batch, beams, codes of the
        level). Returns scores, parent beam and edge, each (batch, min(keep, candidates)), best first; a score of -inf
        marks a place without a candidate. The cost depends on the number of children, not of items.
        """
        width = self.trie.widths[level]
        start = self.offsets[nodes].long()
        degree = self.offsets[nodes + 1].long() - start
        slots = torch.arange(width, device=self.device)
        # Past a node's children lie those of the next one, or codes of the next level: read within bounds, then masked.
        places = (start[..., None] + slots).clamp_(max=len(self.codes) - 1)
        codes = self.codes.take(places).long().clamp_(max=log_probs.shape[2] - 1)
        values = log_probs.gather(2, codes).add_(scores[..., None])
        values.masked_fill_(slots >= degree[..., None], -torch.inf)
        if len(dead.rows):
            pair, beam = (nodes[dead.rows] == dead.parents[:, None]).nonzero(as_tuple=True)
            row, edge = dead.rows[pair], dead.edges[pair]
            values[row, beam, edge - start[row, beam]] = -torch.inf
        best = values.flatten(1).topk(min(keep, values[0].numel()), dim=1)
        parents = best.indices // width
        edges = start.gather(1, parents) + best.indices % width
        # A place without a candidate may lie past its node's children; its score stays -inf wherever it stands.
        return best.values, parents, edges.clamp_(max=int(self.trie.levels[level + 1]) - 1)

    def dead(self, local: Longs, left_out: Longs) -> list[Dead]:
        """By level, the edges below which an example has nothing left once its items `left_out` are gone."""
        paths = self.trie.paths(left_out)
        inside = paths[:, 0] >= 0
        rows, paths = local[inside], paths[inside]
        parents = np.concatenate([np.zeros((len(rows), 1), np.int64), paths[:, :-1] + 1], axis=1)
        found = []
        for level in range(self.trie.depth):
            keys = rows * len(self.trie.codes) + paths[:, level]
            _, first, counts = np.unique(keys, return_index=True, return_counts=True)
            gone = first[counts == self.trie.leaves[paths[first, level]]]
            found.append(
                Dead(
                    *(
                        torch.from_numpy(array[gone]).to(self.device)
                        for array in (rows, parents[:, level], paths[:, level])
                    )
                )
            )
        return found


class BeamSearch:
    """Batched beam search of `beams` beams over the IDs of a tuned model."""

    def __init__(self, tuned: Tuned, beams: int) -> None:
        self.tuned, self.beams = tuned, beams
        trie, device = tuned.ids.trie, tuned.model.device
        self.walk: TrieWalk = trie.walks.get(device) or trie.walks.setdefault(device, TrieWalk(trie, device))

    def __call__(
        self, prompts: list[list[int]], k: int, local: Longs, left_out: Longs
    ) -> tuple[Longs, NDArray[np.float32]]:
        """Item rows and scores (batch, k), best first; -inf where none is left.

        `local`, `left_out`: position in the batch and item row of the items an example must not get.
        """
        ids, walk, device = self.tuned.ids, self.walk, self.walk.device
        dead = walk.dead(local, left_out)
        context = encode(self.tuned.model, prompts, branches=True)
        states = context.states[:, None]
        scores = torch.zeros(states.shape[:2], device=device)
        nodes = torch.zeros(states.shape[:2], dtype=torch.long, device=device)
        path = torch.empty(*states.shape[:2], 0, dtype=torch.long, device=device)  # each beam's tokens among those hung
        hung = 0
        for level in range(walk.trie.depth):
            final = level + 1 == walk.trie.depth
            start, stop = (self.tuned.first + at for at in ids.level_starts[level : level + 2])
            log_probs = item_logits(self.tuned.model, states, start, stop).float().log_softmax(-1)
            scores, parents, edges = walk.step(scores, log_probs, nodes, level, k if final else self.beams, dead[level])
            if final:
                items = walk.items[edges - int(walk.trie.levels[level])]
                return items.cpu().numpy().astype(np.int64), scores.cpu().numpy()
            nodes = edges + 1
            new = torch.arange(hung, hung + nodes.shape[1], device=device).expand(len(nodes), -1)
            path = torch.cat([path.gather(1, parents[..., None].expand(-1, -1, path.shape[2])), new[..., None]], 2)
            hung += nodes.shape[1]
            ancestors = torch.zeros(*nodes.shape, hung, dtype=torch.bool, device=device).scatter_(2, path, True)
            states = context.extend(walk.codes[edges].long() + start, torch.full_like(nodes, level), ancestors)
        raise AssertionError("a trie has at least one level")

"""The model while it is tuned: the backbone plus item-token rows as parameters of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from gemst.backbone import (
    attention_window,
    capped,
    context_length,
    embedded,
    hidden,
    output_bias,
    output_head,
    output_scale,
    takes_positions,
    vocabulary,
)
from gemst.errors import GemstError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gemst.tuning.batches import Batch


class ItemModel(nn.Module):
    """Backbone + item rows. `items_in` and `items_out` (tokens, d) stand in for the vocabulary rows from `first` on.

    As separate parameters they get gradients and optimizer state for those rows alone, and the old rows cannot move.
    `white` (d, d) is the base the output rows are learned in: items_out @ white are the rows themselves. In a base that
    whitens the states, Adam's equal steps are no longer drowned by the mean state, which holds most of their power.
    """

    white: Tensor | None

    def __init__(
        self,
        model: PreTrainedModel,
        first: int,
        level_sizes: tuple[int, ...],
        whole_vocabulary: bool,
        white: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.model, self.first, self.whole_vocabulary = model, first, whole_vocabulary
        self.starts = [sum(level_sizes[:level]) for level in range(len(level_sizes) + 1)]
        last = first + self.starts[-1]
        model.requires_grad_(False)
        self.items_in = nn.Parameter(vocabulary(model)[first:last].detach().clone())
        rows = output_head(model).weight[first:last].detach().clone()
        white = None if white is None else white.to(rows)
        self.register_buffer("white", white, persistent=False)
        self.items_out = nn.Parameter(rows if white is None else _in_base(rows, white))

    def embed(self, ids: Tensor) -> Tensor:
        """Input embeddings (batch, positions, d) in the compute type; item tokens come from `items_in`."""
        old = self.model.get_input_embeddings()(ids.clamp(max=self.first - 1))
        items = embedded(self.model, functional.embedding((ids - self.first).clamp(min=0), self.items_in))
        kind = ids.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else old.dtype
        return torch.where((ids >= self.first)[..., None], items, old).to(dtype)

    def states(self, batch: Batch) -> Tensor:
        """Final hidden states at the target positions alone, (targets, d).

        Raises GemstError when the batch packs rows that the family cannot tell apart or sees only a part of.
        """
        if batch.position_ids is not None:
            self.check_packed(int(batch.position_ids.max()) + 1)
        embeds = self.embed(batch.input_ids)
        if batch.decoder_ids is None:
            every = hidden(
                self.model,
                inputs_embeds=embeds,
                attention_mask=self._mask(batch.mask, embeds),
                position_ids=batch.position_ids,
                use_cache=False,
            )
        else:
            every = hidden(
                self.model,
                inputs_embeds=embeds,
                attention_mask=batch.mask,
                decoder_inputs_embeds=self.embed(batch.decoder_ids),
                use_cache=False,
            )
        return every.flatten(0, 1)[batch.at]

    def check_packed(self, longest: int) -> None:
        """The family must be able to place tokens, and no window may be shorter than a prompt with its history.

        Raises GemstError when rows with a prompt of `longest` tokens are not for it.
        """
        family = type(self.model).__name__
        if not takes_positions(self.model):
            raise GemstError(
                f"tuning.layout chain packs rows that {family} cannot place: no position_ids",
                "Set tuning.layout: single",
            )
        limit = context_length(self.model)
        if limit is not None and longest > limit:
            raise GemstError(
                f"tuning.layout chain has prompts of {longest} tokens, and {family} takes {limit}",
                "Lower tuning.chain_items",
            )
        window = attention_window(self.model)  # the packed rows' own mask takes its place
        if window is not None and longest > window:
            raise GemstError(
                f"tuning.layout chain has prompts of {longest} tokens, and the sliding_window of {family} is {window}",
                "Set tuning.layout: single, or lower tuning.chain_items",
            )

    def _mask(self, mask: Tensor, embeds: Tensor) -> Tensor:
        """Eager attention adds its mask to the scores; the others take booleans."""
        if mask.dim() == 2 or self.model.config._attn_implementation != "eager":
            return mask
        kind = embeds.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else embeds.dtype
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)

    def target_losses(self, batch: Batch) -> Tensor:
        """Cross-entropy of every target token, (targets,) float32: over its level's tokens, or over the vocabulary."""
        states = self.states(batch) * output_scale(self.model)
        losses = states.new_zeros(len(batch.labels), dtype=torch.float32)
        bias = output_bias(self.model)
        bias = None if bias is None else bias[: self.first + self.starts[-1]].to(states.dtype)
        if self.whole_vocabulary:
            head = torch.cat([output_head(self.model).weight[: self.first], self.rows_out()])
            logits = functional.linear(states, head.to(states.dtype), bias).float()
            return functional.cross_entropy(capped(self.model, logits), batch.labels, reduction="none")
        if self.white is not None:
            states = states @ self.white.to(states.dtype)
        for level in range(len(self.starts) - 1):
            mine = batch.level == level if len(self.starts) > 2 else slice(None)
            start, stop = self.starts[level], self.starts[level + 1]
            own = None if bias is None else bias[self.first + start : self.first + stop]
            logits = functional.linear(states[mine], self.items_out[start:stop].to(states.dtype), own).float()
            logits = capped(self.model, logits)
            part = functional.cross_entropy(logits, batch.labels[mine] - self.first - start, reduction="none")
            if len(self.starts) == 2:
                return part
            losses[mine] = part
        return losses

    def forward(self, batch: Batch) -> Tensor:
        """Losses of every target token, (targets,)."""
        return self.target_losses(batch)

    def rows_out(self) -> Tensor:
        """The output rows (tokens, d) as the head wants them."""
        return self.items_out if self.white is None else self.items_out @ self.white

    @torch.no_grad()
    def start_popular(self, counts: Tensor, states: Tensor, level: Tensor) -> None:
        """Start the output rows so that the mean state's logits are log(1 + counts): a classifier set to its prior.

        A head without bias gets one along a level's mean hidden state mu, which most of a state's norm lies on:
        row_i += (log(1 + counts_i) - row_i mu) mu / |mu|^2. What the row had there is replaced: it is the same for
        every prompt, and large enough to hide which item's text a prompt resembles. `counts` (tokens,); `states`
        (targets, d) before any training as the head gets them (T5 scales them), `level` (targets,) the ID level each
        of them predicts.
        """
        for at, (start, stop) in enumerate(zip(self.starts[:-1], self.starts[1:], strict=True)):
            mean = states[level == at].float().mean(0).to(self.items_out.device)
            prior = torch.log1p(counts[start:stop].to(mean))
            missing = prior - prior.mean() - self.items_out[start:stop] @ mean
            self.items_out[start:stop] += missing[:, None] * mean / mean.dot(mean)

    @torch.no_grad()
    def fold(self) -> None:
        """Write the item rows into the backbone's embedding and head."""
        last = self.first + self.starts[-1]
        vocabulary(self.model)[self.first : last] = self.items_in
        output_head(self.model).weight[self.first : last] = self.rows_out()


def _in_base(rows: Tensor, white: Tensor) -> Tensor:
    """Coordinates (n, d) with coordinates @ white = rows; `white` is symmetric and invertible."""
    return torch.linalg.solve(white.double(), rows.double().T).T.to(rows).contiguous()

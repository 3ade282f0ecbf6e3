"""Prompts encoded once, with branches of ID tokens hung on them: the same two calls for both model families.

All branches of a prompt share one row. A branch token sees the prompt and its own ancestors through a mask, so the
prompt's keys and values are neither copied per beam nor reordered between steps.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gemst.backbone import attention_window, decoder_start, takes_positions, tower
from gemst.errors import GemstError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# A T5 decoder's position bias is replaced while branches are hung: requests in other threads wait for their turn.
_DECODING = threading.Lock()


class Context(ABC):
    """A batch of encoded prompts. `states` (batch, d) predict the first code."""

    states: Tensor

    @abstractmethod
    def extend(self, tokens: Tensor, level: Tensor, ancestors: Tensor) -> Tensor:
        """Hang ID tokens on the prompts and return their states (batch, new, d).

        `tokens` (batch, new) int64 vocabulary ids; `level` (batch, new) int64, 0 for a first code; `ancestors` (batch,
        new, old + new) bool: which branch tokens, in the order they were hung, each new one sees, itself included.
        """


def encode(model: PreTrainedModel, prompts: list[list[int]], branches: bool) -> Context:
    """Encode `prompts` (token ids). Without `branches` nothing is kept for `extend`.

    Raises GemstError when branches are asked for of a backbone whose positions cannot be given; `extend` raises it
    when a prompt and its branch are longer than the backbone's sliding window.
    """
    start = decoder_start(model)
    if start is None:
        return _DecoderOnly(model, prompts, branches)
    return _EncoderDecoder(model, start, prompts, branches)


class _DecoderOnly(Context):
    def __init__(self, model: PreTrainedModel, prompts: list[list[int]], branches: bool) -> None:
        from transformers import DynamicCache

        self.model = model
        if branches and not takes_positions(model):
            raise _refused(model)
        ids, self.mask = _padded(prompts, model.device)
        self.lengths = self.mask.sum(1)
        # A cache of its own: the family's may drop what has left a sliding window, and branches count as tokens there.
        cache = DynamicCache() if branches else None
        output = tower(model)(input_ids=ids, attention_mask=self.mask, past_key_values=cache, use_cache=branches)
        self.states = output.last_hidden_state[torch.arange(len(prompts), device=ids.device), self.lengths - 1]
        self.cache = getattr(output, "past_key_values", None)  # Mamba keeps a state, OpenAI's first GPT nothing
        if branches and self.cache is None:
            raise _refused(model)

    def extend(self, tokens: Tensor, level: Tensor, ancestors: Tensor) -> Tensor:
        prompt = self.mask.bool()[:, None].expand(-1, tokens.shape[1], -1)
        window, longest = attention_window(self.model), int(self.lengths.max() + level.max()) + 1
        if window and longest > window:
            raise GemstError(
                f"a prompt and its ID, {longest:,} tokens, do not fit the backbone's sliding window of {window:,}",
                "Lower data.max_history, or use atomic IDs",
            )
        output = tower(self.model)(
            input_ids=tokens,
            attention_mask=_additive(torch.cat([prompt, ancestors], 2), self.states.dtype),
            position_ids=self.lengths[:, None] + level,
            past_key_values=self.cache,
            use_cache=True,
        )
        states: Tensor = output.last_hidden_state
        return states


class _EncoderDecoder(Context):
    """The T5 family. Its decoder derives relative positions from indices within the row, which branches do not follow:
    their bias is computed from the depth of each token instead."""

    def __init__(self, model: PreTrainedModel, start: int, prompts: list[list[int]], branches: bool) -> None:
        self.model = model
        self.decoder: Any = model.get_decoder()
        self.biased = [
            module
            for name, module in self.decoder.named_modules()
            if name.endswith("SelfAttention")
            and module.has_relative_attention_bias
            and "bidirectional" in signature(module._relative_position_bucket).parameters
        ]
        if branches and not self.biased:
            raise _refused(model)
        ids, self.mask = _padded(prompts, model.device)
        self.encoded = model.get_encoder()(input_ids=ids, attention_mask=self.mask).last_hidden_state
        starts = torch.full((len(prompts), 1), start, device=ids.device)
        with _DECODING:
            output = self.decoder(
                input_ids=starts,
                encoder_hidden_states=self.encoded,
                encoder_attention_mask=self.mask,
                use_cache=branches,
            )
        self.states = output.last_hidden_state[:, 0]
        self.cache = output.past_key_values
        self.depth = torch.zeros_like(starts)

    def extend(self, tokens: Tensor, level: Tensor, ancestors: Tensor) -> Tensor:
        self.depth = torch.cat([self.depth, level + 1], 1)
        start = torch.ones_like(ancestors[..., :1])
        with _DECODING, self._positions(self.depth[:, None] - (level + 1)[..., None]):
            output = self.decoder(
                input_ids=tokens,
                attention_mask=_additive(torch.cat([start, ancestors], 2), self.states.dtype),
                encoder_hidden_states=self.encoded,
                encoder_attention_mask=self.mask,
                past_key_values=self.cache,
                use_cache=True,
            )
        states: Tensor = output.last_hidden_state
        return states

    @contextmanager
    def _positions(self, relative: Tensor) -> Iterator[None]:
        """Within, the decoder's position bias is that of `relative` (batch, new, all): key depth minus query depth."""
        for attention in self.biased:
            buckets = attention._relative_position_bucket(
                relative,
                bidirectional=False,
                num_buckets=attention.relative_attention_num_buckets,
                max_distance=attention.relative_attention_max_distance,
            )
            bias = attention.relative_attention_bias(buckets).permute(0, 3, 1, 2)
            attention.compute_bias = lambda *_, bias=bias, **__: bias
        try:
            yield
        finally:
            for attention in self.biased:
                del attention.compute_bias  # the class's own again


def _refused(model: PreTrainedModel) -> GemstError:
    return GemstError(
        f"semantic item IDs cannot be decoded with {type(model).__name__}",
        "Use a T5 backbone or a decoder-only one that takes position_ids, or atomic IDs",
    )


def _padded(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask (batch, longest) int64, padded on the right."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    ids = torch.zeros(mask.shape, dtype=torch.long)
    ids[mask] = torch.tensor([token for prompt in prompts for token in prompt])
    return ids.to(device), mask.long().to(device)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """(batch, 1, new, all): 0 where a token may look, the lowest number elsewhere. Every attention takes this form."""
    zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return zeros.masked_fill_(~mask, torch.finfo(dtype).min)[:, None]

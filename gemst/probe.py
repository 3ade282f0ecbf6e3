"""Whether gemst makes a family's logits as the family does: what it leaves out would be tuned and ranked in silence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gemst.backbone import hidden, is_encoder_decoder, item_logits, output_head
from gemst.errors import GemstError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

_WORDS = 5  # tokens of the text that is asked about


def own_logits(model: PreTrainedModel, last: int) -> Tensor:
    """Logits (1, positions, last) float32 of the vocabulary ids [0, last), from the family's own forward pass."""
    import torch

    with torch.no_grad():
        logits: Tensor = model(**_text(model, last)).logits[..., :last]
    return logits.float()


def check(model: PreTrainedModel, own: Tensor) -> None:
    """Raise GemstError when `item_logits` gives other logits than `own`, those of `own_logits`.

    A family may have layers between its last state and its Linear (BERT), a bias beside it (Marian), or another scale
    once its head is untied (UMT5). The largest gap may be the root of the head's precision, as a share of the largest
    logit: 3e-4 in float32, 0.09 in bfloat16.
    """
    import torch

    last = own.shape[-1]
    text = _text(model, last)
    with torch.no_grad():
        states = hidden(model, attention_mask=torch.ones_like(text["input_ids"]), use_cache=False, **text)
        gap = (item_logits(model, states, 0, last).float() - own).abs().max()
    if gap > torch.finfo(output_head(model).weight.dtype).eps ** 0.5 * own.abs().max():
        raise GemstError(
            f"{type(model).__name__} makes its logits in a way that gemst does not know",
            "Take another backbone, such as a Llama or a T5",
        )


def _text(model: PreTrainedModel, last: int) -> dict[str, Any]:
    """Any words will do; an encoder-decoder starts to answer with the same ones."""
    import torch

    words: torch.Tensor = torch.arange(1, min(last, _WORDS + 1), device=model.device)[None]
    return {"input_ids": words} | ({"decoder_input_ids": words[:, :3]} if is_encoder_decoder(model) else {})

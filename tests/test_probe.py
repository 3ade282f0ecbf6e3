"""Families whose logits gemst would make otherwise are refused before anything is tuned."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import (
    BertConfig,
    BertLMHeadModel,
    MarianConfig,
    MarianMTModel,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
    PreTrainedModel,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

from gemst import probe
from gemst.backbone import add_item_tokens
from gemst.errors import GemstError
from tests.ranking.tiny import FAMILIES, PECULIAR, tokenizer

_SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0,
}  # fmt: skip


def umt5(vocabulary: int) -> PreTrainedModel:
    """Scales its states as long as its head is tied; item rows untie it."""
    return UMT5ForConditionalGeneration(
        UMT5Config(
            vocab_size=vocabulary, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
            decoder_start_token_id=0, pad_token_id=0,
        )
    )  # fmt: skip


def modernbert(vocabulary: int) -> PreTrainedModel:
    """A dense layer and a norm before its Linear."""
    return ModernBertDecoderForCausalLM(ModernBertDecoderConfig(vocab_size=vocabulary, **_SMALL))


def bert(vocabulary: int) -> PreTrainedModel:
    return BertLMHeadModel(BertConfig(vocab_size=vocabulary, is_decoder=True, **_SMALL))


def marian(vocabulary: int) -> PreTrainedModel:
    """A bias that is no part of its Linear."""
    model = MarianMTModel(
        MarianConfig(
            vocab_size=vocabulary, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
            decoder_start_token_id=0, pad_token_id=0,
        )
    )  # fmt: skip
    model.final_logits_bias.normal_()
    return model


def add(make: Callable[[int], PreTrainedModel], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    words = tokenizer()
    add_item_tokens(make(len(words)).eval().to(dtype), words, ["<item_0>", "<item_1>"], *torch.randn(2, 2, 32))


dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@dtypes
@pytest.mark.parametrize("make", [umt5, modernbert, bert, marian])
def test_logits_made_in_another_way_are_refused_by_name(
    make: Callable[[int], PreTrainedModel], dtype: torch.dtype
) -> None:
    with pytest.raises(GemstError, match=r"^\w+(LM|MTModel|Generation|HeadModel) makes its logits in a way that gemst"):
        add(make, dtype)


@dtypes
@pytest.mark.parametrize("make", (FAMILIES | PECULIAR).values(), ids=(FAMILIES | PECULIAR).keys())
def test_no_other_family_is_refused(make: Callable[[int], PreTrainedModel], dtype: torch.dtype) -> None:
    add(make, dtype)


def test_a_model_that_is_not_a_number_is_not_blamed_on_its_family() -> None:
    model = FAMILIES["llama"](9).eval()
    torch.nn.init.constant_(model.lm_head.weight, torch.nan)
    probe.check(model, probe.own_logits(model, 9))

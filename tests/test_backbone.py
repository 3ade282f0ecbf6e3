"""Item tokens in a checkpoint: tied and untied heads, both families, and what a second round of tokens does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from gemst import backbone
from gemst.config import Backbone
from gemst.errors import GemstError
from tests.ranking.tiny import FAMILIES, PECULIAR, tokenizer

TOKENS = [f"<item_{number}>" for number in range(5)]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "t5", "gpt2"])
def test_old_rows_keep_their_bits_through_two_rounds_of_tokens(family: str, tied: bool, tmp_path: Path) -> None:
    words = tokenizer()
    old = len(words)
    torch.manual_seed(0)
    model = FAMILIES[family](old).eval()
    inputs, head = backbone.vocabulary(model), backbone.output_head(model)
    if tied:
        head.weight = inputs
        model.config.tie_word_embeddings = True
    else:
        head.weight = torch.nn.Parameter(torch.randn(old, 32))
        model.config.tie_word_embeddings = False
    rows_in, rows_out = torch.randn(5, 32), torch.randn(5, 32)
    expected_in = torch.cat([inputs.detach(), rows_in])
    expected_out = torch.cat([head.weight.detach(), rows_out])
    for part in (slice(0, 3), slice(3, 5)):
        first = backbone.add_item_tokens(model, words, TOKENS[part], rows_in[part], rows_out[part])
        assert first == old + part.start
        backbone.save(model, words, tmp_path / "model")
        model, words = backbone.load(Backbone(name=str(tmp_path / "model")))
    assert torch.equal(backbone.vocabulary(model), expected_in)
    assert torch.equal(backbone.output_head(model).weight, expected_out)
    assert words.convert_tokens_to_ids(TOKENS) == list(range(old, old + 5))
    assert max(backbone.encode_text(words, ["a <item_4> film"])[0]) < old


def test_item_tokens_have_no_bias_of_a_spare_row(tmp_path: Path) -> None:
    """Phi's head has a bias and its vocabulary spare rows: what a spare row was taught is nothing about an item."""
    words = tokenizer()
    first = len(words)
    model = PECULIAR["phi"](first + 3).eval()
    old = model.lm_head.bias.detach().clone()
    backbone.add_item_tokens(model, words, TOKENS, torch.randn(5, 32), torch.randn(5, 32))
    backbone.save(model, words, tmp_path / "model")
    bias = backbone.output_bias(backbone.load(Backbone(name=str(tmp_path / "model")))[0])
    assert bias is not None
    assert torch.equal(bias, torch.cat([old[:first], torch.zeros(5)]))


@pytest.mark.parametrize(
    ("settings", "window"),
    [
        ({}, 16),
        ({"use_sliding_window": False}, None),
        ({"max_window_layers": 2}, None),
        ({"sliding_window": None}, None),
    ],
)
def test_a_window_counts_where_a_layer_has_one(settings: dict[str, Any], window: int | None) -> None:
    """Qwen2 names a window that it may not use, or use in layers that it does not have."""
    chosen = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1, **settings}
    config = Qwen2Config(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, **chosen,
    )  # fmt: skip
    assert backbone.attention_window(Qwen2ForCausalLM(config)) == window


def test_a_chunk_is_a_window_too() -> None:
    assert backbone.attention_window(PECULIAR["llama4"](9)) == 32


@pytest.mark.parametrize(
    ("config", "generation", "start"),
    [(None, None, 0), (None, 3, 3), (2, 3, 2)],
    ids=["nowhere", "for generation", "both"],
)
def test_a_decoder_starts_somewhere(config: int | None, generation: int | None, start: int) -> None:
    model = FAMILIES["t5"](9)
    if config is None:
        del model.config.decoder_start_token_id
    else:
        model.config.decoder_start_token_id = config
    model.generation_config.decoder_start_token_id = generation
    assert backbone.decoder_start(model) == start
    assert backbone.decoder_start(FAMILIES["llama"](9)) is None


def test_a_scaled_head_stays_scaled_after_export(tmp_path: Path) -> None:
    """T5 multiplies states by d^-0.5 before a tied head. Item rows untie it; the scores must not change with that."""
    words = tokenizer()
    model = FAMILIES["t5"](len(words)).eval()
    backbone.add_item_tokens(model, words, TOKENS, torch.randn(5, 32), torch.randn(5, 32))
    backbone.save(model, words, tmp_path / "model")
    again, _ = backbone.load(Backbone(name=str(tmp_path / "model")))
    assert backbone.output_scale(again) == backbone.output_scale(model) == 32**-0.5
    asked = {"input_ids": torch.tensor([[3, 4, 5]]), "decoder_input_ids": torch.tensor([[0]])}
    with torch.no_grad():
        torch.testing.assert_close(again(**asked).logits, model(**asked).logits)


def test_item_tokens_never_take_the_place_of_a_word() -> None:
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "film": 7}, unk_token="a")))
    with pytest.raises(GemstError, match="ids have gaps"):
        backbone.add_item_tokens(FAMILIES["llama"](8), words, TOKENS, torch.zeros(5, 32), torch.zeros(5, 32))


def test_rows_of_texts_do_not_depend_on_how_many_are_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, words = FAMILIES["llama"](20), tokenizer()
    texts = ["old film", "", "the drama , a film", "comedy", "a a a", ""]
    whole = backbone.text_rows(model, words, texts)
    monkeypatch.setattr(backbone, "_TEXTS", 4)
    assert torch.equal(backbone.text_rows(model, words, texts), whole)


@pytest.mark.parametrize(("family", "limit"), [("llama", 256), ("gpt2", 256), ("t5", None), ("bloom", None)])
def test_context_length(family: str, limit: int | None) -> None:
    assert backbone.context_length((FAMILIES | PECULIAR)[family](20)) == limit

"""Drift against numbers computed the slow, obvious way."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from gemst.backbone import add_item_tokens
from gemst.errors import GemstError
from gemst.evaluation.drift import drift

WORDS = [f"{a}{b}word" for a in "abcdefghijklmnopqr" for b in "aeiouxyz"]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: n for n, word in enumerate(["<pad>", "</s>", "<unk>", *(f"Ġ{word}" for word in WORDS)])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="Ġ", prepend_scheme="always")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture
def llama(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def texts() -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, 60)) for _ in range(12)]


def shaken(model: Any, by: float) -> Any:
    """A copy whose every weight moved."""
    torch.manual_seed(1)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight += by * torch.randn_like(weight)
    return other


@torch.no_grad()
def slowly(before: Any, after: Any, stream: list[int], length: int, vocabulary: int) -> tuple[float, float, float]:
    nll, kl, count = [0.0, 0.0], 0.0, 0
    for start in range(0, len(stream) - length + 1, length):
        ids = torch.tensor([stream[start : start + length]])
        logs = [torch.log_softmax(m(input_ids=ids).logits[0, :-1, :vocabulary].double(), 1) for m in (before, after)]
        for at in range(length - 1):
            for side in (0, 1):
                nll[side] -= float(logs[side][at, ids[0, at + 1]])
            kl += float((logs[0][at].exp() * (logs[0][at] - logs[1][at])).sum())
            count += 1
    return math.exp(nll[0] / count), math.exp(nll[1] / count), kl / count


@pytest.mark.parametrize("length", [16, 40])
def test_equal_to_the_slow_way(
    llama: Any, tokenizer: Any, texts: list[str], length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gemst.evaluation.drift._CHUNK", 37)
    after = shaken(llama, 0.02)
    stream = [i for text in texts for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]][:300]
    expected = slowly(llama, after, stream, length, len(tokenizer))
    result = drift(llama, after, tokenizer, texts, tokens=300, length=length)
    measured = (result["perplexity_before"], result["perplexity_after"], result["kl"])
    assert measured == pytest.approx(expected, rel=1e-4)
    assert result["rise"] == pytest.approx(expected[1] / expected[0] - 1, rel=1e-3)
    assert result["kl"] > 0
    assert result["tokens"] == 300 // length * (length - 1)


def test_an_untouched_model_has_no_drift_though_it_has_item_tokens(
    llama: Any, tokenizer: Any, texts: list[str]
) -> None:
    after, wider = copy.deepcopy(llama), copy.deepcopy(tokenizer)
    torch.manual_seed(2)
    rows = torch.randn(20, 32)
    add_item_tokens(after, wider, [f"<item_{n}>" for n in range(20)], rows, 4 * rows)
    result = drift(llama, after, tokenizer, texts, tokens=400)
    assert result["rise"] == pytest.approx(0, abs=1e-6)
    assert result["kl"] == pytest.approx(0, abs=1e-6)
    assert result["cloze_before"] == result["cloze_after"]
    assert 0.01 < result["item_mass"] < 1  # loud item rows do take probability, and this is where it shows


def test_cloze_asks_words_and_a_model_that_knows_the_answer_gets_them_right(
    llama: Any, tokenizer: Any, texts: list[str]
) -> None:
    """A backbone made to prefer the word that follows always the same word."""
    chain = " ".join(WORDS * 3)
    knowing = copy.deepcopy(llama)
    optimizer = torch.optim.Adam(knowing.parameters(), lr=3e-3)
    ids = torch.tensor([tokenizer(chain)["input_ids"]])
    for _ in range(60):
        optimizer.zero_grad()
        knowing(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    result = drift(llama, knowing, tokenizer, [chain], tokens=400)
    assert result["cloze_questions"] > 50
    assert result["cloze_before"] < 0.35
    assert result["cloze_after"] > 0.9
    assert result["perplexity_after"] < result["perplexity_before"]


def test_encoder_decoder_reads_one_half_and_predicts_the_other(tokenizer: Any, texts: list[str]) -> None:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).eval()
    after = shaken(model, 0.05)
    result = drift(model, after, tokenizer, texts, tokens=320, length=32)
    stream = torch.tensor([i for text in texts for i in [*tokenizer(text)["input_ids"], 1]][:320]).reshape(10, 32)
    with torch.no_grad():
        losses = [m(input_ids=stream[:, :16], labels=stream[:, 16:].contiguous()).loss for m in (model, after)]
    assert result["perplexity_before"] == pytest.approx(float(losses[0].exp()), rel=1e-4)
    assert result["perplexity_after"] == pytest.approx(float(losses[1].exp()), rel=1e-4)
    assert result["tokens"] == 160
    for one in (model, after):
        del one.config.decoder_start_token_id
        one.generation_config.decoder_start_token_id = None
    assert drift(model, after, tokenizer, texts, tokens=320, length=32) == result  # 0 starts where nothing is named


def test_no_text_is_an_error_that_names_the_field(llama: Any, tokenizer: Any) -> None:
    with pytest.raises(GemstError, match=r"null_space.corpus"):
        drift(llama, llama, tokenizer, [], tokens=100)

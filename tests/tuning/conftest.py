"""Tiny real models of both families, and a small catalogue with its prompts."""

from __future__ import annotations

import datetime as dt

import numpy as np
import polars as pl
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from gemst.config import Prompts
from gemst.prompts import Prompter

WORDS = [
    "History",
    "Next",
    "Find",
    "comedy",
    "drama",
    "thriller",
    "old",
    "new",
    "good",
    "bad",
    "film",
    "the",
    "a",
    ":",
    ",",
    ".",
    "1990s",
]
ITEMS = 12


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", "</s>", *WORDS])}
    plain = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", unk_token="<unk>", eos_token="</s>")


def llama(vocabulary: int = 20) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def t5(vocabulary: int = 20) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=vocabulary, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


def gpt2(vocabulary: int = 20) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocabulary,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=256,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
    )
    return GPT2LMHeadModel(config).eval()


@pytest.fixture
def prompter(tokenizer: PreTrainedTokenizerFast) -> Prompter:
    return make_prompter(tokenizer)


def make_prompter(tokenizer: PreTrainedTokenizerFast, levels: tuple[int, ...] = (ITEMS,)) -> Prompter:
    codes = np.stack(np.unravel_index(np.arange(ITEMS), levels), axis=1)
    ids = (len(tokenizer) + codes + np.cumsum((0, *levels[:-1]))).astype(np.int64)
    return Prompter(tokenizer, ids, {f"i{n}": n for n in range(ITEMS)}, Prompts(), 20)


@pytest.fixture
def train() -> pl.DataFrame:
    return make_train()


def make_train(users: int = 2) -> pl.DataFrame:
    """Users with interleaved tasks and tied timestamps; histories strictly before each target."""
    rng = np.random.default_rng(3)
    rows = []
    for user in (f"u{number}" for number in range(1, users + 1)):
        items = rng.permutation(ITEMS)[:9]
        times = np.sort(rng.integers(0, 6, 9))
        for j, (item, time) in enumerate(zip(items, times, strict=True)):
            history = [f"i{i}" for i, t in zip(items, times, strict=True) if t < time]
            search = bool(j % 2)
            rows.append(
                (user, "search" if search else "recommendation", ["comedy", "old film"][j % 4 // 2] if search else None,
                 history, [f"i{item}"], [], dt.datetime(2020, 1, 1 + int(time), tzinfo=dt.UTC))
            )  # fmt: skip
    schema = {
        "user_id": pl.String, "task": pl.String, "query": pl.String, "history": pl.List(pl.String),
        "targets": pl.List(pl.String), "negatives": pl.List(pl.String), "timestamp": pl.Datetime("ms", "UTC"),
    }  # fmt: skip
    return pl.DataFrame(rows, schema=schema, orient="row").with_columns(clicked="timestamp")

"""A project small enough for tests: logs, a backbone, an encoder and general text, and parameters that fit them."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import numpy as np
import polars as pl
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

GENRES = ["comedy", "drama", "thriller"]
WORDS = ["History", "Next", "Find", ":", "the", "film", "old", "new", *GENRES, *"abcdefghijkl"]


def words(folder: Path) -> int:
    """Save a word-level tokenizer; returns its size."""
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    plain = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    plain.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    return len(vocabulary)


def build(root: Path) -> None:
    """Write logs, backbone, encoder and general text as a user's project folder holds them into `root`."""
    rng = np.random.default_rng(0)
    items = [f"i{n}" for n in range(12)]
    (root / "logs").mkdir()
    pl.DataFrame(
        {
            "item_id": items,
            "title": [f"the {name} film" for name in "abcdefghijkl"],
            "categories": [[GENRES[n % 3]] for n in range(12)],
            "embedding": rng.standard_normal((12, 4)).tolist(),
        }
    ).write_parquet(root / "logs" / "items.parquet")
    rows = [
        (
            f"u{user}",
            items[item],
            dt.datetime(2024, 1, 1, tzinfo=dt.UTC) + dt.timedelta(hours=int(at)),
            GENRES[item % 3] if at % 2 else None,
        )
        for user in range(20)
        for at, item in enumerate(rng.permutation(12)[:9])
    ]
    pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp", "query"], orient="row").write_parquet(
        root / "logs" / "events.parquet"
    )
    size = words(root / "backbone")
    words(root / "encoder")
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=128, tie_word_embeddings=True, pad_token_id=0,
        )
    ).save_pretrained(root / "backbone")  # fmt: skip
    BertModel(
        BertConfig(vocab_size=size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    ).save_pretrained(root / "encoder")
    text = [" ".join(rng.choice(WORDS, 60)) for _ in range(30)]
    pl.DataFrame({"title": [f"t{i}" for i in range(30)], "text": text}).write_parquet(root / "general.parquet")


SETTINGS = {
    "data": {"source": "table", "path": "logs"},
    "backbone": {"name": "backbone"},
    "item_ids": {"encoder": "encoder"},
    "item_rows": {"tokens": 0},  # a start that tuning can beat
    "null_space": {"corpus": "general.parquet", "tokens": 600, "sequence_length": 50, "energy": 0.2},
    "tuning": {
        "rank": 4, "lr": 1e-2, "item_lr": 1e-2, "epochs": 30, "chain_items": 12, "batch_tokens": 400,
        "validate_every": 40, "refresh_every": 10, "precision": "fp32",
    },
    "evaluation": {"drift_tokens": 400, "bootstrap": 50},
}  # fmt: skip

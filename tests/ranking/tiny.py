"""Tiny random models of both families that know a catalogue's ID tokens, and the brute-force scores of everything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from gemst.backbone import Tuned
from gemst.config import Prompts
from gemst.item_ids import ItemIds
from gemst.prompts import Prompter

WORDS = ["History", "Next", "Find", "comedy", "drama", "old", "film", "the", "a", ":", ",", "."]


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", "</s>", *WORDS])}
    plain = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", unk_token="<unk>", eos_token="</s>")


def llama(vocabulary: int) -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.15,
        )
    )  # fmt: skip


def t5(vocabulary: int) -> PreTrainedModel:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=vocabulary, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
            decoder_start_token_id=0, pad_token_id=0, initializer_factor=1.0, relative_attention_num_buckets=8,
            relative_attention_max_distance=8,
        )
    )  # fmt: skip


def gpt2(vocabulary: int) -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=4, n_positions=256, resid_pdrop=0, embd_pdrop=0,
            attn_pdrop=0, initializer_range=0.15,
        )
    )  # fmt: skip


def granite(vocabulary: int) -> PreTrainedModel:
    """Divides its logits."""
    return GraniteForCausalLM(GraniteConfig(vocab_size=vocabulary, logits_scaling=8.0, **_SMALL))


def gemma2(vocabulary: int) -> PreTrainedModel:
    """Squeezes its logits by a tanh, and every other layer has a window."""
    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=vocabulary, final_logit_softcapping=1.0, query_pre_attn_scalar=8, head_dim=8, sliding_window=32,
            **_SMALL,
        )
    )  # fmt: skip


def gemma3(vocabulary: int) -> PreTrainedModel:
    """Its embedding multiplies its rows by d^0.5."""
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=vocabulary, query_pre_attn_scalar=8, head_dim=8, sliding_window=32, pad_token_id=0, **_SMALL
        )
    )  # fmt: skip


def phi(vocabulary: int) -> PreTrainedModel:
    """Its output head has a bias, here one that matters."""
    model = PhiForCausalLM(PhiConfig(vocab_size=vocabulary, **_SMALL))
    torch.nn.init.normal_(model.lm_head.bias)
    return model


def mistral(vocabulary: int) -> PreTrainedModel:
    """A window that holds a prompt and its ID, and not all branches of a prompt."""
    return MistralForCausalLM(MistralConfig(vocab_size=vocabulary, sliding_window=24, head_dim=8, **_SMALL))


def bloom(vocabulary: int) -> PreTrainedModel:
    """Its positions cannot be given."""
    return BloomForCausalLM(BloomConfig(vocab_size=vocabulary, hidden_size=32, n_layer=2, n_head=4))


def lfm2(vocabulary: int) -> PreTrainedModel:
    """A short convolution in its first layer looks at neighbours whatever a mask says."""
    return Lfm2ForCausalLM(Lfm2Config(vocab_size=vocabulary, layer_types=["conv", "full_attention"], **_SMALL))


def llama4(vocabulary: int) -> PreTrainedModel:
    """It names no base model, and most of its layers see a chunk of the row."""
    return Llama4ForCausalLM(
        Llama4TextConfig(
            vocab_size=vocabulary, attention_chunk_size=32, head_dim=8, intermediate_size_mlp=48, num_local_experts=2,
            **_SMALL,
        )
    )  # fmt: skip


def gpt_neo(vocabulary: int) -> PreTrainedModel:
    """Counts its window in places of the row, which branches take."""
    return GPTNeoForCausalLM(
        GPTNeoConfig(
            vocab_size=vocabulary, hidden_size=32, num_layers=2, num_heads=4, window_size=24,
            attention_types=[[["global", "local"], 1]], max_position_embeddings=256, initializer_range=0.15,
        )
    )  # fmt: skip


def mamba(vocabulary: int) -> PreTrainedModel:
    """A state in place of a cache."""
    return MambaForCausalLM(MambaConfig(vocab_size=vocabulary, hidden_size=32, num_hidden_layers=2, state_size=8))


def openai_gpt(vocabulary: int) -> PreTrainedModel:
    """Takes positions, and keeps nothing of what it read."""
    return OpenAIGPTLMHeadModel(
        OpenAIGPTConfig(vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.15)
    )


_SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.15,
}  # fmt: skip

FAMILIES: dict[str, Callable[[int], PreTrainedModel]] = {"llama": llama, "t5": t5, "gpt2": gpt2}
PECULIAR: dict[str, Callable[[int], PreTrainedModel]] = {  # what ranking has to know of a family
    "granite": granite, "gemma2": gemma2, "gemma3": gemma3, "phi": phi, "mistral": mistral, "bloom": bloom,
    "lfm2": lfm2, "llama4": llama4, "gpt_neo": gpt_neo, "mamba": mamba, "openai_gpt": openai_gpt,
}  # fmt: skip


def make_ids(codes: np.ndarray, sizes: tuple[int, ...], active: np.ndarray | None = None) -> ItemIds:
    n = len(codes)
    return ItemIds(
        item_id=[f"i{row}" for row in range(n)], codes=np.asarray(codes, np.int32), level_sizes=sizes,
        strategy="atomic" if len(sizes) == 1 else "rq-kmeans", generation=np.zeros(n, np.int32),
        active=np.ones(n, bool) if active is None else active,
    )  # fmt: skip


def random_ids(n: int, sizes: tuple[int, ...], seed: int = 0) -> ItemIds:
    numbers = np.random.default_rng(seed).permutation(int(np.prod(sizes)))[:n]
    return make_ids(np.stack(np.unravel_index(numbers, sizes), axis=1), sizes)


def make_tuned(family: str, ids: ItemIds, seed: int = 0) -> Tuned:
    """A random model whose vocabulary ends with the ID tokens."""
    torch.manual_seed(seed)
    words = tokenizer()
    first = len(words)
    model = (FAMILIES | PECULIAR)[family](first + len(ids.tokens)).eval()
    return Tuned(model, words, ids, first, Prompter(words, ids.token_ids(first), ids.index, Prompts(), 20))


def examples(ids: ItemIds, n: int, seed: int = 0) -> pl.DataFrame:
    """Examples with histories of 0 to 6 items, every other one a search."""
    rng = np.random.default_rng(seed)
    histories = [[f"i{row}" for row in rng.integers(0, len(ids.item_id), rng.integers(0, 7))] for _ in range(n)]
    queries = [None if i % 2 else ["comedy", "old film", "the drama , a film"][i // 2 % 3] for i in range(n)]
    return pl.DataFrame(
        {"history": histories, "query": queries}, schema_overrides={"history": pl.List(pl.String), "query": pl.String}
    )


@torch.no_grad()
def brute_force(tuned: Tuned, asked: pl.DataFrame) -> np.ndarray:
    """Scores (examples, items): one plain forward pass per pair, no batch, no cache, no mask."""
    model, starts = tuned.model, tuned.ids.level_starts
    tokens = tuned.ids.token_ids(tuned.first)
    scores = np.zeros((len(asked), len(tokens)), np.float64)
    for row, prompt in enumerate(tuned.prompter.encode(asked)):
        for item, code in enumerate(tokens.tolist()):
            if model.config.is_encoder_decoder:
                logits = model(
                    input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[0, *code[:-1]]])
                ).logits[0]
            else:
                logits = model(input_ids=torch.tensor([prompt + code[:-1]])).logits[0, len(prompt) - 1 :]
            for level, token in enumerate(code):
                own = logits[level, tuned.first + starts[level] : tuned.first + starts[level + 1]].log_softmax(-1)
                scores[row, item] += float(own[token - tuned.first - starts[level]])
    return scores

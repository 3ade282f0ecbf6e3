"""Item vectors from encoders: the mean over a text's own tokens, whatever it is batched with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gemst import item_ids
from gemst.config import Config
from gemst.errors import GemstError
from gemst.item_ids.embeddings import documents, embed_texts, item_vectors
from gemst.item_ids.semantic import centred


def folder(path: Path, family: str) -> Path:
    words = ["[PAD]", "[UNK]", *["old", "new", "film", "the", "comedy", "drama", "war"]]
    plain = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    plain.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="[UNK]", pad_token="[PAD]", eos_token="[UNK]"
    ).save_pretrained(path)
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 20,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    model = BertModel(BertConfig(**sizes)) if family == "bert" else LlamaForCausalLM(LlamaConfig(**sizes))
    model.save_pretrained(path)
    return path


def test_mean_pooling_is_blind_to_padding_and_order(tmp_path: Path) -> None:
    name = str(folder(tmp_path, "bert"))
    texts = ["old film", "the new comedy the old drama", "war"]
    together = embed_texts(texts, name)
    alone = np.concatenate([embed_texts([text], name) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    assert together.dtype == np.float32
    model = BertModel.from_pretrained(name).eval()
    mean = model(torch.tensor([[2, 4]])).last_hidden_state[0].mean(0)
    np.testing.assert_allclose(together[0], torch.nn.functional.normalize(mean, dim=0).detach().numpy(), atol=1e-5)


def test_no_texts_give_no_vectors(tmp_path: Path) -> None:
    assert embed_texts([], str(folder(tmp_path, "bert"))).shape == (0, 16)


def test_a_missing_encoder_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(GemstError, match=r"item_ids.encoder = .* cannot be loaded"):
        embed_texts(["film"], str(tmp_path / "nowhere"))
    weights = folder(tmp_path, "bert") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(GemstError, match=r"item_ids.encoder = .* cannot be loaded"):
        embed_texts(["film"], str(tmp_path))


def test_item_vectors_from_the_backbone(tmp_path: Path) -> None:
    items = pl.DataFrame(
        {
            "title": ["old film", "new film", "war drama"],
            "text": [None, "the comedy", None],
            "categories": [["war"], [], ["drama"]],
        }
    )
    assert documents(items) == ["old film. war", "new film. the comedy", "war drama. drama"]
    config = Config.model_validate(
        {"item_ids": {"embedding": "backbone"}, "backbone": {"name": str(folder(tmp_path, "llama"))}}
    )
    vectors = item_vectors(items, config)
    assert vectors.shape == (3, 16)
    np.testing.assert_allclose(item_vectors(items[1:2], config), vectors[1:2], atol=1e-5)  # alone or in company
    around = centred(vectors, vectors.mean(0))
    np.testing.assert_allclose(np.linalg.norm(around, axis=1), 1, atol=1e-5)
    assert (around @ around.T)[~np.eye(3, dtype=bool)].max() < 0.9


def test_an_append_by_the_backbone_measures_from_the_same_centre(tmp_path: Path) -> None:
    words = ["old film", "new film", "war drama", "the comedy", "a film", "drama", "old drama", "war"]
    items = pl.DataFrame(
        {
            "item_id": [f"i{row}" for row in range(len(words))], "title": words, "text": [None] * len(words),
            "categories": [[]] * len(words),
        },
        schema_overrides={"text": pl.String, "categories": pl.List(pl.String)},
    )  # fmt: skip
    settings = {"strategy": "rq-kmeans", "embedding": "backbone", "levels": 2, "codebook_size": 4}
    backbone = {"name": str(folder(tmp_path, "llama"))}
    config = Config.model_validate({"item_ids": settings, "backbone": backbone})
    train = pl.DataFrame({"user_id": [], "query": [], "targets": []})
    item_ids.build(items, train, config, tmp_path / "g0")
    published = item_ids.load(tmp_path / "g0").codes[:, 0]
    extends = config.model_copy(update={"item_ids": config.item_ids.model_copy(update={"extends": tmp_path / "g0"})})
    landed = []
    for row in range(len(words)):
        copy = items[row].with_columns(item_id=pl.lit("copy"))
        item_ids.build(pl.concat([items, copy]), train, extends, tmp_path / f"append-{row}")
        landed.append(item_ids.load(tmp_path / f"append-{row}").codes[-1, 0])
    assert np.mean(published == landed) > 0.6
    other = config.model_validate(extends.model_dump() | {"backbone": {"name": "elsewhere"}})
    with pytest.raises(GemstError, match=r"was built with backbone.name = .*Set backbone.name to"):
        item_ids.build(items, train, other, tmp_path / "no")

"""Checkpoints that are not whole, or shallower than asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from gemst.config import Backbone
from gemst.errors import GemstError
from gemst.loading import load
from tests.ranking.tiny import FAMILIES, tokenizer


def test_layers_that_a_checkpoint_lacks_are_not_made_up(tmp_path: Path) -> None:
    FAMILIES["llama"](20).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    assert load(Backbone(name=str(tmp_path), num_layers=1))[0].config.num_hidden_layers == 1
    with pytest.raises(GemstError, match=r"backbone\.num_layers = 4, and the backbone has 2"):
        load(Backbone(name=str(tmp_path), num_layers=4))


def test_a_cut_checkpoint_is_one_line(tmp_path: Path) -> None:
    FAMILIES["llama"](20).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(GemstError, match=r"backbone\.name = .* cannot be loaded"):
        load(Backbone(name=str(tmp_path)))


@pytest.mark.parametrize(
    ("family", "tensor"),
    [("llama", "lm_head.weight"), ("llama", "model.norm.weight"), ("gpt2", "transformer.wpe.weight")],
)
def test_a_tensor_that_a_checkpoint_lacks_is_not_made_up(family: str, tensor: str, tmp_path: Path) -> None:
    FAMILIES[family](20).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[tensor]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GemstError, match=rf"lacks 1 of its tensors, such as {tensor}: they would be random"):
        load(Backbone(name=str(tmp_path)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tied_head_is_no_missing_tensor(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family](20)
    model.get_output_embeddings().weight = model.get_input_embeddings().weight
    model.config.tie_word_embeddings = True
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    again, _ = load(Backbone(name=str(tmp_path)))
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight

"""SmolLM2-135M-Instruct: from the GGUF of its package to a plain float32 safetensors checkpoint."""

from __future__ import annotations

from pathlib import Path

from gemst.errors import GemstError

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

# A probe and its ids, special tokens off: a converted tokenizer that splits it otherwise is not this model's.
_PROBE = ("Hello world, the film 12345", [19556, 905, 28, 260, 4771, 216, 33, 34, 35, 36, 37])


def make(source: Path, folder: Path) -> None:
    """Write config, weights (dequantized, float32) and tokenizer as `transformers` loads them without gguf.

    Raises GemstError when the installed transformers converts the tokenizer to something else.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    text, expected = _PROBE
    if tokenizer(text, add_special_tokens=False)["input_ids"] != expected or tokenizer.decode(expected) != text:
        raise GemstError(
            f"the tokenizer in {GGUF} does not survive its conversion",
            "Install the versions of constraints.txt: `make setup`",
        )
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    # transformers refuses to save a model that was loaded from a GGUF: its config says quantized. The weights are not.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.__dict__.pop("_model_name_or_path", None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.config._name_or_path = ""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

"""A pretrained checkpoint into memory, or a line that says what is wrong with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gemst.config import Backbone
from gemst.errors import GemstError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load(backbone: Backbone) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a decoder-only or encoder-decoder checkpoint in float32, in eval mode, with its tokenizer.

    `backbone.name` is a local folder or a hub name. Raises GemstError when it is neither, when its files are damaged
    or lack a tensor, or when it has fewer than `backbone.num_layers` layers.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # loading takes a second; the stages show progress of their own
    try:
        config = AutoConfig.from_pretrained(backbone.name)
        family = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        if backbone.num_layers is not None:
            _check_depth(config, backbone.num_layers)
            config.num_hidden_layers = backbone.num_layers
            if hasattr(config, "num_decoder_layers"):
                config.num_decoder_layers = backbone.num_layers
            if getattr(config, "layer_types", None):
                config.layer_types = config.layer_types[: backbone.num_layers]
        loaded: Any = family.from_pretrained(
            backbone.name, config=config, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(backbone.name)
    except (OSError, ValueError, SafetensorError) as error:
        raise GemstError(
            f"backbone.name = {backbone.name!r} cannot be loaded ({str(error).splitlines()[0]})",
            "Run `gemst fetch` for the default backbone, or name a folder with config.json and safetensors",
        ) from None
    model, found = loaded
    missing = sorted(found["missing_keys"])  # a tied head is none of them
    if missing:
        raise GemstError(
            f"backbone.name = {backbone.name!r} lacks {len(missing)} of its tensors, such as {missing[0]}: "
            "they would be random",
            "Take a whole checkpoint",
        )
    return model.eval(), tokenizer


def _check_depth(config: Any, layers: int) -> None:
    """Layers beyond the checkpoint's would be random ones, other ones at every load."""
    depth = min(config.num_hidden_layers, getattr(config, "num_decoder_layers", None) or config.num_hidden_layers)
    if layers > depth:
        raise GemstError(f"backbone.num_layers = {layers}, and the backbone has {depth}", f"Keep {depth} or fewer")

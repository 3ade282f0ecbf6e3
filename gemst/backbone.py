"""The pretrained language model: give it item tokens, run it without unread logits, export it plainly."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemst.config import Backbone, Config
from gemst.errors import GemstError
from gemst.loading import load

if TYPE_CHECKING:
    import polars as pl
    import torch
    from torch import Tensor
    from torch.nn import Linear
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from gemst.item_ids import ItemIds
    from gemst.memory import Memory
    from gemst.prompts import Prompter


_ATTENTION = {"attention", "full_attention", "sliding_attention", "chunked_attention"}
_TEXTS = 10_000  # whose token embeddings are in memory at once


@dataclass(frozen=True)
class Tuned:
    """A tuned model with everything it takes to rank: the artefact folder `artifacts/model`, loaded."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    ids: ItemIds
    first: int  # vocabulary id of the first item token
    prompter: Prompter
    memory: Memory | None = None  # the log's counts, which rankings may go by as well

    def only(self, item_ids: pl.Series) -> Tuned:
        """The same model for the items that `item_ids` holds; its others stay in histories and are never ranked."""
        return replace(self, ids=self.ids.only(item_ids))


def vocabulary(model: PreTrainedModel) -> Tensor:
    """The input embedding's rows (tokens, d)."""
    weight: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    return weight


def output_head(model: PreTrainedModel) -> Linear:
    """The Linear that turns states into logits."""
    head: Linear = model.get_output_embeddings()
    return head


def output_bias(model: PreTrainedModel) -> Tensor | None:
    """The output head's bias (tokens,): Phi has one, most families have none."""
    bias: Tensor | None = getattr(output_head(model), "bias", None)
    return bias


def embedded(model: PreTrainedModel, rows: Tensor) -> Tensor:
    """Rows (..., d) of the input embedding as the layers get them: Gemma's embedding multiplies its own by sqrt(d)."""
    scale = getattr(model.get_input_embeddings(), "embed_scale", None)
    return rows if scale is None else rows * scale


def is_encoder_decoder(model: PreTrainedModel) -> bool:
    """True for the T5 family, False for decoder-only models."""
    return bool(model.config.is_encoder_decoder)


def decoder_start(model: PreTrainedModel) -> int | None:
    """The first token of an encoder-decoder's decoder, 0 where it names none; None for decoder-only models."""
    if not is_encoder_decoder(model):
        return None
    places = (model.config, getattr(model, "generation_config", None))
    named = (getattr(place, "decoder_start_token_id", None) for place in places)
    return next((int(token) for token in named if token is not None), 0)


def tower(model: PreTrainedModel) -> Any:
    """A decoder-only model without its head."""
    base = model.base_model  # Llama 4 names no such part: it is the model itself then
    return base if base is not model else getattr(model, "model", model)


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether a decoder-only family lets the caller place tokens, which packed rows and beams need.

    That takes `position_ids` and layers that look through a mask: convolutions, linear attention and Mamba carry a
    state along the row whatever the mask says, and ALiBi and GPT-Neo's masks count places in the row.
    """
    from inspect import signature

    config = model.config.get_text_config()
    carried = getattr(model, "_is_stateful", False) or not set(getattr(config, "layer_types", None) or ()) <= _ATTENTION
    placed = "position_ids" in signature(tower(model).forward).parameters
    counted = getattr(config, "alibi", False) or getattr(config, "attention_layers", None)
    return placed and not carried and not counted


def context_length(model: PreTrainedModel) -> int | None:
    """The most tokens a decoder-only family was made for; None where it has no limit (the T5 family, ALiBi)."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if limit and not is_encoder_decoder(model) else None


def attention_window(model: PreTrainedModel) -> int | None:
    """The most tokens, itself included, that a layer of a decoder-only family looks at; None where all see all.

    Only of families that take positions (`takes_positions`).
    """
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds and "chunked_attention" in kinds:  # Llama 4
        return getattr(config, "attention_chunk_size", None)
    off = not getattr(config, "use_sliding_window", True) or (kinds and "sliding_attention" not in kinds)
    return None if off else getattr(config, "sliding_window", None)


def settle(model: PreTrainedModel, device: torch.device) -> None:
    """Move the model to `device`, with the attention that is fastest there for rows of a few hundred tokens."""
    if device.type == "cpu" and not is_encoder_decoder(model):
        model.set_attn_implementation("eager")  # torch's fused attention is 2-4 times slower on CPU at these lengths
    model.to(device)  # type: ignore[arg-type]


def add_item_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: list[str], rows: Tensor, out_rows: Tensor
) -> int:
    """Add `tokens` to the vocabulary with input rows `rows` and output rows `out_rows`, both (tokens, d).

    A head tied to the input embedding is untied; old rows keep their bits. Returns the vocabulary id of the first
    new token. They are special tokens, so that text encoded with `split_special_tokens` can never spell one.
    Raises GemstError when the tokenizer knows one of them already, or its ids have gaps, or the family makes its logits
    in a way of its own.
    """
    import torch
    from tokenizers import AddedToken

    from gemst import probe

    first = len(tokenizer)
    if max(tokenizer.get_vocab().values(), default=-1) >= first:
        raise GemstError(
            "the tokenizer's ids have gaps: a new token would take the place of a word", "Take another backbone"
        )
    added = tokenizer.add_special_tokens(
        {"extra_special_tokens": [AddedToken(token, special=True, normalized=False) for token in tokens]},
        replace_extra_special_tokens=False,
    )
    if added != len(tokens) or len(tokenizer) != first + len(tokens):
        raise GemstError(
            f"the tokenizer knows item tokens already, such as {tokens[0]!r}", "Start from a plain backbone"
        )
    own_logits = probe.own_logits(model, first)
    size = max(first + len(tokens), vocabulary(model).shape[0])  # T5 keeps spare rows: they come first
    own = output_head(model).weight.detach().clone()
    model.resize_token_embeddings(size, mean_resizing=False)
    inputs, head = vocabulary(model), output_head(model)
    if head.weight is inputs:
        head.weight = torch.nn.Parameter(inputs.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False
    with torch.no_grad():
        head.weight[: len(own)] = own  # resizing ties T5's head again, even one that has weights of its own
        inputs[first : first + len(tokens)] = rows
        head.weight[first : first + len(tokens)] = out_rows
        bias = output_bias(model)
        if bias is not None:  # a spare row of the vocabulary may have a large one, below every word
            bias[first : first + len(tokens)] = 0
    probe.check(model, own_logits)
    return first


def text_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Tensor:
    """Start rows from text: the mean of each text's token embeddings, scaled to the vocabulary's mean norm.

    Returns (len(texts), d). A text without any token gets the vocabulary's mean row.
    """
    import torch

    embedding = vocabulary(model).detach()
    rows = torch.zeros(len(texts), embedding.shape[1])
    for start in range(0, len(texts), _TEXTS):
        encoded = encode_text(tokenizer, texts[start : start + _TEXTS])
        flat = torch.tensor([token for tokens in encoded for token in tokens], dtype=torch.long)
        lengths = torch.tensor([len(tokens) for tokens in encoded], dtype=torch.long)
        owner = torch.repeat_interleave(torch.arange(len(encoded)), lengths)
        mine = rows[start : start + _TEXTS].index_add_(0, owner, embedding[flat])
        mine /= lengths.clamp(min=1)[:, None]
        mine[lengths == 0] = embedding.mean(0)
    return rows * (embedding.norm(dim=1).mean() / rows.norm(dim=1, keepdim=True).clamp(min=1e-12))


def encode_text(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of plain text: no special token is added, and none is recognised inside it."""
    if not texts:
        return []
    encoded: list[list[int]] = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return encoded


def hidden(model: PreTrainedModel, **inputs: Any) -> Tensor:
    """Last hidden state (batch, positions, d) without the head.

    Decoder-only: `inputs` go to the tower. Encoder-decoder: they must name `decoder_input_ids` or
    `decoder_inputs_embeds`; the states are the decoder's.
    """
    if not is_encoder_decoder(model):
        states: Tensor = tower(model)(**inputs).last_hidden_state
        return states
    mask = inputs.get("attention_mask")
    own = {name: value for name, value in inputs.items() if name.startswith("decoder_")}
    shared = {name: value for name, value in inputs.items() if name not in own and name != "use_cache"}
    encoded = model.get_encoder()(**shared).last_hidden_state
    decoded: Tensor = model.get_decoder()(
        **{name.removeprefix("decoder_"): value for name, value in own.items()},
        encoder_hidden_states=encoded,
        encoder_attention_mask=mask,
        use_cache=False,
    ).last_hidden_state
    return decoded


def item_logits(model: PreTrainedModel, states: Tensor, first: int, last: int) -> Tensor:
    """Logits (..., last - first) of the vocabulary ids [first, last) alone, with the family's own scaling."""
    import torch

    bias = output_bias(model)
    own = None if bias is None else bias[first:last].to(states.dtype)
    states = states * output_scale(model)
    return capped(
        model, torch.nn.functional.linear(states, output_head(model).weight[first:last].to(states.dtype), own)
    )


def output_scale(model: PreTrainedModel) -> float:
    """What the family multiplies states (or, which is the same, logits) with: d^-0.5 in T5 1.0, else mostly 1."""
    config = model.config
    if getattr(config, "scale_decoder_outputs", False):
        return float(config.d_model**-0.5)
    return float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)


def capped(model: PreTrainedModel, logits: Tensor) -> Tensor:
    """Logits as the family gives them out: squeezed by a tanh in Gemma 2, as they are elsewhere."""
    import torch

    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a plain transformers checkpoint (safetensors): it loads without gemst."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def best_device() -> torch.device:
    """The GPU that is this process's, where there is one."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def set_threads(config: Config) -> None:
    """As many threads as `threads` says; none: torch's own choice."""
    if config.threads:
        import torch

        torch.set_num_threads(config.threads)


def load_tuned(folder: Path, device: torch.device | str = "cpu") -> Tuned:
    """Load what `gemst tune` wrote, to `device`. Raises GemstError when the folder is not such an artefact."""
    from gemst import item_ids, memory
    from gemst.config import Prompts
    from gemst.files import read_json, require
    from gemst.prompts import Prompter

    card = read_json(require(folder / "gemst.json", made_by="gemst tune"))
    model, tokenizer = load(Backbone(name=str(folder)))
    model.to(device)  # type: ignore[arg-type]
    ids = item_ids.load(folder / "item_ids")
    prompter = Prompter(
        tokenizer, ids.token_ids(card["first_item_token"]), ids.index, Prompts(**card["prompts"]), card["max_history"],
        context_length(model),
    )  # fmt: skip
    counted = folder / "memory"
    remembered = memory.load(counted, ids) if counted.exists() else None
    return Tuned(model, tokenizer, ids, card["first_item_token"], prompter, remembered)

"""How much general knowledge tuning cost: perplexity, KL to the backbone and a cloze probe on held-out general text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gemst import backbone
from gemst.errors import GemstError
from gemst.progress import track

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LENGTH = 512  # tokens of a sequence
_BATCH = 4  # sequences of a batch
_CHUNK = 256  # positions whose logits exist at one time
_CHOICES = 10  # words of a cloze question, the right one included
_CLOZE_COMMON = 100  # most frequent words of the text: too easy to ask for
_CLOZE_LETTERS = 5  # shortest word asked for


@dataclass
class _Sums:
    nll: NDArray[np.float64]  # before, after: summed over predicted tokens
    right: NDArray[np.int64]  # before, after: cloze questions answered
    kl: float = 0.0
    item_mass: float = 0.0
    tokens: int = 0
    questions: int = 0


def drift(
    before: PreTrainedModel,
    after: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    tokens: int,
    length: int = LENGTH,
) -> dict[str, float]:
    """Compare a tuned model with its backbone on the first `tokens` tokens of `texts`.

    Texts are joined with end-of-text tokens and cut into sequences of `length`; an encoder-decoder reads the first
    half of each and predicts the second. `tokenizer` is the backbone's: both distributions are taken over its
    vocabulary, so the tuned model's item tokens take no part. Returns

        perplexity_before, perplexity_after, rise (after / before - 1), kl (mean KL(before || after) per token, nats),
        item_mass (probability the tuned model spends on item tokens in general text, left out of the above),
        cloze_before, cloze_after (share right), cloze_questions, tokens (predicted).

    The cloze probe asks, wherever the next token is a whole word of at least five letters and not among the hundred
    most frequent, which of ten such words (nine drawn from the same text by frequency) is likeliest there; chance is
    0.1. Raises GemstError when the texts hold fewer than two tokens.
    """
    import torch

    stream = token_stream(tokenizer, texts, tokens)
    if len(stream) < 2:
        raise GemstError("the general text for the drift check is empty", "Look at null_space.corpus in params.yaml")
    options = _options(tokenizer, stream)
    vocabulary = min(len(tokenizer), _rows(before))
    sums = _Sums(np.zeros(2), np.zeros(2, np.int64))
    with torch.inference_mode():
        for batch in track(sequences(before, stream, length), "general text"):
            states = [predicting_states(model, torch.from_numpy(batch), tokenizer) for model in (before, after)]
            targets = torch.from_numpy(batch[:, -states[0].shape[1] :]).reshape(-1)
            for start in range(0, len(targets), _CHUNK):
                part = slice(start, start + _CHUNK)
                chunk = [state.reshape(-1, state.shape[-1])[part] for state in states]
                _add(sums, (before, after), chunk, targets[part], vocabulary, options)
    perplexity = np.exp(sums.nll / sums.tokens)
    return {
        "perplexity_before": float(perplexity[0]),
        "perplexity_after": float(perplexity[1]),
        "rise": float(perplexity[1] / perplexity[0] - 1),
        "kl": sums.kl / sums.tokens,
        "item_mass": sums.item_mass / sums.tokens,
        "cloze_before": float(sums.right[0] / max(sums.questions, 1)),
        "cloze_after": float(sums.right[1] / max(sums.questions, 1)),
        "cloze_questions": float(sums.questions),
        "tokens": float(sums.tokens),
    }


def _add(
    sums: _Sums,
    models: tuple[PreTrainedModel, PreTrainedModel],
    states: list[Tensor],
    targets: Tensor,
    vocabulary: int,
    options: dict[int, NDArray[np.int64]],
) -> None:
    """Add one chunk: `states` (positions, d) of both models, `targets` (positions,)."""
    import torch

    before, after = models
    old = backbone.item_logits(before, states[0], 0, vocabulary).float()
    whole = backbone.item_logits(after, states[1], 0, _rows(after)).float()
    left, right = torch.log_softmax(old, dim=1), torch.log_softmax(whole[:, :vocabulary], dim=1)
    at = targets[:, None].to(old.device)
    sums.nll += np.array([-float(part.gather(1, at).sum(dtype=torch.float64)) for part in (left, right)])
    sums.kl += float((left.exp() * (left - right)).sum(dtype=torch.float64))
    sums.item_mass += float(torch.softmax(whole, dim=1)[:, vocabulary:].sum(dtype=torch.float64))
    sums.tokens += len(targets)
    asked = [i for i, token in enumerate(targets.tolist()) if token in options]
    if asked:
        choices = torch.from_numpy(np.stack([options[int(targets[i])] for i in asked])).to(old.device)
        for number, part in enumerate((left, right)):
            sums.right[number] += int((part[asked].gather(1, choices).argmax(1) == 0).sum())
        sums.questions += len(asked)


def predicting_states(model: PreTrainedModel, batch: Tensor, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Hidden states (sequences, predicted positions, d): the one at j sees everything before the j-th target."""
    import torch

    batch = batch.to(model.device)
    start = backbone.decoder_start(model)
    if start is None:
        return backbone.hidden(model, input_ids=batch[:, :-1])
    half = batch.shape[1] // 2
    decoder_ids = torch.cat([torch.full_like(batch[:, :1], start), batch[:, half:-1]], dim=1)
    return backbone.hidden(model, input_ids=batch[:, :half], decoder_input_ids=decoder_ids)


def _rows(model: PreTrainedModel) -> int:
    """Rows of the output head."""
    return int(model.get_output_embeddings().weight.shape[0])


def token_stream(tokenizer: PreTrainedTokenizerBase, texts: list[str], tokens: int) -> NDArray[np.int64]:
    """The first `tokens` token ids of the texts, joined by end-of-text; no more text is encoded than needed."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream: list[int] = []
    for text in texts:
        if len(stream) >= tokens:
            break
        stream += backbone.encode_text(tokenizer, [text])[0] + end
    return np.array(stream[:tokens], np.int64)


def sequences(model: PreTrainedModel, stream: NDArray[np.int64], length: int) -> list[NDArray[np.int64]]:
    """Batches (sequences, length); a remainder shorter than `length` is left out.

    Where the stream or the model's context is shorter than `length`, that is what sequences have.
    """
    length = min(length, len(stream), backbone.context_length(model) or length)
    rows = stream[: len(stream) // length * length].reshape(-1, length)
    return [rows[start : start + _BATCH] for start in range(0, len(rows), _BATCH)]


def _options(tokenizer: PreTrainedTokenizerBase, stream: NDArray[np.int64]) -> dict[int, NDArray[np.int64]]:
    """Cloze choices by word: token -> (10,) tokens, the right one first, the others neighbours in frequency."""
    tokens, counts = np.unique(stream, return_counts=True)
    pieces = tokenizer.convert_ids_to_tokens(tokens.tolist())
    words = [piece[:1] in "Ġ▁" and piece[1:].isascii() and piece[1:].isalpha() for piece in pieces]
    order = np.lexsort((tokens, -counts))
    frequent = [i for i in order if words[i]][_CLOZE_COMMON:]
    chosen = [i for i in frequent if len(pieces[i]) > _CLOZE_LETTERS]
    if len(chosen) < _CHOICES:
        return {}
    pool = tokens[chosen]
    steps = np.arange(_CHOICES) - _CHOICES // 2
    near = np.clip(np.arange(len(pool))[:, None], _CHOICES // 2, len(pool) - _CHOICES // 2) + steps
    others = near[near != np.arange(len(pool))[:, None]].reshape(len(pool), _CHOICES - 1)
    return {int(token): np.concatenate([[token], pool[row]]) for token, row in zip(pool, others, strict=True)}

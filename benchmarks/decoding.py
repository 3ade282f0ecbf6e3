"""Seconds of constrained decoding: against `generate(prefix_allowed_tokens_fn=...)`, by catalogue size, for reranking.

Both sides of a comparison run in this process on the same model, prompts and catalogue. The last line is one JSON
object. On a busy machine OMP_NUM_THREADS=1 gives steadier numbers for both sides.

    python benchmarks/decoding.py                                       # a random Llama of 4 layers
    python benchmarks/decoding.py --backbone data/smollm2-135m-instruct --batch 4
    python benchmarks/decoding.py --part trie
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
import torch

from gemst.backbone import Tuned, add_item_tokens
from gemst.config import Backbone, Ranking
from gemst.item_ids import ItemIds, trie
from gemst.progress import peak_mib
from gemst.ranking import rank, score
from gemst.ranking.beams import TrieWalk

CATALOGUE, LEVELS, CODES = 100_000, 3, 64  # codes per level: the shipped item_ids.codebook_size
ATOMIC = 20_000  # items of the catalogue that is reranked by atomic IDs
HISTORY, WORDS = 20, 12  # a prompt: items of the history, tokens of text


class FixedPrompts:
    """Stands in for the Prompter: a random prompt for each example, so that both sides get the same tokens."""

    def __init__(self, vocabulary: int, rows: int, levels: int) -> None:
        rng = np.random.default_rng(0)
        longest = HISTORY * levels + WORDS
        self.prompts = [rng.integers(5, vocabulary, longest - row % 8).tolist() for row in range(rows)]

    def encode(self, examples: pl.DataFrame) -> list[list[int]]:
        return self.prompts[: len(examples)]


def catalogue(n: int, levels: int) -> ItemIds:
    """`n` IDs of `levels` codes, each a uniformly random different one; of one level: atomic."""
    rng = np.random.default_rng(0)
    size = CODES if levels > 1 else n
    numbers = rng.permutation(size**levels)[:n]
    codes = np.stack([(numbers // size**power) % size for power in range(levels - 1, -1, -1)], axis=1).astype(np.int32)
    names = [f"i{row}" for row in range(n)] if n <= 1_000_000 else []
    strategy = "rq-kmeans" if levels > 1 else "atomic"
    return ItemIds(names, codes, (size,) * levels, strategy, np.zeros(n, np.int32), np.ones(n, bool))


def make(backbone: str | None, rows: int, ids: ItemIds) -> Tuned:
    """A model with rows for the catalogue's tokens."""
    torch.manual_seed(0)
    if backbone is None:
        from transformers import LlamaConfig, LlamaForCausalLM

        model: Any = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=8192 + len(ids.tokens), hidden_size=256, intermediate_size=704, num_hidden_layers=4,
                num_attention_heads=8, num_key_value_heads=4, initializer_range=0.08,
            )
        ).eval()  # fmt: skip
        tokenizer: Any = None
        first = 8192
    else:
        from gemst.backbone import load

        model, tokenizer = load(Backbone(name=backbone, num_layers=None))
        rows_in = 0.1 * torch.randn(len(ids.tokens), model.config.hidden_size)
        first = add_item_tokens(model, tokenizer, ids.tokens, rows_in, rows_in)
    model.generation_config.eos_token_id = None
    return Tuned(model, tokenizer, ids, first, FixedPrompts(8000, rows, ids.codes.shape[1]))  # type: ignore[arg-type]


def timed(work: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    """Result and median seconds."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - began)
    return result, statistics.median(seconds)


def prefix_function(tuned: Tuned, prompt_length: int, codes: np.ndarray) -> Callable[[int, torch.Tensor], list[int]]:
    """What users of `generate` write: a dictionary from every prefix to its next tokens."""
    starts = np.asarray(tuned.ids.level_starts[:-1]) + tuned.first
    children: dict[tuple[int, ...], set[int]] = {}
    for code in (codes + starts).tolist():
        for level in range(len(code)):
            children.setdefault(tuple(code[:level]), set()).add(code[level])
    allowed = {prefix: sorted(tokens) for prefix, tokens in children.items()}
    return lambda _, tokens: allowed.get(tuple(tokens[prompt_length:].tolist()), [0])


def generate(
    tuned: Tuned, prompts: list[list[int]], beams: int, allowed: Callable[..., list[int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Codes (rows, beams, levels) and scores (rows, beams) of Hugging Face's constrained beam search.

    A hook leaves each step the logits of its level alone: then its scores are defined as ours are.
    """
    levels = tuned.ids.codes.shape[1]
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    starts = tuned.ids.level_starts
    calls = iter(range(levels))

    def own_level(_: Any, __: Any, logits: torch.Tensor) -> None:
        level = next(calls)
        logits[..., : tuned.first + starts[level]] = -torch.inf
        logits[..., tuned.first + starts[level + 1] :] = -torch.inf

    hook = tuned.model.get_output_embeddings().register_forward_hook(own_level)
    try:
        with torch.inference_mode():
            output = tuned.model.generate(  # type: ignore[operator]
                input_ids=ids, attention_mask=mask, max_new_tokens=levels, num_beams=beams, num_return_sequences=beams,
                do_sample=False, prefix_allowed_tokens_fn=allowed, return_dict_in_generate=True, output_scores=True,
                pad_token_id=0, length_penalty=0.0,
            )  # fmt: skip
    finally:
        hook.remove()
    codes = output.sequences[:, length:].numpy() - tuned.first - np.asarray(starts[:-1])
    return codes.reshape(len(prompts), beams, levels), output.sequences_scores.numpy().reshape(len(prompts), beams)


def against_generate(tuned: Tuned, batch: int, beams: int, repeats: int) -> dict[str, Any]:
    """The whole search, prompt included, divided by its steps."""
    asked = pl.DataFrame({"row": range(batch)})
    prompts = tuned.prompter.encode(asked)
    allowed = prefix_function(tuned, max(map(len, prompts)), tuned.ids.codes)
    ours, our_seconds = timed(lambda: rank(tuned, asked, beams, Ranking(beams=beams, batch_size=batch)), repeats)
    (codes, scores), their_seconds = timed(lambda: generate(tuned, prompts, beams, allowed), max(1, repeats - 1))
    index = {tuple(code): row for row, code in enumerate(tuned.ids.codes.tolist())}
    theirs = np.array([[index.get(tuple(code), -1) for code in row] for row in codes.tolist()])
    mine = ours["item_id"].str.slice(1).cast(pl.Int64).to_numpy().reshape(batch, beams)
    own = ours["score"].to_numpy().reshape(batch, beams)
    agree = mine == theirs
    return {
        "batch": batch, "beams": beams, "catalogue": CATALOGUE,
        "gemst_ms_per_step": 1000 * our_seconds / LEVELS, "generate_ms_per_step": 1000 * their_seconds / LEVELS,
        "speedup": their_seconds / our_seconds, "same_place": float(agree.mean()),
        "same_set": float(np.mean([len(set(a) & set(b)) / beams for a, b in zip(mine, theirs, strict=True)])),
        "largest_score_gap": float(np.abs(own - scores).max()),
        "generate_invalid": int((theirs < 0).sum()),
        "generate_duplicates": int(sum(beams - len(set(row)) for row in theirs.tolist())),
    }  # fmt: skip


def constraint_cost(batch: int, beams: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of the constraint alone (children gather, exclusion of seen items, top-k), summed over 4 levels."""
    found: dict[str, Any] = {}
    for n in (10_000, 1_000_000, 10_000_000):
        ids = catalogue(n, 4)
        walk = TrieWalk(ids.trie, torch.device("cpu"))
        rng = np.random.default_rng(1)
        dead = walk.dead(np.repeat(np.arange(batch), 20), rng.integers(0, n, 20 * batch))
        generator = torch.Generator().manual_seed(0)
        steps: list[list[float]] = [[] for _ in range(4)]
        for _ in range(repeats):
            scores, nodes = torch.zeros(batch, 1), torch.zeros(batch, 1, dtype=torch.long)
            for level in range(4):
                log_probs = torch.randn(batch, nodes.shape[1], CODES, generator=generator).log_softmax(-1)
                began = time.perf_counter()
                scores, _, edges = walk.step(scores, log_probs, nodes, level, beams, dead[level])
                steps[level].append(1000 * (time.perf_counter() - began))
                nodes = edges + 1
        levels = [statistics.median(step) for step in steps]
        found[f"{n}"] = {"ms_per_step": sum(levels) / 4, "ms_by_level": levels, "children": walk.trie.widths}
    costs = [value["ms_per_step"] for value in found.values()]
    return {"by_items": found, "largest_over_smallest": max(costs) / min(costs)}


def trie_build() -> dict[str, Any]:
    """Build the trie of 10 M IDs of length 4 in a child process: its high-water mark counts nothing else."""
    output = subprocess.run([sys.executable, __file__, "--child"], check=True, capture_output=True, text=True).stdout
    built: dict[str, Any] = json.loads(output.splitlines()[-1])
    return built


def trie_child() -> dict[str, Any]:
    ids = catalogue(10_000_000, 4)
    before = peak_mib()
    began = time.perf_counter()
    built = trie.build(ids.codes)
    seconds = time.perf_counter() - began
    size = sum(array.nbytes for array in (built.offsets, built.codes, built.items, built.leaves)) / 2**20
    return {
        "items": 10_000_000,
        "seconds": seconds,
        "peak_mib": peak_mib(),
        "peak_mib_before": before,
        "trie_mib": size,
    }


def rerank(tuned: Tuned, rows: int, repeats: int) -> dict[str, Any]:
    """100 candidates each: one batched pass, a beam search per query, and plain forwards as the truth.

    The beam search ranks all candidates with as many beams. With 20, the released code's number, it returns 20 of them.
    `tokens_per_query` is what each side sends through the layers: `generate` copies the prompt for every beam.
    """
    rng = np.random.default_rng(3)
    chosen = [rng.choice(len(tuned.ids.item_id), 100, replace=False) for _ in range(rows)]
    asked = pl.DataFrame({"row": range(rows)})
    prompts = tuned.prompter.encode(asked)
    candidates = pl.Series([[f"i{item}" for item in items] for items in chosen])
    ours, our_seconds = timed(lambda: score(tuned, asked, candidates, Ranking(batch_size=rows)), repeats)

    def one_by_one(beams: int) -> None:
        for prompt, items in zip(prompts, chosen, strict=True):
            generate(tuned, [prompt], beams, prefix_function(tuned, len(prompt), tuned.ids.codes[items]))

    _, released = timed(lambda: one_by_one(20), 1)
    _, complete = timed(lambda: one_by_one(100), 1)
    levels = tuned.ids.codes.shape[1]
    length = statistics.mean(map(len, prompts))
    codes = tuned.ids.codes
    prefixes = statistics.mean(
        sum(len(np.unique(codes[items, :depth], axis=0)) for depth in range(1, levels)) for items in chosen
    )
    return {
        "batch": rows, "candidates": 100, "levels": levels, "gemst_seconds": our_seconds,
        "tokens_per_query": {
            "gemst": length + prefixes,
            **{f"beam{beams}": beams * (length + levels - 1) for beams in (20, 100)},
        },
        "beam20_seconds": released, "beam100_seconds": complete,
        "speedup_over_beam20": released / our_seconds, "speedup_over_beam100": complete / our_seconds,
        "largest_gap_to_brute_force": gap(tuned, prompts[:2], chosen[:2], ours),
    }  # fmt: skip


@torch.inference_mode()
def gap(tuned: Tuned, prompts: list[list[int]], chosen: list[np.ndarray], ours: pl.DataFrame) -> float:
    """Largest relative difference to one plain forward pass of prompt and ID."""
    tokens, starts, worst = tuned.ids.token_ids(tuned.first), tuned.ids.level_starts, 0.0
    levels = range(tuned.ids.codes.shape[1])
    for row, (prompt, items) in enumerate(zip(prompts, chosen, strict=True)):
        mine = dict(ours.filter(pl.col("row") == row).select("item_id", "score").iter_rows())
        full = torch.tensor([prompt + tokens[item].tolist() for item in items])
        logits = tuned.model(full).logits[:, len(prompt) - 1 : -1]
        own = [logits[:, level, tuned.first + starts[level] : tuned.first + starts[level + 1]] for level in levels]
        for at, item in enumerate(items):
            truth = sum(float(own[level][at].log_softmax(-1)[tuned.ids.codes[item, level]]) for level in levels)
            worst = max(worst, abs(mine[f"i{item}"] - truth) / max(1.0, abs(truth)))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", help="folder or hub name of a decoder-only model; default: a random Llama")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--beams", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--part", choices=["generate", "rerank", "rerank-atomic", "constraint", "trie"], help="this part only"
    )
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(trie_child()))
        return
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "generate": lambda: against_generate(tuned, options.batch, options.beams, options.repeats),
        "rerank": lambda: rerank(tuned, 16, options.repeats),
        "rerank-atomic": lambda: rerank(make(options.backbone, 16, catalogue(ATOMIC, 1)), 16, options.repeats),
        "constraint": lambda: constraint_cost(options.batch, options.beams, 20),
        "trie": trie_build,
    }
    if options.part in (None, "generate", "rerank"):
        tuned = make(options.backbone, max(options.batch, 16), catalogue(CATALOGUE, LEVELS))
    chosen = [options.part] if options.part else list(parts)
    result: dict[str, Any] = {
        "benchmark": "decoding",
        "backbone": options.backbone or "random Llama",
        "threads": torch.get_num_threads(),
    }
    for name in chosen:
        result[name] = parts[name]()
        print(f"{name}: {json.dumps(result[name])}", file=sys.stderr, flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""What one step buys and what general knowledge pays for it, by where the step may go: the case for a null space.

At the start of tuning (the project's item rows, the untouched backbone) the gradient of some train batches gives one
Adam step, all signs, the way each method would take it: in every weight, or in the coefficients of the best `rank`
directions, without a null space and inside null spaces of several energies. The KL from the backbone (held-out general
text) is measured after a step so small that it grows with the step's square; the fall of the loss is the first-order
one, step times the gradient of OTHER batches, so what a long step overshoots is not in it. Fall over root KL compares
methods whatever their rates. Run the pipeline up to item-rows first; the last line is one JSON object.

    python benchmarks/gain_per_drift.py --out benchmarks/results/gain-per-drift.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor, nn

from gemst import backbone, item_ids, layout
from gemst.config import Config
from gemst.data import general_text
from gemst.evaluation.drift import predicting_states, sequences, token_stream
from gemst.files import require, write_json
from gemst.params import load
from gemst.progress import track
from gemst.prompts import make_prompter
from gemst.tuning import null_space
from gemst.tuning.bases import Projector, whole_space
from gemst.tuning.batches import Batch, make_batches
from gemst.tuning.item_rows import load as load_rows
from gemst.tuning.model import ItemModel
from gemst.tuning.norm import freeze_norms
from gemst.tuning.subspace import matching

ENERGIES = (0.05, 0.01, 0.001)
NORM = 0.5  # of a step, all layers together: KL stays below 1e-3

Weights = dict[str, nn.Parameter]
Step = dict[str, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=4, help="of 1,024 tokens, for the step and again to judge it")
    parser.add_argument("--tokens", type=int, default=3072, help="of general text for the KL")
    parser.add_argument("--calibration", type=int, default=16_000, help="tokens the null spaces are made from")
    parser.add_argument("--out", type=Path, help="write the result there as well")
    given = parser.parse_args()
    config = load(Path("params.yaml"), ["tuning.batch_tokens=1024"])
    torch.manual_seed(config.seed)
    model, tokenizer = backbone.load(config.backbone)
    modules = matching(model, config.tuning.modules)
    calibration, heldout = general_text.split(config.null_space.corpus)
    stream = null_space.batches(tokenizer, calibration, given.calibration, config.null_space.sequence_length)
    moments = null_space.second_moments(model, modules, track(stream, "second moments"))
    weights: Weights = {name: module.weight for name, module in modules.items()}  # type: ignore[misc]
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    kl = kl_from(model, tokenizer, heldout, given.tokens)
    items, batches = task(config, model, tokenizer)
    chosen = list(itertools.islice(batches, 2 * given.batches))
    own, other = (gradient(items, weights, part) for part in (chosen[: given.batches], chosen[given.batches :]))

    found: dict[str, Any] = {"benchmark": "gain_per_drift", "rank": config.tuning.rank, "steps": {}}
    for name, step in steps(own, moments, config):
        norm = sum(float(part.square().sum()) for part in step.values()) ** 0.5
        size = NORM / norm
        with torch.no_grad():
            for layer, weight in weights.items():
                weight.copy_(before[layer] - size * step[layer])
        moved = kl()
        fall = {side: size * sum(float((of[layer] * step[layer]).sum()) for layer in step)
                for side, of in (("own", own), ("other", other))}  # fmt: skip
        found["steps"][name] = {
            "kl": moved, "fall_own_batches": fall["own"], "fall_other_batches": fall["other"],
            "fall_per_root_kl": fall["other"] / moved**0.5, "fall_per_norm": fall["other"] / NORM,
        }  # fmt: skip
        print(name, json.dumps(found["steps"][name]), file=sys.stderr, flush=True)
    everywhere = found["steps"]["every weight"]["fall_per_root_kl"]
    for step_found in found["steps"].values():
        step_found["kl_at_equal_fall"] = (everywhere / step_found["fall_per_root_kl"]) ** 2
    if given.out:
        write_json(given.out, found)
    print(json.dumps(found))


def kl_from(model: Any, tokenizer: Any, texts: list[str], tokens: int) -> Callable[[], float]:
    """A function that gives the mean KL, in nats per token, of what the model has become from what it is now."""
    blocks = [torch.from_numpy(block) for block in sequences(model, token_stream(tokenizer, texts, tokens), 512)]
    vocabulary = len(tokenizer)

    @torch.inference_mode()
    def states() -> list[Tensor]:
        found = [predicting_states(model, block, tokenizer).flatten(0, 1) for block in blocks]
        return [part for whole in found for part in whole.split(256)]

    def log_probs(part: Tensor) -> Tensor:
        return backbone.item_logits(model, part, 0, vocabulary).float().log_softmax(1)

    start = states()  # not their logits: 600 MB

    @torch.inference_mode()
    def measure() -> float:
        total = 0.0
        for before, after in zip(start, states(), strict=True):
            left = log_probs(before)
            total += float((left.exp() * (left - log_probs(after))).sum())
        return total / sum(map(len, start))

    return measure


def task(config: Config, model: Any, tokenizer: Any) -> tuple[ItemModel, Iterator[Batch]]:
    """The model with the project's item rows, and its train batches."""
    ids = item_ids.load(require(layout.ITEM_IDS, made_by="gemst tokenize"))
    inputs, outputs, white = load_rows(
        require(layout.ITEM_ROWS, made_by="gemst item-rows"), ids, null_space.fingerprint(model)
    )
    first = backbone.add_item_tokens(model, tokenizer, ids.tokens, inputs, outputs)
    prompter = make_prompter(config, model, tokenizer, ids, first)
    train = pl.read_parquet(layout.EXAMPLES / "train.parquet")
    batches = make_batches(config, train, prompter, backbone.decoder_start(model))
    items = ItemModel(model, first, ids.level_sizes, False, white)
    freeze_norms(model)
    return items, batches(0)


def gradient(items: ItemModel, weights: Weights, batches: list[Batch]) -> Step:
    """Of the mean loss of `batches` in every weight."""
    for weight in weights.values():
        weight.requires_grad_(True)
    for batch in track(batches, "gradient"):
        (items(batch).mean() / len(batches)).backward()
    found = {}
    for name, weight in weights.items():
        assert weight.grad is not None
        found[name], weight.grad = weight.grad, None
        weight.requires_grad_(False)
    return found


def steps(slopes: Step, moments: null_space.Moments, config: Config) -> Iterator[tuple[str, Step]]:
    """Adam's first step against the gradients `slopes`, where each method may go."""
    yield "every weight", {name: slope.sign() for name, slope in slopes.items()}
    rank = config.tuning.rank
    yield "subspaces, no null space", {name: low_rank(slope, rank, whole_space) for name, slope in slopes.items()}
    for energy in ENERGIES:
        settings = config.null_space.model_copy(update={"rule": "energy", "energy": energy})
        spaces = {
            site: null_space.low_energy(total / moments.tokens, settings)[0]
            for site, total in track(moments.sums.items(), "eigendecompositions")
        }
        inside = {name: low_rank(slope, rank, spaces[moments.site_of[name]]) for name, slope in slopes.items()}
        yield f"subspaces, null space of {energy:.1%}", inside


def low_rank(slope: Tensor, rank: int, project: Projector) -> Tensor:
    """sign(G Q) Q^T with Q (n, at most rank) the best right directions of G P.

    A null space can have fewer than `rank` dimensions: directions the decomposition made up are dropped, not taken.
    """
    _, sizes, basis = torch.svd_lowrank(project(slope.t()).t(), q=rank + 8, niter=2)
    kept = basis[:, :rank][:, sizes[:rank] > 1e-4 * sizes[0]]
    basis = torch.linalg.qr(project(kept)).Q
    return (slope @ basis).sign() @ basis.t()


if __name__ == "__main__":
    main()

"""What leaves the null space of the real backbone after real steps, and how long the null-space stage takes.

The data are the demo's: missing stages before `null-space` are run first (`gemst fetch` must have been). The stage is
timed as `gemst null-space` runs it. Then each setting tunes the whole backbone from the start, on small batches of real
prompts, with weight decay and clipping, and the leak |dW K0| / (|dW| |K0|) is taken layer by layer. The last line is
one JSON object.

    python benchmarks/null_space.py --out benchmarks/results/null_space.json
    python benchmarks/null_space.py --only heuristic --steps 20 --no-stage
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor

from gemst import backbone, item_ids, layout, stages
from gemst.config import Config
from gemst.data import general_text, tables
from gemst.params import load
from gemst.progress import track
from gemst.prompts import make_prompter
from gemst.tuning import null_space
from gemst.tuning.batches import Batch, make_batches
from gemst.tuning.methods import Facts, make
from gemst.tuning.model import ItemModel
from gemst.tuning.norm import freeze_norms
from gemst.tuning.precision import autocast
from gemst.tuning.rows import start_rows
from gemst.tuning.subspace import joined, matching

# name: (tuning.fidelity, tuning.precision, tuning.gates.kind)
SETTINGS = {
    "heuristic": ("default", "fp32", "heuristic"),
    "learned": ("default", "fp32", "learned"),
    "bf16-autocast": ("default", "bf16-autocast", "heuristic"),
    "bf16-weights": ("default", "bf16-weights", "heuristic"),
    "paper": ("paper", "fp32", "heuristic"),
    "released": ("released", "fp32", "heuristic"),
}
COSTLY = ("bf16-autocast", "bf16-weights", "paper", "released")  # slow without bf16 units, or an SVD per subspace
OURS = {
    "weight_decay": 0.1, "clip": 1.0, "lr": 3e-3, "rank": 32, "refresh_every": 50, "chain_items": 4, "batch_tokens": 96,
}  # fmt: skip


# An SVD per subspace and layer is too slow for the whole network: these two tune three of its thirty blocks.
PART = r"layers\.(0|10|20)\..*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)$"


def configured(base: Config, fidelity: str, precision_: str, gate: str) -> Config:
    tree = base.model_dump()
    tree["tuning"] |= {**OURS, "method": "gems", "fidelity": fidelity, "precision": precision_}
    tree["tuning"]["gates"] |= {"kind": gate}
    if fidelity != "default":
        tree["tuning"]["modules"] = PART
    if fidelity == "released":
        tree["null_space"] |= {"side": "output", "tokens": 2048}
    return Config.model_validate(tree)


def both_tasks(batches: Any) -> Any:
    """Endless batches that hold targets of both tasks."""
    epoch = 0
    while True:
        yield from (batch for batch in batches(epoch) if min(batch.targets))
        epoch += 1


def stage_seconds(base: Config) -> dict[str, Any]:
    summary = stages.null_space(base)
    return {"seconds": summary.seconds, "tokens": summary.read["tokens"], "peak_mib": summary.peak_mib}


def tuned_leaks(base: Config, name: str, space: Path, steps: int, minutes: float) -> dict[str, Any]:
    """At most `steps` steps and `minutes` of the whole backbone; leaks on the input side of every layer."""
    config = configured(base, *SETTINGS[name])
    torch.manual_seed(config.seed)
    model, tokenizer = backbone.load(config.backbone)
    before = {name: module.weight.detach().clone() for name, module in matching(model, config.tuning.modules).items()}
    if config.tuning.fidelity == "released":  # its own projectors; leaks are judged on the input side all the same
        calibration, _ = general_text.split(config.null_space.corpus)
        folder = Path(tempfile.mkdtemp())
        null_space.build(
            model, tokenizer, matching(model, config.tuning.modules), calibration, config.null_space, folder / "p",
        )  # fmt: skip
    spaces = {
        name: found for name, found in null_space.load(space, model, base.null_space)[0].items() if name in before
    }
    ids = item_ids.load(layout.ITEM_IDS)
    items = tables.read_items(layout.VALIDATED / "items.parquet")
    rows = start_rows(model, tokenizer, ids, items)
    first = backbone.add_item_tokens(model, tokenizer, ids.tokens, rows, rows * config.item_rows.scale)
    model.set_attn_implementation("eager")
    prompter = make_prompter(config, model, tokenizer, ids, first)
    stream = both_tasks(make_batches(config, pl.read_parquet(layout.EXAMPLES / "train.parquet"), prompter, None))
    item_model = ItemModel(model, first, ids.level_sizes, False)
    freeze_norms(model)
    method = make(config, item_model, folder / "p" if config.tuning.fidelity == "released" else space)
    began, tokens, steps_done = time.perf_counter(), 0, 0
    for _ in track(range(steps), name):
        batch: Batch = next(stream)
        if method.needs_start:
            losses_of(item_model, method, batch, config)
            method.start()
        facts = losses_of(item_model, method, batch, config)
        method.merge()
        torch.nn.utils.clip_grad_norm_(method.parameters(), config.tuning.clip)
        method.step(facts)
        tokens += batch.tokens
        steps_done += 1
        if time.perf_counter() - began > 60 * minutes:
            break
    method.optimizer.state.clear()
    after = method.weights()
    found = leaks(spaces, before, {n: joined(after[n], after.get(f"{n}.remainder")) for n in before})
    result = {
        "steps": steps_done, "tokens_per_step": round(tokens / steps_done, 1), "layers": len(found),
        "largest_leak": max(found.values()), "median_leak": sorted(found.values())[len(found) // 2],
        "smallest_leak": min(found.values()), "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip
    if config.tuning.precision == "bf16-weights":
        rounded = leaks(spaces, before, {n: after[n].float() for n in before})
        result["largest_leak_of_the_bf16_half_alone"] = max(rounded.values())
    return result


def losses_of(items: ItemModel, method: Any, batch: Batch, config: Config) -> Facts:
    """One forward and backward pass; the tasks' mean losses."""
    method.prepare(batch.targets, observe=False)
    method.enter(batch)
    with autocast(config.tuning.precision, torch.device("cpu")):
        each = items(batch)
    method.backward(each / len(each), batch)
    rec, src = each.detach()[: batch.targets[0]], each.detach()[batch.targets[0] :]
    return Facts(batch.targets, (float(rec.mean()), float(src.mean())))


def leaks(spaces: dict[str, null_space.Range], before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, float]:
    """|dW K0| / (|dW| |K0|) by layer, K0 the directions general text uses, in float64."""
    found = {}
    for name, space in spaces.items():
        change = (after[name] - before[name]).double()
        outside = change - space(change.t().contiguous()).t()
        found[name] = float(outside.norm() / (change.norm() * (change.shape[1] - space.dimensions) ** 0.5))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--costly-steps", type=int, default=20, help=f"steps of {', '.join(COSTLY)}")
    parser.add_argument("--minutes", type=float, default=60.0, help="end a setting's steps after this time")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--no-stage", action="store_true", help="take artifacts/null_space as it is")
    parser.add_argument("--out", type=Path, help="a JSON file that keeps what other calls put there")
    arguments = parser.parse_args()
    base = load(Path("params.yaml"))
    for name, folder in {
        "ingest": layout.TABLES, "validate": layout.VALIDATED, "split": layout.EXAMPLES, "tokenize": layout.ITEM_IDS,
    }.items():  # fmt: skip
        if not folder.exists():
            getattr(stages, name)(base)
    kept = arguments.out is not None and arguments.out.exists()
    results: dict[str, Any] = json.loads(arguments.out.read_text()) if kept else {}
    results["threads"] = torch.get_num_threads()
    if not arguments.no_stage or not layout.NULL_SPACE.exists():
        results["stage"] = stage_seconds(base)
    for name in arguments.only:
        steps = arguments.costly_steps if name in COSTLY else arguments.steps
        results[name] = tuned_leaks(base, name, layout.NULL_SPACE, steps, arguments.minutes)
        print(name, json.dumps(results[name]), flush=True)
        if arguments.out:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results))


if __name__ == "__main__":
    main()

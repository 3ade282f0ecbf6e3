"""Seconds per training step: GEMS in one backward pass, AdamW on everything, three passes as the released code.

All sides run in this process on the same batch; the last line is one JSON object. Peak memory comes from one child
process per side, because a process's high-water mark never falls.

    python benchmarks/tuning_step.py                 # SmolLM2-135M (needs `gemst fetch`) and a T5 of d = 512
    python benchmarks/tuning_step.py --steps 10
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from gemst.backbone import hidden
from gemst.config import Backbone, Gates, Tuning
from gemst.progress import peak_mib as own_peak_mib
from gemst.tuning.gates import Gate
from gemst.tuning.norm import freeze_norms
from gemst.tuning.optimizer import Gems
from gemst.tuning.subspace import attach, matching

ROWS, LENGTH, RANK = 16, 64, 32


def smollm2() -> nn.Module:
    from gemst.backbone import load

    return load(Backbone())[0]


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=4000,
            d_model=512,
            d_kv=64,
            d_ff=2048,
            num_layers=4,
            num_heads=8,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "smollm2-135m fp32": (smollm2, False),
    "smollm2-135m bf16": (smollm2, True),
    "t5-512 fp32": (t5, False),
}


def row_losses(model: nn.Module, ids: Tensor, bf16: bool) -> Tensor:
    """Mean log-probability loss of each row, from the last four positions."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        extra = {"decoder_input_ids": ids[:, :16]} if model.config.is_encoder_decoder else {"use_cache": False}
        states = hidden(model, input_ids=ids, attention_mask=torch.ones_like(ids), **extra)[:, -4:]
        logits = states @ model.get_output_embeddings().weight[:2000].to(states.dtype).t()
    return (
        nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, -4:].flatten() % 2000, reduction="none")
        .view(-1, 4)
        .mean(1)
    )


def gems(model: nn.Module, ids: Tensor, bf16: bool) -> Callable[[], None]:
    freeze_norms(model)
    attached = attach(model, Tuning().modules, RANK)
    optimizer = Gems(attached, [], Gate(Gates()), lr=1e-4, refresh_every=200)
    embedding = model.get_input_embeddings().weight.requires_grad_(True)  # the backward pass goes all the way down

    def step() -> None:
        optimizer.begin(ROWS // 2, (ROWS // 2, ROWS // 2), (1.0, 1.0))
        row_losses(model, ids, bf16).mean().backward()
        embedding.grad = None
        optimizer.step()
        optimizer.zero_grad()

    step.optimizer = optimizer
    return step


def refresh_share(step: Callable[[], None], seconds: float, every: int = 200) -> float:
    """Share of a run that refreshing costs: the extra time of a step that refreshes all layers, over `every` steps."""
    optimizer = step.optimizer
    optimizer.refresh_every = 1
    taken = []
    for _ in range(3):
        started = time.perf_counter()
        step()
        taken.append(time.perf_counter() - started)
    return (statistics.median(taken) - seconds) / (every * seconds)


def full(model: nn.Module, ids: Tensor, bf16: bool) -> Callable[[], None]:
    freeze_norms(model)
    model.requires_grad_(False)
    weights = [module.weight.requires_grad_(True) for module in matching(model, Tuning().modules).values()]
    embedding = model.get_input_embeddings().weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(weights, lr=1e-5, fused=True)

    def step() -> None:
        row_losses(model, ids, bf16).mean().backward()
        embedding.grad = None
        optimizer.step()
        optimizer.zero_grad()

    return step


def three_passes(model: nn.Module, ids: Tensor, bf16: bool) -> Callable[[], None]:
    """Joint, rec and src losses forwarded and differentiated one by one, full gradients projected, Adam on each."""
    freeze_norms(model)
    model.requires_grad_(False)
    weights = [module.weight.requires_grad_(True) for module in matching(model, Tuning().modules).values()]
    embedding = model.get_input_embeddings().weight.requires_grad_(True)
    bases = [[torch.linalg.qr(torch.randn(w.shape[1], r)).Q for r in (RANK, RANK // 2, RANK // 2)] for w in weights]
    low = [
        [nn.Parameter(torch.zeros(w.shape[0], q.shape[1])) for q in own] for w, own in zip(weights, bases, strict=True)
    ]
    optimizer = torch.optim.Adam([p for own in low for p in own], lr=1e-4)
    halves = (slice(None), slice(0, ROWS // 2), slice(ROWS // 2, None))

    def step() -> None:
        for task, rows in enumerate(halves):
            row_losses(model, ids, bf16)[rows].mean().backward()
            for weight, own, parts in zip(weights, bases, low, strict=True):
                parts[task].grad = weight.grad @ own[task]
                weight.grad = None
        embedding.grad = None
        optimizer.step()
        with torch.no_grad():
            for weight, own, parts in zip(weights, bases, low, strict=True):
                for q, part in zip(own, parts, strict=True):
                    weight.add_(part @ q.t())
                    part.zero_()

    return step


SIDES = {"gems": gems, "full": full, "three_passes": three_passes}


def prepare(model_name: str, side: str) -> Callable[[], None]:
    make, bf16 = MODELS[model_name]
    ids = torch.randint(5, 3900, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    return SIDES[side](make(), ids, bf16)


def peak_mib(model_name: str, side: str) -> float:
    """High-water mark of a child that takes three steps."""
    command = [sys.executable, __file__, "--peak", model_name, side]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="timed steps per side, interleaved (default 5)")
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    parser.add_argument("--peak", nargs=2, metavar=("MODEL", "SIDE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        step = prepare(*arguments.peak)
        for _ in range(3):
            step()
        print(own_peak_mib())
        return
    results = {}
    for name in arguments.only:
        if name.startswith("smollm2") and not Path(Backbone().name).exists():
            print(f"{name}: skipped, run `gemst fetch` first")
            continue
        if MODELS[name][1] and not torch.cpu.get_capabilities().get("avx512_bf16", False):
            print(f"{name}: skipped, this processor does not multiply bf16 natively")
            continue
        steps = {side: prepare(name, side) for side in SIDES}
        times: dict[str, list[float]] = {side: [] for side in SIDES}
        for step in steps.values():
            step()
            step()  # the first one takes bases, or makes the optimizer's state
        for _ in range(arguments.steps):
            for side, step in steps.items():
                started = time.perf_counter()
                step()
                times[side].append(time.perf_counter() - started)
        seconds = {side: statistics.median(taken) for side, taken in times.items()}
        refresh = refresh_share(steps["gems"], seconds["gems"])
        del steps, step
        results[name] = {
            "seconds": {side: round(value, 3) for side, value in seconds.items()},
            "gems/full": round(seconds["gems"] / seconds["full"], 3),
            "three_passes/gems": round(seconds["three_passes"] / seconds["gems"], 2),
            "refresh_share_at_200": round(refresh, 4),
            "peak_mib": {side: round(peak_mib(name, side)) for side in ("gems", "full")},
        }
        print(name, json.dumps(results[name]), flush=True)
    facts = {"rows": ROWS, "length": LENGTH, "rank": RANK, "threads": torch.get_num_threads(), "results": results}
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()

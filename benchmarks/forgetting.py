"""What tuning forgets on the way to a validation quality: GEMS beside full fine-tuning and LoRA.

Each side is a real `gemst tune` of the present project's artifacts (run the pipeline up to null-space first) in a
folder of its own, with the same data, tokens and schedule; GEMS keeps `tuning.drift_limit`, the others are only
measured. At every validation the harmonic mean of both NDCG@10 and the KL from the backbone on general text are taken;
a side that has a result is not run again. The last line is one JSON object: for each side its curve, and its KL at the
quality at which GEMS ended (interpolated; null where it was not reached).

    python benchmarks/forgetting.py --tokens 400000 --every 50
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl

from gemst import layout
from gemst.files import read_json, require, write_json

RESULTS = Path(__file__).parent / "results" / "forgetting.json"
HOME = layout.ARTIFACTS / "benchmarks" / "forgetting"
UNLIMITED = "1e9"  # measures drift and never acts on it
# Rates as docs/study.md chose them on validation.
SIDES = {
    "gems": ["tuning.method=gems", "tuning.lr=0.003"],
    "full": ["tuning.method=full", "tuning.lr=3e-5", f"tuning.drift_limit={UNLIMITED}"],
    "lora": ["tuning.method=lora", "tuning.lr=3e-4", f"tuning.drift_limit={UNLIMITED}"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=40_000, help="tokens each side is tuned on")
    parser.add_argument("--every", type=int, default=12, help="steps between measurements")
    parser.add_argument("--users", type=int, default=200, help="users of a validation")
    options = parser.parse_args()
    shared = [
        f"tuning.max_tokens={options.tokens}", "tuning.epochs=1000", "tuning.max_minutes=null", "tuning.patience=1000",
        f"tuning.validate_every={options.every}", f"tuning.validate_users={options.users}",
    ]  # fmt: skip
    made_of = {"settings": shared, "curves": "from step 0"}
    found: dict[str, Any] = read_json(RESULTS) if RESULTS.exists() else {}
    if {name: found.get(name) for name in made_of} != made_of:
        found = {"benchmark": "forgetting", **made_of, "sides": {}}
    for name, own in SIDES.items():
        if found["sides"].get(name, {}).get("set") != own:
            found["sides"][name] = {"set": own, "curve": tune(HOME / name, [*shared, *own])}
            write_json(RESULTS, found)
        print(name, json.dumps(found["sides"][name]["curve"]), file=sys.stderr, flush=True)
    quality = found["sides"]["gems"]["curve"][-1]["ndcg10"]
    for side in found["sides"].values():
        side["kl_at_quality_of_gems"] = kl_at(quality, side["curve"])
    write_json(RESULTS, found)
    print(json.dumps(found))


def tune(folder: Path, settings: list[str]) -> list[dict[str, float]]:
    """Tune in a project folder that shares this one's inputs; returns step, ndcg10 and kl of every measurement."""
    (folder / "artifacts").mkdir(parents=True, exist_ok=True)
    inputs = (
        layout.VALIDATED, layout.EXAMPLES, layout.ITEM_IDS, layout.ITEM_ROWS, layout.NULL_SPACE, Path("data"),
        Path("params.yaml"),
    )  # fmt: skip
    for path in inputs:
        link = folder / path
        if not link.exists():
            link.symlink_to(require(path, made_by="dvc repro null-space").resolve())
    command = [sys.executable, "-m", "gemst.cli", "tune", *(word for one in settings for word in ("--set", one))]
    subprocess.run(command, cwd=folder, check=True, stdout=sys.stderr)
    return curve(pl.read_parquet(folder / layout.TUNING / "curves.parquet"))


def curve(curves: pl.DataFrame) -> list[dict[str, float]]:
    """Step, ndcg10 and kl of every validation, from a run's curves (step, name, value).

    The first is step 0, where the item rows have a score already and the backbone is itself: its KL is 0.
    """
    wide = curves.filter(pl.col("name").is_in(["valid/joint", "drift/kl"])).pivot("name", index="step")
    kl = pl.when(pl.col("step") == 0).then(0.0).otherwise("drift/kl")
    rows = wide.select("step", ndcg10="valid/joint", kl=kl).drop_nulls().sort("step")
    return [{name: round(value, 6) for name, value in row.items()} for row in rows.to_dicts()]


def kl_at(quality: float, points: list[dict[str, float]]) -> float | None:
    """KL where a curve first reaches `quality`, between two measurements by a straight line; None where it never does.

    A curve that begins there (step 0) has the KL of its first point.
    """
    for at, point in enumerate(points):
        if point["ndcg10"] >= quality:
            before = points[max(at - 1, 0)]
            rise = point["ndcg10"] - before["ndcg10"]
            share = (quality - before["ndcg10"]) / rise if rise > 0 else 1.0
            return round(before["kl"] + share * (point["kl"] - before["kl"]), 6)
    return None


if __name__ == "__main__":
    main()

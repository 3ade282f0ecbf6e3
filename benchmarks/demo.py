"""The demo, and what it measured: the figures of the README.

    python benchmarks/demo.py --out benchmarks/results/demo.json

Runs `python -m flows.pipeline` (what `make demo` runs; stages that are done answer "Unchanged") and reads what it left
under artifacts/: scores of the model and the reference rankers, the model's leads with their 95 % intervals, what
became of general knowledge, and each stage's seconds and peak memory when it last ran. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from gemst import layout
from gemst.files import read_json, write_json
from gemst.provenance import code_tags, machine

SHOWN = ("ndcg@10", "hit@10")


def shown(tasks: dict[str, Any]) -> dict[str, Any]:
    """The headline scores of one ranker by task, and its joint one."""
    return {task: {at: by[at] for at in SHOWN} if isinstance(by, dict) else by for task, by in tasks.items()}


def figures() -> dict[str, Any]:
    """What the finished pipeline in the current folder measured."""
    metrics = read_json(layout.EVALUATION / "metrics.json")
    stages = [read_json(path) for path in sorted((layout.ARTIFACTS / "summaries").glob("*.json"))]
    return {
        "model": shown(metrics["model"]),
        "references": {name: shown(tasks) for name, tasks in metrics["references"].items()},
        "leads": metrics["paired"],
        "drift": metrics["drift"],
        "counts": metrics["counts"],
        "tuning": read_json(layout.TUNING / "run.json"),
        "seconds": {stage["stage"]: stage["seconds"] for stage in stages},
        "peak_mib": {stage["stage"]: stage["peak_mib"] for stage in stages},
        "machine": machine(),
        "commit": code_tags(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    given = parser.parse_args()
    status = subprocess.run([sys.executable, "-m", "flows.pipeline"]).returncode
    if status != 0:
        return status
    found = figures()
    if given.out:
        write_json(given.out, found)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())

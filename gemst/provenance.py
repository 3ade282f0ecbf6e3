"""Where a model comes from: the git commit, DVC's hashes, one hash over the artefacts themselves, and the machine."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemst import layout
from gemst.files import read_json, sha256

if TYPE_CHECKING:
    from gemst.config import Config

# Written about models, not read by what makes them: a study's own results would call its next cell changed.
_ASIDE = tuple(f":(top,exclude){path}" for path in ("docs", "configs", "benchmarks/results"))


def dvc_hashes() -> dict[str, str]:
    """{"dvc/tune/artifacts/model": "<md5>.dir", ...} of every output in dvc.lock and of data.dvc."""
    import yaml

    hashes: dict[str, str] = {}
    for path in (Path("dvc.lock"), Path("data.dvc")):
        if path.exists():
            tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
            stages = tree.get("stages", {}) | ({"data": tree} if "outs" in tree else {})
            for stage, facts in stages.items():
                hashes |= {f"dvc/{stage}/{out['path']}": out["md5"] for out in facts.get("outs", []) if "md5" in out}
    return hashes


def code_tags() -> dict[str, str]:
    """The git commit, and whether what makes a model differed from it; nothing where there is no git."""
    try:
        commit, status = (
            subprocess.run(["git", *words], capture_output=True, text=True, check=True, timeout=20).stdout.strip()
            for words in (
                ("rev-parse", "HEAD"),
                ("status", "--porcelain", "--untracked-files=no", "--", ":(top)", *_ASIDE),
            )
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"mlflow.source.git.commit": commit, "git.dirty": str(bool(status)).lower()}


def machine() -> dict[str, Any]:
    """What seconds and roundings depend on: `tuning.precision: auto` follows bf16."""
    import torch

    from gemst.backbone import best_device
    from gemst.tuning.precision import native_bf16

    place = best_device()
    return {
        "cores": os.cpu_count(), "processor": platform.machine(), "torch": torch.__version__,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else "cpu",
        "bf16": native_bf16(place),
    }  # fmt: skip


def of_model(folder: Path = layout.MODEL) -> str:
    """One hash over a model's files."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()} {sha256(path)}\n".encode())
    return digest.hexdigest()


def of_examples(config: Config) -> str:
    """One hash over what a score is of: the test examples, the catalogue, whether items of the past count."""
    files = [sha256(path) for path in (layout.EXAMPLES / "test.parquet", layout.VALIDATED / "items.parquet")]
    return hashlib.sha256(json.dumps([*files, config.evaluation.exclude_seen]).encode()).hexdigest()


def fingerprint() -> str:
    """One hash over the model and its results, the seconds they took apart: equal artefacts are the same version."""
    results = {
        name: value for name, value in read_json(layout.EVALUATION / "metrics.json").items() if name != "seconds"
    }
    return hashlib.sha256(json.dumps([of_model(), results], sort_keys=True).encode()).hexdigest()

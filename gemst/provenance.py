"""Where a model comes from: the git commit, DVC's hashes, and one hash over the artefacts themselves."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

from gemst import layout
from gemst.files import sha256

# Written about models, not read by what makes them: a study's own results would call its next cell changed.
_ASIDE = (":(exclude)docs", ":(exclude)configs", ":(exclude)benchmarks/results")


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
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no", "--", ".", *_ASIDE))
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"mlflow.source.git.commit": commit, "git.dirty": str(bool(status)).lower()}


def fingerprint() -> str:
    """One hash over the model's files and its results: equal artefacts are the same version."""
    digest = hashlib.sha256()
    files = sorted(path for path in layout.MODEL.rglob("*") if path.is_file())
    for path in [*files, layout.EVALUATION / "metrics.json"]:
        digest.update(f"{path.relative_to(layout.ARTIFACTS).as_posix()} {sha256(path)}\n".encode())
    return digest.hexdigest()

"""How good IDs are, before anything is trained on them: a report and a picture of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemst.item_ids.ids import ItemIds


def report(ids: ItemIds, before: NDArray[np.int32]) -> dict[str, Any]:
    """Quality of the active IDs; `before` (items, levels) are the codes before collisions were resolved.

    unique_ratio_before/after: distinct IDs over items; moved: items relocated, kept_first_level: share of the items
    still in their first-level bucket; singleton_rate: share of the occupied buckets (all levels but the last, before
    resolution) with one item; largest_bucket: items in the fullest of them; per level: coverage (share of the codes in
    use), dead codes, entropy in bits, perplexity, and the Gini coefficient of the codes' use.
    """
    codes, before = ids.codes[ids.active], before[ids.active]
    n, depth = codes.shape
    buckets = _sizes(before[:, : max(depth - 1, 1)])
    return {
        "strategy": ids.strategy,
        "items": n,
        "retired": int((~ids.active).sum()),
        "unique_ratio_before": len(_sizes(before)) / n,
        "unique_ratio_after": len(_sizes(codes)) / n,
        "collisions_before": n - len(_sizes(before)),
        "moved": int((codes != before).any(axis=1).sum()),
        "kept_first_level": float((codes[:, 0] == before[:, 0]).mean()),
        "singleton_rate": float((buckets == 1).mean()),
        "largest_bucket": int(buckets.max()),
        "levels": [_level(codes[:, level], size) for level, size in enumerate(ids.level_sizes)],
    }


def _sizes(codes: NDArray[np.int32]) -> NDArray[np.int64]:
    """Items in each distinct row of `codes`."""
    return np.asarray(np.unique(codes, axis=0, return_counts=True)[1])


def _level(codes: NDArray[np.int32], size: int) -> dict[str, float | int]:
    counts = np.bincount(codes, minlength=size).astype(np.float64)
    share = counts[counts > 0] / counts.sum()
    entropy = float(-(share * np.log2(share)).sum())
    ordered = np.sort(counts)
    gini = float((2 * np.arange(1, size + 1) - size - 1) @ ordered / (size * counts.sum()))
    return {
        "size": size,
        "coverage": len(share) / size,
        "dead": size - len(share),
        "entropy_bits": entropy,
        "perplexity": 2**entropy,
        "gini": gini,
        "largest": int(counts.max()),
    }


def plot(ids: ItemIds, quality: dict[str, Any], path: Path) -> None:
    """Write a PNG: how often each code is used, sorted, one panel a level."""
    from matplotlib.figure import Figure

    depth = len(ids.level_sizes)
    figure = Figure(figsize=(4 * depth, 3), layout="constrained")
    for level, size in enumerate(ids.level_sizes):
        axes = figure.add_subplot(1, depth, level + 1)
        counts = np.sort(np.bincount(ids.codes[ids.active, level], minlength=size))[::-1]
        axes.fill_between(np.arange(size), counts, step="mid", color="#4477aa")
        axes.axhline(counts.mean(), color="black", linewidth=0.8, linestyle=":")
        facts = quality["levels"][level]
        axes.set_title(f"level {level}: coverage {facts['coverage']:.0%}, Gini {facts['gini']:.2f}", fontsize=9)
        axes.set_xlabel("codes, most used first")
        axes.set_ylim(bottom=0)
    figure.axes[0].set_ylabel("items")
    after = f"{quality['unique_ratio_before']:.2%} unique before, {quality['unique_ratio_after']:.2%} after resolution"
    figure.suptitle(f"{ids.strategy}, {quality['items']:,} items: {after}", fontsize=10)
    figure.savefig(path, dpi=110, metadata={"Software": None})

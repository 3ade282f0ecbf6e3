"""Quality of item IDs on real catalogues, before any training: uniqueness, coverage, and what an append moves.

Every strategy at the shipped sizes, on MovieLens-100k (`gemst fetch`) and, where its folder is given, on Last.fm
(hetrec2011-lastfm-2k). Sentence vectors are made once per catalogue. The last line is one JSON object.

    python benchmarks/item_ids.py
    python benchmarks/item_ids.py --lastfm FOLDER
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import polars as pl

from gemst import item_ids
from gemst.config import Config, Data
from gemst.data import examples, sources
from gemst.item_ids.embeddings import documents, embed_texts

STRATEGIES = ("atomic", "rq-kmeans", "rq-vae", "joint", "joint shared-specific")


def configured(strategy: str, **more: Any) -> Config:
    name, *variant = strategy.split()
    return Config.model_validate(
        {"item_ids": {"strategy": name, "embedding": "column", **({"joint": variant[0]} if variant else {}), **more}}
    )


def measure(items: pl.DataFrame, train: pl.DataFrame, strategy: str, folder: Path) -> dict[str, Any]:
    """A build of everything, and a build of nine tenths that the last tenth is appended to."""
    began = time.perf_counter()
    quality = item_ids.build(items, train, configured(strategy), folder / "all")
    seconds = time.perf_counter() - began
    kept = items.sample(fraction=0.9, seed=0)
    item_ids.build(kept, train, configured(strategy), folder / "kept")
    appended = item_ids.build(items, train, configured(strategy, extends=folder / "kept"), folder / "grown")
    before, after = item_ids.load(folder / "kept"), item_ids.load(folder / "grown")
    moved = (before.codes != after.codes[: len(before.codes)]).any(axis=1).sum()
    return {
        "unique_before": round(quality["unique_ratio_before"], 5),
        "unique_after": quality["unique_ratio_after"],
        "kept_first_level": quality["kept_first_level"],
        "coverage": [level["coverage"] for level in quality["levels"]],
        "dead_codes": sum(level["dead"] for level in quality["levels"]),
        "gini": [round(level["gini"], 3) for level in quality["levels"]],
        "largest_bucket": quality["largest_bucket"],
        "append_moved": int(moved),
        "append_unique_after": appended["unique_ratio_after"],
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--movielens", type=Path, default=Data().path)
    parser.add_argument("--lastfm", type=Path, help="folder of hetrec2011-lastfm-2k")
    parser.add_argument("--encoder", default=Config().item_ids.encoder)
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES, choices=STRATEGIES)
    options = parser.parse_args()
    catalogues = {"movielens": Data(path=options.movielens)}
    if options.lastfm:
        catalogues["lastfm"] = Data(source="hetrec", path=options.lastfm)
    result: dict[str, Any] = {"benchmark": "item_ids"}
    for name, data in catalogues.items():
        loaded = sources.load(data)
        train = examples.build(loaded.items, loaded.events, data, Config().seed).train
        began = time.perf_counter()
        vectors = embed_texts(documents(loaded.items), options.encoder)
        result[name] = {"items": len(loaded.items), "embedding_seconds": round(time.perf_counter() - began, 1)}
        items = loaded.items.with_columns(embedding=pl.Series(vectors).cast(pl.List(pl.Float32)))
        for strategy in options.strategies:
            with tempfile.TemporaryDirectory() as folder:
                result[name][strategy] = measure(items, train, strategy, Path(folder))
            print(f"{name} {strategy}: {json.dumps(result[name][strategy])}", file=sys.stderr, flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()

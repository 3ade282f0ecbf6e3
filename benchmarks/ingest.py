"""Raw Parquet to examples: seconds and peak memory at several sizes, beside a row loop in pandas over the same rules.

    python benchmarks/ingest.py --events 10000000

The log is made up: users of very different activity, items of very different popularity, half of the events searches,
rows in random order. Each size is measured in a process of its own, so that its peak memory is its own. The last line
is JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

ROW_LOOP_EVENTS = 100_000
SEED = 7
HISTORY = 20
CORE = 3


def make_log(folder: Path, events: int) -> None:
    """Write items.parquet and events.parquet for the `table` source."""
    rng = np.random.default_rng(SEED)
    users, items = max(events // 40, 10), max(events // 100, 10)
    folder.mkdir(parents=True)
    names = np.array(["red", "blue", "old", "new", "small", "large", "fast", "quiet", "warm", "light"])
    titles = [" ".join(row) + f" {n}" for n, row in enumerate(names[rng.integers(0, len(names), (items, 3))])]
    pl.DataFrame({"item_id": [f"i{n}" for n in range(items)], "title": titles}).write_parquet(folder / "items.parquet")
    user = (users * rng.random(events) ** 2).astype(np.int64)
    item = (items * rng.random(events) ** 3).astype(np.int64)
    searched = rng.random(events) < 0.5
    query = pl.DataFrame({"item_id": pl.Series(item), "searched": searched}).select(
        query=pl.when("searched").then(pl.Series(names).gather(pl.Series(item % len(names))))
    )
    table = pl.DataFrame(
        {
            "user_id": pl.Series(user),
            "item_id": pl.Series(item),
            "timestamp": pl.Series(rng.integers(1_600_000_000, 1_700_000_000, events)),
            "query": query["query"],
        }
    )
    table.with_columns(
        pl.format("u{}", "user_id").alias("user_id"), pl.format("i{}", "item_id").alias("item_id")
    ).write_parquet(folder / "events.parquet")


def pipeline(raw: Path, out: Path) -> dict[str, Any]:
    """Ingest and split as the stages do; returns seconds by step, peak memory and counts."""
    from gemst.config import Data
    from gemst.data import examples, sources, tables

    config = Data(source="table", path=raw, core=CORE, max_history=HISTORY)
    started, processor = time.perf_counter(), time.process_time()
    loaded = sources.load(config)
    tables.write_items(loaded.items, out / "items.parquet")
    tables.write_events(loaded.events, out / "events.parquet")
    del loaded
    ingested = time.perf_counter()
    counts = examples.write(
        tables.read_items(out / "items.parquet"),
        tables.read_events(out / "events.parquet"),
        config,
        SEED,
        out / "examples",
    )
    ended = time.perf_counter()
    return {
        "events": counts["events"],
        "ingest_seconds": round(ingested - started, 2),
        "split_seconds": round(ended - ingested, 2),
        "seconds": round(ended - started, 2),
        "processor_seconds": round(time.process_time() - processor, 2),
        "microseconds_per_event": round((ended - started) / counts["events"] * 1e6, 2),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "train": counts["train"],
        "valid": counts["valid"],
        "test": counts["test"],
    }


def row_loop(raw: Path) -> dict[str, list[dict[str, Any]]]:
    """The same rules, one row at a time in pandas: k-core, leave-last-out per user and task, strict histories."""
    import pandas as pd

    from gemst.data.tables import in_order

    # The tie order is not the point here: both versions start from rows in canonical order.
    items = set(pd.read_parquet(raw / "items.parquet")["item_id"])
    ordered = in_order(_canonical(raw))
    frame = ordered.select("user_id", "item_id", "timestamp", "task", "query").to_pandas()
    events = [row for _, row in frame.iterrows() if row["item_id"] in items]
    while True:
        by_user: dict[str, int] = {}
        by_item: dict[str, int] = {}
        for row in events:
            by_user[row["user_id"]] = by_user.get(row["user_id"], 0) + 1
            by_item[row["item_id"]] = by_item.get(row["item_id"], 0) + 1
        kept = [row for row in events if by_user[row["user_id"]] >= CORE and by_item[row["item_id"]] >= CORE]
        if len(kept) == len(events):
            break
        events = kept
    users: dict[str, list[Any]] = {}
    for row in events:
        users.setdefault(row["user_id"], []).append(row)
    out: dict[str, list[dict[str, Any]]] = {"train": [], "valid": [], "test": []}
    for rows in users.values():
        part = ["train"] * len(rows)
        for name in ("test", "valid"):
            for task in ("recommendation", "search"):
                free = [i for i, row in enumerate(rows) if row["task"] == task and part[i] == "train"]
                if len(free) < 2:
                    continue
                context = ("train", "valid", "test") if name == "test" else ("train", "valid")
                if any(
                    part[i] in context and row["timestamp"] < rows[free[-1]]["timestamp"] for i, row in enumerate(rows)
                ):
                    part[free[-1]] = name
        for i, row in enumerate(rows):
            context = {"train": ("train",), "valid": ("train", "valid"), "test": ("train", "valid", "test")}[part[i]]
            history = []
            for j in range(i):
                if part[j] in context and rows[j]["timestamp"] < row["timestamp"]:
                    history.append(rows[j]["item_id"])
            out[part[i]].append(
                {
                    "user_id": row["user_id"],
                    "task": row["task"],
                    "query": row["query"] if row["task"] == "search" else None,
                    "history": history[-HISTORY:],
                    "targets": [row["item_id"]],
                    "negatives": [],
                    "timestamp": row["timestamp"].to_pydatetime(),
                }
            )
    return out


def _canonical(raw: Path) -> pl.DataFrame:
    from gemst.config import Data
    from gemst.data import sources

    return sources.load(Data(source="table", path=raw)).events


def compare(raw: Path, out: Path) -> dict[str, Any]:
    """Time the row loop and the pipeline on the same log and check that their examples are equal."""
    from gemst.data.tables import EXAMPLES

    _canonical(raw)  # imports and caches are nobody's advantage
    pipeline(raw, out / "warm-up")
    fast = min((pipeline(raw, out / str(n)) for n in range(3)), key=lambda result: result["seconds"])
    canonical_started = time.perf_counter()
    _canonical(raw)
    shared = time.perf_counter() - canonical_started
    started = time.perf_counter()
    slow = row_loop(raw)
    seconds = time.perf_counter() - started - shared
    for name, rows in slow.items():
        mine = pl.read_parquet(out / "0" / "examples" / f"{name}.parquet")
        if not mine.select(EXAMPLES.names()).equals(pl.DataFrame(rows, schema=EXAMPLES)):
            raise SystemExit(f"the row loop and the pipeline disagree on {name}")
    return {
        "events": fast["events"],
        "row_loop_seconds": round(seconds, 2),
        "pipeline_seconds": fast["seconds"],
        "times_faster": round(seconds / fast["seconds"], 1),
        "same_output": True,
    }


def measure(kind: str, events: int) -> dict[str, Any]:
    """Run one measurement in a process of its own, on a log made here."""
    with tempfile.TemporaryDirectory(prefix="gemst-bench-") as folder:
        make_log(Path(folder) / "raw", events)
        arguments = [sys.executable, __file__, "--measure", kind, "--folder", folder]
        finished = subprocess.run(arguments, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    print(f"{kind:>11}: " + ", ".join(f"{name} {value}" for name, value in result.items()), flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=1_000_000, help="largest log")
    parser.add_argument("--measure", choices=["pipeline", "compare"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        run = {"pipeline": pipeline, "compare": compare}[arguments.measure]
        print(json.dumps(run(arguments.folder / "raw", arguments.folder / "out")))
        return
    sizes = sorted(
        {size for size in (1_000_000, 3_000_000, 10_000_000) if size < arguments.events} | {arguments.events}
    )
    result = {
        "sizes": [measure("pipeline", size) for size in sizes],
        "row_loop": measure("compare", ROW_LOOP_EVENTS),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

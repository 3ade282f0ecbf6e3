"""The specialist to beat: SASRec, tuned, on the same split, exclusions and metrics as the model.

SASRec is RecTools' (softmax over the catalogue, or over 256 sampled items where it is large), in an environment of its
own under artifacts/benchmarks/sasrec/env, because RecTools pins older numpy and pandas. It learns from the train events
of both tasks in order, long users cut into windows so that no event is lost, and ranks for every test example from the
events before it. It sees no query. Every trial is kept, and a stopped run goes on where it was; the trial and epoch
with the best validation NDCG@10 on recommendation are reported, with one test number for each task.

    python benchmarks/sasrec.py                          # artifacts/examples of the current pipeline
    python benchmarks/sasrec.py --examples FOLDER --name lastfm-2k    # of a study: artifacts/study/shared/split-KEY/...
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import subprocess
import sys
import venv
from importlib.metadata import version
from pathlib import Path
from typing import Any

import polars as pl

from gemst import layout
from gemst.data.tables import EXAMPLES
from gemst.evaluation.metrics import relevant_items, table_of_metrics
from gemst.evaluation.protocols import seen_items
from gemst.evaluation.study import HEADLINE
from gemst.files import atomic_file, atomic_folder, read_json, require, write_json
from gemst.params import load
from gemst.prompts import TASKS

HOME = layout.ARTIFACTS / "benchmarks" / "sasrec"
PACKAGES = ("rectools[torch]==0.19.0", "polars>=1.34", f"torch=={version('torch').split('+')[0]}")
MARKS = (5, 10, 20, 30, 40)  # epochs after which a trial is measured
GRID = {"dropout": (0.5, 0.2), "factors": (128, 64), "window": (50, 100), "blocks": (2,), "lr": (1e-3,), "seed": (7,)}
K = 20
SOFTMAX_ITEMS = 5000  # a larger catalogue is sampled: its whole softmax takes hours on a CPU
NEGATIVES = 256


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument(
        "--examples", type=Path, default=layout.EXAMPLES, help="folder of train, valid, test.parquet"
    )
    arguments.add_argument("--name", default="ml-100k", help="name of the data set in the results")
    arguments.add_argument("--trials", type=int, help="first trials of the grid only")
    given = arguments.parse_args()
    splits = {
        name: pl.read_parquet(require(given.examples / f"{name}.parquet", made_by="gemst split"))
        for name in ("train", "valid", "test")
    }
    known = {"valid": [splits["train"]], "test": [splits["train"], splits["valid"]]}
    exclude = load().evaluation.exclude_seen if Path("params.yaml").exists() else True
    seen = {name: seen_items(splits[name], past) if exclude else None for name, past in known.items()}
    rows = [frame.select(EXAMPLES.names()).hash_rows(seed=1).to_numpy() for frame in splits.values()]
    content = hashlib.sha256(b"".join(numbers.tobytes() for numbers in rows)).hexdigest()
    work = HOME / f"{given.name}-{content[:12]}"
    python = environment()
    many = splits["train"]["targets"].explode().n_unique() > SOFTMAX_ITEMS
    loss = {"loss": "sampled_softmax" if many else "softmax", "negatives": NEGATIVES}
    grid = [dict(zip(GRID, values, strict=True)) for values in itertools.product(*GRID.values())]
    trials = []
    for number, trial in enumerate(grid[: given.trials], 1):
        folder = work / "-".join(f"{name}={value}" for name, value in trial.items())
        print(f"trial {number} of {len(grid[: given.trials])}: {trial}", flush=True)
        windows = work / f"windows-{trial['window']}.parquet"
        if not windows.exists():
            work.mkdir(parents=True, exist_ok=True)
            train_windows(splits["train"], trial["window"]).write_parquet(windows)
            for name in seen:
                sequences(splits[name], known[name], trial["window"]).write_parquet(
                    work / f"{name}-{trial['window']}.parquet"
                )
        if not (folder / "trial.json").exists():
            with atomic_folder(folder) as fresh:
                most = max(0 if one is None else one.group_by("row").len()["len"].max() or 0 for one in seen.values())  # type: ignore[type-var, operator]
                task = trial | loss | {"marks": MARKS, "k": K + int(most), "inputs": str(work), "out": str(fresh)}
                subprocess.run([python, Path(__file__).with_name("sasrec_worker.py"), json.dumps(task)], check=True)
        seconds = read_json(folder / "trial.json")["seconds"]
        for mark in MARKS:
            valid = means(by_query(pl.read_parquet(folder / f"valid-{mark}.parquet"), splits["valid"], seen["valid"]))
            trials.append(
                {**trial, "epochs": mark, "seconds": seconds[str(mark)], "valid": valid, "folder": str(folder)}
            )
            print(f"  {mark} epochs: " + line(valid), flush=True)
    best = max(trials, key=lambda one: one["valid"]["recommendation"]["ndcg@10"])
    ranking = pl.read_parquet(Path(best.pop("folder")) / f"test-{best['epochs']}.parquet")
    test = by_query(ranking, splits["test"], seen["test"])
    result = {
        "data": given.name, "library": PACKAGES[0], "loss": loss["loss"], "best": best,
        "test": means(test),
        "planned": len(grid),
        "trials": [{name: value for name, value in one.items() if name != "folder"} for one in trials],
    }  # fmt: skip
    results = Path(__file__).parent / "results"
    with atomic_file(results / f"sasrec-{given.name}.parquet") as place:  # for the study's paired interval
        shown = test.with_columns(ranker=pl.lit("sasrec"), protocol=pl.lit("full")).cast({HEADLINE: pl.Float32})
        shown.select("ranker", "protocol", "row", "user_id", "task", "timestamp", HEADLINE).write_parquet(place)
    write_json(results / f"sasrec-{given.name}.json", result)
    print(f"best: {best}\ntest: " + line(result["test"]))


def environment() -> str:
    """The interpreter of an environment with RecTools; made once."""
    python = HOME / "env" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    done = HOME / "env" / "installed.json"
    if not done.exists():
        venv.create(HOME / "env", with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES], check=True)
        write_json(done, list(PACKAGES))
    return str(python)


def train_windows(train: pl.DataFrame, length: int) -> pl.DataFrame:
    """Columns user (a number per window), item_id, at (place in time): each user's train events in stretches of
    `length` + 1 events that overlap by one, so that every event but a user's first is a target once."""
    events = train.select("user_id", item_id=pl.col("targets").list.first())
    heads = (
        train.group_by("user_id", maintain_order=True).first().select("user_id", item_id="history").explode("item_id")
    )
    whole = pl.concat([heads.drop_nulls(), events]).sort("user_id", maintain_order=True)
    placed = whole.with_columns(at=pl.int_range(pl.len()).over("user_id"))
    own = placed.with_columns(window=pl.col("at") // length)
    shared = placed.filter((pl.col("at") % length == 0) & (pl.col("at") > 0))
    return (
        pl.concat([own, shared.with_columns(window=pl.col("at") // length - 1)])
        .select("item_id", "at", user=pl.struct("user_id", "window").rank("dense"))
        .sort("user", "at")
    )


def sequences(examples: pl.DataFrame, past: list[pl.DataFrame], length: int) -> pl.DataFrame:
    """Columns user (row of `examples`), item_id, at: the last `length` events before each example.

    They end with the example's own history; what is older comes from the examples of `past`.
    """
    rows = examples.with_row_index("user")
    events = [table.select("user_id", "timestamp", item_id=pl.col("targets").list.first()) for table in past]
    history = rows.select("user", item_id="history").explode("item_id").drop_nulls()
    before = (
        rows.select("user", "user_id", pl.col("history").list.len(), now="timestamp")
        .join(pl.concat(events), on="user_id")
        .filter(pl.col("timestamp") < pl.col("now"))
        .sort("user", "timestamp", maintain_order=True)
    )
    # The newest of them are the history: as many as it holds. An item may come more than once.
    older = before.filter(pl.int_range(pl.len(), 0, -1).over("user") > pl.col("history")).select("user", "item_id")
    whole = (
        pl.concat([older, history]).sort("user", maintain_order=True).group_by("user", maintain_order=True).tail(length)
    )
    return whole.with_columns(at=pl.int_range(pl.len()).over("user"))


def by_query(ranking: pl.DataFrame, examples: pl.DataFrame, seen: pl.DataFrame | None) -> pl.DataFrame:
    """Metrics of every example from a ranking (row, item_id, rank) once the seen items are taken out, with its key."""
    ranking = ranking.cast({"row": pl.UInt32})
    kept = ranking if seen is None else ranking.join(seen, on=["row", "item_id"], how="anti")
    ranked = kept.sort("row", "rank").with_columns(rank=pl.int_range(1, pl.len() + 1).over("row"))
    keys = examples.select("user_id", "task", "timestamp").with_row_index("row")
    return table_of_metrics(ranked, relevant_items(examples), (10, K)).join(keys, on="row", maintain_order="left")


def means(table: pl.DataFrame) -> dict[str, Any]:
    """Mean metrics per task."""
    scores = table.drop("row", "user_id", "timestamp")
    return {task: scores.filter(pl.col("task") == task).drop("task").mean().row(0, named=True) for task in TASKS}


def line(metrics: dict[str, Any]) -> str:
    return ", ".join(f"{task} NDCG@10 {values['ndcg@10']:.4f}" for task, values in metrics.items())


if __name__ == "__main__":
    main()

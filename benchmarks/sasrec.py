"""The specialist to beat: SASRec, tuned, on the same split, exclusions and metrics as the model.

SASRec is RecTools' (softmax over the catalogue, or over 256 sampled items where it is large), in an environment of its
own under artifacts/benchmarks/sasrec/env, because RecTools pins older numpy and pandas. It learns from the train events
of both tasks in order, long users cut into windows so that no event is lost, and ranks for every test example from the
events before it. It sees no query. Results are written after every trial, and a stopped run goes on where it was, from
the results alone if the rest is gone. The trial and epoch with the best validation NDCG@10 on recommendation are
reported, with one test number for each task.

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
from gemst.data.hashing import stable_hash
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
GRID = {"dropout": (0.5, 0.2), "factors": (64, 128), "window": (50, 100), "blocks": (2,), "lr": (1e-3,), "seed": (7,)}
K = 20
SOFTMAX_ITEMS = 20_000  # a larger catalogue is sampled; up to here the whole costs little more on a CPU
NEGATIVES = 256


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument(
        "--examples", type=Path, default=layout.EXAMPLES, help="folder of train, valid, test.parquet"
    )
    arguments.add_argument("--name", default="ml-100k", help="name of the data set in the results")
    arguments.add_argument("--trials", type=int, help="first trials of the grid only; the first was best on ml-100k")
    given = arguments.parse_args()
    splits = {
        name: pl.read_parquet(require(given.examples / f"{name}.parquet", made_by="gemst split"))
        for name in ("train", "valid", "test")
    }
    known = {"valid": [splits["train"]], "test": [splits["train"], splits["valid"]]}
    exclude = load().evaluation.exclude_seen if Path("params.yaml").exists() else True
    seen = {name: seen_items(splits[name], past) if exclude else None for name, past in known.items()}
    content = content_of([*splits.values()], exclude)
    work = HOME / f"{given.name}-{content}"
    many = splits["train"]["targets"].explode().n_unique() > SOFTMAX_ITEMS
    loss = {"loss": "sampled_softmax" if many else "softmax", "negatives": NEGATIVES}
    grid = [dict(zip(GRID, values, strict=True)) for values in itertools.product(*GRID.values())]
    place = Path(__file__).parent / "results" / f"sasrec-{given.name}.json"
    result = read_json(place) if place.exists() else {}
    if result.get("examples") != content or result["library"] != PACKAGES[0]:
        result = {"data": given.name, "examples": content, "library": PACKAGES[0], "loss": loss["loss"], "trials": []}
    result["planned"] = len(grid)
    for number, trial in enumerate(grid[: given.trials], 1):
        print(f"trial {number} of {len(grid[: given.trials])}: {trial}", flush=True)
        before = [one for one in result["trials"] if trial.items() <= one.items()]
        if {one["epochs"] for one in before} != set(MARKS):
            result["trials"] = [one for one in result["trials"] if one not in before]
            folder = run(trial, loss, work, splits, known, seen)
            seconds = read_json(folder / "trial.json")["seconds"]
            for mark in MARKS:
                ranked = {name: pl.read_parquet(folder / f"{name}-{mark}.parquet") for name in seen}
                valid = means(by_query(ranked["valid"], splits["valid"], seen["valid"]))
                one = {**trial, "epochs": mark, "seconds": seconds[str(mark)], "valid": valid}
                result["trials"].append(one)
                if "best" not in result or score(one) > score(result["best"]):
                    test = by_query(ranked["test"], splits["test"], seen["test"])
                    result |= {"best": one, "test": means(test)}
                    write_queries(test, place.with_suffix(".parquet"))
            write_json(place, result)
        for one in result["trials"]:
            if trial.items() <= one.items():
                print(f"  {one['epochs']} epochs: " + line(one["valid"]), flush=True)
    print(f"best: {result['best']}\ntest: " + line(result["test"]))


def content_of(splits: list[pl.DataFrame], exclude: bool) -> str:
    """One hash over the examples and what is left out of rankings; polars' own would change with its version."""
    whole = hashlib.sha256(str(exclude).encode())
    for frame in splits:
        whole.update(stable_hash(frame.select(pl.struct(EXAMPLES.names()).struct.json_encode()).to_series()).tobytes())
    return whole.hexdigest()[:12]


def run(
    trial: dict[str, Any],
    loss: dict[str, Any],
    work: Path,
    splits: dict[str, pl.DataFrame],
    known: dict[str, list[pl.DataFrame]],
    seen: dict[str, pl.DataFrame | None],
) -> Path:
    """The folder of a trial's rankings, valid-{epochs}.parquet and test-{epochs}.parquet, made if it is not there."""
    folder = work / "-".join(f"{name}={value}" for name, value in trial.items())
    windows = work / f"windows-{trial['window']}.parquet"
    if not windows.exists():
        work.mkdir(parents=True, exist_ok=True)
        for name, past in known.items():
            sequences(splits[name], past, trial["window"]).write_parquet(work / f"{name}-{trial['window']}.parquet")
        with atomic_file(windows) as fresh:
            train_windows(splits["train"], trial["window"]).write_parquet(fresh)
    if not (folder / "trial.json").exists():
        python = environment()
        with atomic_folder(folder) as fresh:
            most = [
                0 if one is None else one["row"].value_counts()["count"].to_numpy().max(initial=0)
                for one in seen.values()
            ]
            task = trial | loss | {"marks": MARKS, "k": K + int(max(most)), "inputs": str(work), "out": str(fresh)}
            subprocess.run([python, Path(__file__).with_name("sasrec_worker.py"), json.dumps(task)], check=True)
    return folder


def score(one: dict[str, Any]) -> float:
    return float(one["valid"]["recommendation"]["ndcg@10"])


def write_queries(test: pl.DataFrame, place: Path) -> None:
    """The best trial's test scores by query, for the study's paired interval."""
    shown = test.with_columns(ranker=pl.lit("sasrec"), protocol=pl.lit("full")).cast({HEADLINE: pl.Float32})
    with atomic_file(place) as fresh:
        shown.select("ranker", "protocol", "row", "user_id", "task", "timestamp", HEADLINE).write_parquet(fresh)


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

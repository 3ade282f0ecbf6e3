"""Is an item found that nobody has clicked yet? Items are held out, appended to the tuned model, and asked for.

Fifty items of MovieLens-100k leave the catalogue and the logs. The pipeline's own stages (`gemst ingest` to `gemst
tune`, a process each, in a scratch project) tune a model on the rest, for every weight of the alignment task under one
token budget. Then all held-out items are appended at once, without training, and each is one trial: a user with a
history types its title, and the whole catalogue is ranked. Beside it: the same for users without a history, for fifty
items that were trained, and how the append changes the ranking of everybody else. A stopped run goes on where it was.

    python benchmarks/new_items.py
    python benchmarks/new_items.py --strategies atomic rq-kmeans --alignment 0 0.05 --tokens 150000

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import torch
import yaml

from gemst import backbone, layout
from gemst.config import Config
from gemst.data import sources, tables
from gemst.evaluation.metrics import relevant_items, table_of_metrics
from gemst.evaluation.protocols import seen_items
from gemst.files import atomic_folder, read_json
from gemst.params import load
from gemst.prompts import TASKS
from gemst.ranking import rank
from gemst.tuning.append import append

HOME = layout.ARTIFACTS / "benchmarks" / "new-items"
STAGES = {
    "ingest": layout.TABLES, "validate": layout.VALIDATED, "split": layout.EXAMPLES, "tokenize": layout.ITEM_IDS,
    "item-rows": layout.ITEM_ROWS, "null-space": layout.NULL_SPACE,
}  # fmt: skip
TOP = 10


def held_out(items: pl.DataFrame, trials: int, seed: int) -> list[str]:
    """Items with a title of their own, so that a title asks for one item alone."""
    return items.filter(~pl.col("title").is_duplicated())["item_id"].sample(trials, seed=seed).sort().to_list()


def prepared(config: Config, strategy: str, options: argparse.Namespace) -> Path:
    """A scratch project without the held-out items, ready to be tuned; what is there already is kept."""
    made_of = f"{strategy}-{options.layers or 'all'}-layers-{options.trials}-{config.seed}-{options.general_tokens}"
    project = HOME / made_of / "prepared"
    if not (project / "logs").exists():
        loaded = sources.load(config.data)
        gone = held_out(loaded.items, options.trials, config.seed)
        with atomic_folder(project / "logs") as logs:
            for name, table in (("items", loaded.items), ("events", loaded.events)):
                table.filter(~pl.col("item_id").is_in(gone)).write_parquet(logs / f"{name}.parquet")
        changed = {
            "data": {"source": "table", "path": "logs", "columns": {}},
            "backbone": {"name": str(Path(config.backbone.name).resolve()), "num_layers": options.layers},
            "item_ids": {"strategy": strategy, "encoder": str(Path(config.item_ids.encoder).resolve())},
            "null_space": {"corpus": str(config.null_space.corpus.resolve()), "tokens": options.general_tokens},
        }
        tree = config.model_dump(mode="json")
        tree |= {name: {**tree[name], **settings} for name, settings in changed.items()}
        (project / "params.yaml").write_text(yaml.safe_dump(tree))
    for stage, made in STAGES.items():
        if not (project / made).exists():
            gemst(stage, project)
    return project


def tuned_project(config: Config, strategy: str, alignment: float, options: argparse.Namespace) -> Path:
    """A copy of the prepared project, tuned."""
    origin = prepared(config, strategy, options)
    project = origin.with_name(f"alignment-{alignment}-tokens-{options.tokens}-{options.batch_tokens}")
    if not project.exists():
        with atomic_folder(project) as folder:
            shutil.copytree(origin, folder, dirs_exist_ok=True)
    if not (project / layout.MODEL / "gemst.json").exists():
        gemst(
            "tune", project, f"tuning.alignment={alignment}", f"tuning.max_tokens={options.tokens}",
            f"tuning.batch_tokens={options.batch_tokens}", "tuning.max_minutes=null", "tuning.checkpoint_every=20",
            f"tuning.validate_every={options.tokens}",
        )  # fmt: skip
    return project


def gemst(command: str, project: Path, *settings: str) -> None:
    """A command of the pipeline in a process of its own."""
    changes = [part for setting in settings for part in ("--set", setting)]
    subprocess.run([sys.executable, "-m", "gemst.cli", command, *changes], cwd=project, check=True, stdout=sys.stderr)


def trial(config: Config, project: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Append, ask, count."""
    whole = sources.load(config.data).items
    gone = held_out(whole, options.trials, config.seed)
    own = load(project / "params.yaml")
    train, valid, test = (
        pl.read_parquet(project / layout.EXAMPLES / f"{name}.parquet") for name in ("train", "valid", "test")
    )
    events = tables.read_events(project / layout.VALIDATED / "events.parquet")
    append(project / layout.MODEL, whole, events, own, project / "appended")
    before, after = backbone.load_tuned(project / layout.MODEL), backbone.load_tuned(project / "appended")
    trained = whole.filter(~pl.col("item_id").is_in(gone))
    trained = trained.filter(~pl.col("title").is_duplicated())["item_id"].sample(options.trials, seed=1).to_list()
    users = test.unique("user_id", keep="first", maintain_order=True)
    users = users.gather_every(len(users) // options.trials).head(options.trials)
    everybody = test.filter(pl.col("user_id").is_in(test["user_id"].unique().sort().gather_every(8).implode()))
    seen = seen_items(everybody, [train, valid])
    return {
        "items": len(whole),
        "new_items_found": found(after, whole, gone, users, own),
        "new_items_found_without_history": found(after, whole, gone, None, own),
        "trained_items_found": found(after, whole, trained, users, own),
        "trained_items_found_without_history": found(after, whole, trained, None, own),
        "others_ndcg10_before": ndcg(before, everybody, seen, own),
        "others_ndcg10_after": ndcg(after, everybody, seen, own),
        "others": len(everybody),
        **{name: read_json(project / layout.TUNING / "run.json")[name] for name in ("steps", "epochs", "seconds")},
    }


def found(
    tuned: backbone.Tuned, items: pl.DataFrame, wanted: list[str], users: pl.DataFrame | None, config: Config
) -> int:
    """Of the items `wanted`, how many are in the top 10 for their own title; one user each, or nobody's history."""
    title = dict(items.select("item_id", "title").iter_rows())
    histories = [[]] * len(wanted) if users is None else users["history"].to_list()
    # A user's own past stays in the catalogue here: a title may ask for what one knows.
    asked = pl.DataFrame(
        {"history": histories, "query": [title[item] for item in wanted]},
        schema={"history": pl.List(pl.String), "query": pl.String},
    )
    ranked = rank(tuned, asked, TOP, config.ranking)
    right = pl.DataFrame({"item_id": wanted}).with_row_index("row")
    return len(ranked.join(right, on=["row", "item_id"], how="semi"))


def ndcg(tuned: backbone.Tuned, examples: pl.DataFrame, seen: pl.DataFrame, config: Config) -> dict[str, float]:
    table = table_of_metrics(rank(tuned, examples, TOP, config.ranking, seen), relevant_items(examples), (TOP,))
    tasks = table.sort("row").with_columns(task=examples["task"])
    return {task: tasks.filter(task=task)["ndcg@10"].mean() for task in TASKS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", nargs="+", default=["atomic"])
    parser.add_argument("--alignment", nargs="+", type=float, default=[0.0, 0.05])
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=150_000, help="budget of tuning")
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--general-tokens", type=int, default=20_000, help="general text behind the null space")
    parser.add_argument("--layers", type=int, help="first layers of the backbone only: a quick look, no result")
    options = parser.parse_args()
    config = load()
    torch.manual_seed(config.seed)
    result: dict[str, Any] = {"benchmark": "new_items", "trials": options.trials, "top": TOP, "cells": {}}
    result |= {"tokens": options.tokens, "batch_tokens": options.batch_tokens, "layers": options.layers or "all"}
    for strategy in options.strategies:
        for alignment in options.alignment:
            project = tuned_project(config, strategy, alignment, options)
            cell = result["cells"][f"{strategy}, alignment {alignment}"] = trial(config, project, options)
            print(f"{strategy}, alignment {alignment}: {json.dumps(cell)}", file=sys.stderr, flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()

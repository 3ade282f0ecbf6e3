"""One SASRec trial inside RecTools' environment; `sasrec.py` starts it with the trial as JSON.

Reads windows-{w}.parquet, valid-{w}.parquet and test-{w}.parquet (user, item_id, at) from `inputs`; writes, after each
epoch mark, valid-{epochs}.parquet and test-{epochs}.parquet (row, item_id, rank) and in the end trial.json to `out`.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings
from pathlib import Path

import pandas as pd
import polars as pl
from pytorch_lightning import Trainer, seed_everything
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel


def dataset(path: Path) -> Dataset:
    events = pl.read_parquet(path)
    return Dataset.construct(
        pd.DataFrame(
            {
                Columns.User: events["user"].to_numpy(),
                Columns.Item: events["item_id"].to_numpy(),
                Columns.Weight: 1.0,
                Columns.Datetime: pd.to_datetime(events["at"].to_numpy(), unit="s"),
            }
        )
    )


def trainer() -> Trainer:
    return Trainer(
        max_epochs=1, enable_progress_bar=False, enable_model_summary=False, logger=False, enable_checkpointing=False
    )


def main() -> None:
    trial = json.loads(sys.argv[1])
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    seed_everything(trial["seed"], verbose=False)
    inputs, out = Path(trial["inputs"]), Path(trial["out"])
    train = dataset(inputs / f"windows-{trial['window']}.parquet")
    asked = {name: dataset(inputs / f"{name}-{trial['window']}.parquet") for name in ("valid", "test")}
    model = SASRecModel(
        n_blocks=trial["blocks"], n_heads=4, n_factors=trial["factors"], dropout_rate=trial["dropout"], lr=trial["lr"],
        session_max_len=trial["window"], loss=trial["loss"], n_negatives=trial["negatives"],
        batch_size=128, get_trainer_func=trainer,
    )  # fmt: skip
    seconds, spent, done = {}, 0.0, 0
    for mark in trial["marks"]:
        began = time.perf_counter()
        model.fit_partial(train, min_epochs=mark - done, max_epochs=mark - done)
        spent, done = spent + time.perf_counter() - began, mark
        seconds[str(mark)] = round(spent, 1)
        print(f"  {mark} epochs in {spent:,.0f} s", flush=True)
        for name, one in asked.items():
            users = one.user_id_map.external_ids
            ranked = model.recommend(users, one, trial["k"], filter_viewed=False, on_unsupported_targets="ignore")
            pl.DataFrame(
                {
                    "row": ranked[Columns.User].to_numpy(),
                    "item_id": ranked[Columns.Item].astype(str).tolist(),
                    "rank": ranked[Columns.Rank].to_numpy(),
                }
            ).write_parquet(out / f"{name}-{mark}.parquet")
    (out / "trial.json").write_text(json.dumps({"seconds": seconds}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

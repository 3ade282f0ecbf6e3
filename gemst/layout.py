"""Where every stage reads and writes, relative to the project folder (the working directory)."""

from pathlib import Path

DATA = Path("data")  # raw inputs, versioned by data.dvc, written by `gemst fetch` alone
ARTIFACTS = Path("artifacts")  # stage outputs, versioned by dvc.lock

TABLES = ARTIFACTS / "tables"  # ingest: items.parquet, events.parquet, ingest.json (rows in, out, dropped by rule)
VALIDATED = ARTIFACTS / "validated"  # validate: items.parquet, events.parquet without the quarantined rows
QUARANTINE = ARTIFACTS / "quarantine"  # validate: items.parquet, events.parquet with a `reason` column
VALIDATION = ARTIFACTS / "validation"  # validate: report.json and docs/ (Great Expectations Data Docs)
EXAMPLES = ARTIFACTS / "examples"  # split: train.parquet, valid.parquet, test.parquet, split.json
ITEM_IDS = ARTIFACTS / "item_ids"  # tokenize: ids.parquet, trie.safetensors, quality.json, manifest.json
ITEM_ROWS = ARTIFACTS / "item_rows"  # item-rows: rows.safetensors, manifest.json
NULL_SPACE = ARTIFACTS / "null_space"  # null-space: projectors.safetensors, manifest.json
TUNING = ARTIFACTS / "tuning"  # tune: curves.parquet, diagnostics.parquet, run.json; checkpoints while it runs
MODEL = ARTIFACTS / "model"  # tune: a plain transformers checkpoint, its tokenizer, item_ids/, memory/ and gemst.json
EVALUATION = ARTIFACTS / "evaluation"  # evaluate: metrics.json, per_query.parquet, report.html, report.md

MLRUNS = Path("mlruns")  # MLflow's database and artefacts

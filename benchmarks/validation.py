"""Validation of canonical tables, Data Docs included: seconds beyond the imports, by step, and peak memory.

    python benchmarks/validation.py --events 1000000

The log is the one of benchmarks/ingest.py, with one row in a hundred spoilt. The measured call is the body of
`gemst validate`: rules, quarantine, Great Expectations over every row, Data Docs, the validated tables. It is run twice
in one process, the second time against the version that the first one accepted. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import polars as pl
from ingest import make_log

PARTS = ("tables", "validated", "quarantine", "validation")


def spoil(events: pl.DataFrame) -> pl.DataFrame:
    """Every hundredth event gets an item that nobody knows, or no user, in turn."""
    row = pl.int_range(pl.len())
    return events.with_columns(
        item_id=pl.when(row % 200 == 0).then(pl.lit("nowhere")).otherwise("item_id"),
        user_id=pl.when(row % 200 != 100).then("user_id"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=1_000_000)
    arguments = parser.parse_args()

    started = time.perf_counter()
    import great_expectations
    import great_expectations.expectations

    imported = time.perf_counter()
    from gemst.config import Data
    from gemst.data import expectations, sources, tables

    with tempfile.TemporaryDirectory(prefix="gemst-bench-") as name:
        folder = Path(name)
        make_log(folder / "raw", arguments.events)
        loaded = sources.load(Data(source="table", path=folder / "raw"))
        tables.write_items(loaded.items, folder / "tables" / "items.parquet")
        tables.write_events(spoil(loaded.events), folder / "tables" / "events.parquet")
        del loaded
        seconds, processor = [], []
        for _ in range(2):
            began, busy = time.perf_counter(), time.process_time()
            report = expectations.validate(
                *(folder / part for part in ("tables", "validated", "quarantine", "validation"))
            )
            seconds.append(round(time.perf_counter() - began, 2))
            processor.append(round(time.process_time() - busy, 2))
        pages = len(list((folder / "validation" / "docs").rglob("*.html")))
    result = {
        "events": report["rows_in"]["events"],
        "items": report["rows_in"]["items"],
        "quarantined": sum(report["quarantined"].values()),
        "expectations": report["expectations"],
        "data_docs_pages": pages,
        "seconds_first_version": seconds[0],
        "seconds_next_version": seconds[1],
        "processor_seconds": processor,
        "import_seconds": round(imported - started, 2),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "great_expectations": great_expectations.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

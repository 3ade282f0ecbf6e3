"""What validation found, as an artefact of the flow run: every row's end, the reasons, and the way to the Data Docs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect.artifacts import create_markdown_artifact

from gemst import layout
from gemst.data import account
from gemst.files import read_json

KEY = "data"


def publish(held: bool) -> None:
    """The artefact `data` of the current flow run. `held`: validation let the data through.

    When it did not, the report of the version that was refused is shown; a validation that ended before it could
    judge anything leaves no artefact.
    """
    paths = layout.VALIDATION / "report.json", layout.TABLES / "ingest.json"
    if not all(path.exists() for path in paths):
        return
    report, ingested = map(read_json, paths)
    if account.belongs(report, ingested) and held != bool(report["failed"]):
        create_markdown_artifact(
            markdown(report), key=KEY, description="Rows, quarantine and Data Docs of this version"
        )


def markdown(report: dict[str, Any]) -> str:
    """The page for a validation report (gemst.data.expectations.validate)."""
    failed, docs = report["failed"], (layout.VALIDATION / "docs" / "index.html").resolve()
    title = f"{len(failed)} expectations fail" if failed else f"{report['expectations']} expectations hold"
    raw = read_json(layout.TABLES / "ingest.json")
    rows = account.lines(raw["rows_in"], report["rows_out"], raw["dropped"], report["quarantined"])
    pages = (docs, *sorted(docs.parent.glob("validations/**/*.html")))
    parts = [
        ("Failed", failed),
        ("Rows", rows),
        ("Quarantine", [f"{count:,} {reason}" for reason, count in report["quarantined"].items()]),
        ("Dropped", [f"{count:,} {rule}" for rule, count in raw["dropped"].items()]),
        (
            "Data Docs",
            [_link(page, docs.parent) for page in pages],
        ),
    ]
    lists = ["\n".join([f"## {name}", "", *(f"- {entry}" for entry in entries)]) for name, entries in parts if entries]
    return "\n\n".join([f"# {title}", *lists]) + "\n"


def _link(page: Path, folder: Path) -> str:
    """A link, and the path to copy: a browser does not follow a server's link to a file of this machine."""
    return f"[{page.stem if page.parent != folder else 'all pages'}]({page.as_uri()}) `{page}`"

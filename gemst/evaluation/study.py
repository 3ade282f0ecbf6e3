"""A comparison as data: methods x seeds x data sets, how each method's settings are tried, and what every cell gave.

A cell is one run of the pipeline. Every method of a study gets the same number of trials, all with the first seed and
judged on validation alone; the best one's settings are used for every seed, and for data sets without trials.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gemst.config import Config
from gemst.errors import GemstError
from gemst.files import read_json, require
from gemst.params import load

HEADLINE = "ndcg@10"  # what a study's cells are compared by

Settings = dict[str, Any]  # {"tuning.lr": 0.001}: parameters of params.yaml by their dotted names

# What a result does not depend on, or is a cell's own.
_ASIDE = ("registry.", "threads", "seed", "evaluation.bootstrap")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Entry(_Part):
    """A method: a name for the tables, its fixed settings, and its trials, or whose chosen trial it takes over."""

    label: str
    set: Settings = {}
    trials: list[Settings] = []
    like: str | None = Field(None, description="use the settings chosen for that method instead of trials of its own")


class Table(_Part):
    """A table of the study: every method on every data set with every seed; intervals are against `against`."""

    title: str
    methods: list[str]
    data: list[str]
    seeds: list[int] = Field(min_length=1)
    against: str
    judged: bool = Field(True, description="whether the page says which targets `against` reached")
    figure: bool = Field(False, description="whether the page has a figure of quality against drift for it")


class Study(_Part):
    """The whole comparison, as configs/study.yaml holds it."""

    name: str
    title: str = Field("Ways to tune one model for search and recommendation", description="the page's headline")
    page: Path = Field(Path("docs/study.md"), description="where `--table` writes it")
    base: Path = Field(Path("params.yaml"), description="what every cell starts from")
    results: Path = Field(Path("benchmarks/results/study"), description="two small files per cell: commit them")
    work: Path = Field(Path("artifacts/study"), description="one folder per cell: its models and reports")
    set: Settings = Field({}, description="settings of every cell: the budget, above all")
    trial_set: Settings = Field(
        {}, description="settings of trials alone, such as a smaller budget; trials are then not tested, only validated"
    )
    data: dict[str, Settings]
    tried_on: dict[str, str] = Field(
        {}, description="data sets without trials of their own: every method takes the settings chosen on the named one"
    )
    methods: dict[str, Entry]
    tables: dict[str, Table]
    summary: list[str] = Field([], description="what to take away, a point each: the head of the page")
    notes: dict[str, list[str]] = Field(
        {}, description="causes and findings the tables do not tell: paragraphs of the page, by heading"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Study:
        for name, table in self.tables.items():
            for kind, used, known in (("method", table.methods, self.methods), ("data set", table.data, self.data)):
                unknown = [one for one in used if one not in known]
                if unknown:
                    raise ValueError(f"table {name}: no {kind} is called {', '.join(unknown)}")
            if table.against not in table.methods:
                raise ValueError(f"table {name}: against = {table.against!r} is not one of its methods")
        for name, other in self.tried_on.items():
            if name not in self.data or other not in self.data or other in self.tried_on:
                raise ValueError(f"tried_on: {name}: {other} must name two data sets, the second with its own trials")
        for name, entry in self.methods.items():
            if entry.like is not None:
                owner = self.methods.get(entry.like)
                if entry.trials or owner is None or owner.like is not None:
                    raise ValueError(f"method {name}: like = {entry.like!r} must name a method with trials of its own")
            elif not entry.trials:
                raise ValueError(f"method {name}: give it trials, or `like:` a method that has some")
        counts = {name: len(entry.trials) for name, entry in self.methods.items() if entry.like is None}
        if len(set(counts.values())) > 1:
            raise ValueError(f"every method gets the same number of trials, these have {counts}")
        return self


@dataclass(frozen=True)
class Cell:
    """One run: `name` is its place in results and work folder, `trial` says that it is judged on validation alone."""

    data: str
    method: str
    name: str
    seed: int
    trial: bool
    config: Config

    @property
    def params(self) -> Settings:
        """What the result depends on, beside data, seed and code."""
        return {name: value for name, value in self.config.flat().items() if not name.startswith(_ASIDE)}


def read(path: Path) -> Study:
    """Read a study. Raises GemstError naming the fault."""
    require(path, made_by="git checkout configs/study.yaml")
    try:
        return Study.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}".lstrip(": ") for fault in error.errors()]
        raise GemstError(f"{path}: {'; '.join(faults)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise GemstError(f"{path} cannot be read: {error}", "Give a study such as configs/study.yaml") from None
    except yaml.YAMLError as error:
        raise GemstError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None


def make(study: Study, data: str, method: str, settings: Settings, seed: int, trial: bool) -> Cell:
    """The cell of a method with `settings` (one of its trials). Raises GemstError when a parameter is wrong."""
    parts = [study.set, study.data[data], study.methods[method].set, settings, study.trial_set if trial else {}]
    merged: Settings = {}
    for part in parts:
        merged |= part
    config = load(study.base, [f"{key}={json.dumps(value)}" for key, value in {**merged, "seed": seed}.items()])
    flat = config.flat()
    label = [f"{key.split('.')[-1]}={flat.get(key)}" for key in settings] + [f"seed={seed}"]
    # Trials at the full budget are cells like any other: the best one is the first seed's result.
    apart = trial and bool(study.trial_set)
    name = f"{data}/{method}/{'trial,' if apart else ''}{','.join(label)}"
    return Cell(data, method, name, seed, apart, config)


def result_path(study: Study, cell: Cell) -> Path:
    """The cell's scores and costs, one small JSON."""
    return study.results / f"{cell.name}.json"


def queries_path(study: Study, cell: Cell) -> Path:
    """The cell's score for every test query, as `gemst.evaluation.significance` reads them."""
    return study.results / f"{cell.name}.parquet"


def result(study: Study, cell: Cell) -> dict[str, Any] | None:
    """What the cell gave, or None where it has not been run with these parameters.

    A parameter that did not exist when it was run counts as having had its default.
    """
    path = result_path(study, cell)
    if not path.exists():
        return None
    found: dict[str, Any] = read_json(path)
    defaults = Config().flat()
    # Of a mapping, such as data.columns, a name may also be gone.
    names = cell.params.keys() | {name for name in found["params"] if name.startswith("data.columns.")}
    same = all(found["params"].get(name, defaults.get(name)) == cell.params.get(name) for name in names)
    return found if same else None


def trials(study: Study, data: str, method: str, seed: int) -> list[Cell]:
    """The trials of a method, or of the one it takes its settings from, on `data` or where that one's were made."""
    owner, place = study.methods[method].like or method, study.tried_on.get(data, data)
    return [make(study, place, owner, settings, seed, trial=True) for settings in study.methods[owner].trials]


def chosen(study: Study, data: str, method: str, seed: int) -> Settings | None:
    """The settings of the trial with the best validation score; None while a trial is missing."""
    scores = [result(study, cell) for cell in trials(study, data, method, seed)]
    if any(score is None for score in scores):
        return None
    best = max(range(len(scores)), key=lambda at: scores[at]["valid"]["joint"])  # type: ignore[index]
    return study.methods[study.methods[method].like or method].trials[best]


def final(study: Study, table: Table, data: str, method: str, seed: int) -> Cell | None:
    """The cell that goes into the table; None while the settings are not chosen."""
    settings = chosen(study, data, method, table.seeds[0])
    return None if settings is None else make(study, data, method, settings, seed, trial=False)


def plan(study: Study, only: list[str] | None = None) -> Iterator[Cell]:
    """Every cell that can be run now, the most telling ones first: a table's trials, its first seed, its second...

    Ask again after a cell has ended: results of trials bring the cells that depend on them. `only` are patterns of
    cell names, such as "ml-100k/gems/*". Cells that have a result are listed as well.
    """
    named: set[str] = set()
    for table in study.tables.values():
        waves = [_trials(study, table), *(_finals(study, table, seed) for seed in table.seeds)]
        for wave in waves:
            for cell in wave:
                if cell is not None and cell.name not in named and (not only or _matches(cell.name, only)):
                    named.add(cell.name)
                    yield cell


def _trials(study: Study, table: Table) -> Iterator[Cell]:
    for data in table.data:
        for method in table.methods:
            yield from trials(study, data, method, table.seeds[0])


def _finals(study: Study, table: Table, seed: int) -> Iterator[Cell | None]:
    for data in table.data:
        for method in table.methods:
            yield final(study, table, data, method, seed)


def missing(study: Study) -> int:
    """How many cells of the tables have no result yet, trials left out."""
    absent: set[str | tuple[str, str, int]] = set()
    for table in study.tables.values():
        for data, method, seed in product(table.data, table.methods, table.seeds):
            cell = final(study, table, data, method, seed)
            if cell is None or result(study, cell) is None:
                absent.add((data, method, seed) if cell is None else cell.name)
    return len(absent)


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)

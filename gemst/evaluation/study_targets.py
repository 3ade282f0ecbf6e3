"""What a study set out to reach, and whether it did: paired differences between methods, and a verdict per target."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean
from typing import Any

import polars as pl

from gemst.config import Config
from gemst.errors import GemstError
from gemst.evaluation import study as studies
from gemst.evaluation.significance import JOINT, paired_bootstrap, read_scores
from gemst.evaluation.study import HEADLINE, Cell, Study, Table
from gemst.files import read_json
from gemst.prompts import RECOMMENDATION, SEARCH, TASKS

RISE = 0.005  # the most that perplexity on general text may rise
OF_SEARCH = ("bm25", "dense", "lookup", "query-co-visits", "counts")  # the references that read the query

Results = list[tuple[Cell, dict[str, Any]]]  # one method's cells of a table and data set that have a result


@dataclass(frozen=True)
class Difference:
    """Ours - theirs, paired by query: by task and joint, difference, difference_low, difference_high.

    `seeds` are those both sides have scores by query of; `whole` says that the means of both are over these very seeds.
    """

    seeds: tuple[int, ...]
    whole: bool
    lines: dict[str, dict[str, float]]


def difference(study: Study, theirs: Results, ours: Results) -> Difference | None:
    """How far `ours` is ahead; None where no seed has scores by query on both sides."""
    places = [
        {cell.seed: path for cell, _ in side if (path := studies.queries_path(study, cell)).exists()}
        for side in (theirs, ours)
    ]
    seeds = tuple(sorted(places[0].keys() & places[1].keys()))
    if not seeds:
        return None
    found = paired_bootstrap(*([read_scores(paths[seed]) for seed in seeds] for paths in places), metrics=[HEADLINE])
    whole = seeds_of(theirs) == seeds_of(ours) == set(seeds)
    return Difference(seeds, whole, _by_task(found))


def to_sasrec(study: Study, data: str, ours: Results) -> dict[str, float] | None:
    """How far `ours` is ahead of SASRec on recommendation; None where one side has no scores by query.

    Raises GemstError when SASRec was tested on other examples.
    """
    theirs = study.results.parent / f"sasrec-{data}.parquet"
    paths = [path for cell, _ in ours if (path := studies.queries_path(study, cell)).exists()]
    if not theirs.exists() or len(paths) < len(ours):
        return None
    found = paired_bootstrap(
        read_scores(theirs),
        [read_scores(path) for path in paths],
        metrics=[HEADLINE],
        rankers=("sasrec", "model"),
    )
    return _by_task(found).get(RECOMMENDATION)


def _by_task(lines: pl.DataFrame) -> dict[str, dict[str, float]]:
    wanted = ("difference", "difference_low", "difference_high")
    return {line["task"]: {name: line[name] for name in wanted} for line in lines.to_dicts()}


def seeds_of(results: Results) -> set[int]:
    """The seeds that have a result."""
    return {cell.seed for cell, _ in results}


def tasks_of(study: Study, table: Table, data: str, method: str) -> tuple[str, ...]:
    """The tasks a method is tuned for."""
    task = _config(study, table, data, method).tuning.tasks
    return TASKS if task == "both" else (task,)


def budget_of(study: Study, table: Table, data: str, method: str) -> tuple[int | None, float, bool]:
    """The most tokens and epochs a method may be tuned for, and whether the log's counts are mixed in.

    It decides whether a comparison is a fair one.
    """
    config = _config(study, table, data, method)
    return config.tuning.max_tokens, config.tuning.epochs, config.ranking.memory


def _config(study: Study, table: Table, data: str, method: str) -> Config:
    return studies.make(study, data, method, {}, table.seeds[0], trial=False).config


def among(results: Results, seeds: set[int]) -> Results:
    """The results of these seeds."""
    return [(cell, found) for cell, found in results if cell.seed in seeds]


def newest(study: Study, data: str) -> dict[str, Any] | None:
    """The last cell of a data set: its counts and references, in which no tuning takes part, are of the latest code."""
    cells = (
        studies.final(study, table, data, method, seed)
        for table in study.tables.values() if data in table.data
        for method in table.methods for seed in table.seeds
    )  # fmt: skip
    results = [found for cell in cells if cell and (found := studies.result(study, cell)) and "test" in found]
    return max(results, key=lambda found: found["made"], default=None)


def score(results: Results, task: str) -> float:
    """Mean test score over seeds; `task` may be joint."""
    return mean(found["test"][JOINT] if task == JOINT else found["test"][task][HEADLINE] for _, found in results)


def sasrec(study: Study, data: str) -> dict[str, Any] | None:
    """What benchmarks/sasrec.py found on this data set."""
    path = study.results.parent / f"sasrec-{data}.json"
    return read_json(path) if path.exists() else None


def sasrec_label(found: dict[str, Any]) -> str:
    """The specialist, and how much of its search is done."""
    done, planned = sasrec_trials(found)
    search = "tuned on validation" if done >= planned else f"{done} of {planned} trials on validation so far"
    return f"SASRec, {search} ({found['library']}; sees no query)"


def sasrec_trials(found: dict[str, Any]) -> tuple[int, int]:
    """Trials done and planned."""
    measured = ("epochs", "seconds", "valid")
    done = {tuple(sorted((k, v) for k, v in one.items() if k not in measured)) for one in found["trials"]}
    return len(done), found["planned"]


def targets(study: Study, table: Table, data: str, rows: dict[str, Results]) -> list[str]:
    """A line per target: reached or missed, or how it stands while cells are missing.

    Only methods of the same budget are compared by targets.
    """
    ours = rows[table.against]
    if not ours:
        return []
    name = study.methods[table.against].label
    return [f"Targets of {name} on {data}, from the cells above:", "",
            *(f"- {verdict}: {text}" for verdict, text in _verdicts(study, table, data, rows)), ""]  # fmt: skip


def _verdicts(study: Study, table: Table, data: str, rows: dict[str, Results]) -> Iterator[tuple[str, str]]:
    ours, every = rows[table.against], set(table.seeds)
    done = seeds_of(ours) == every
    budget = budget_of(study, table, data, table.against)
    others = {
        method: rows[method] for method in table.methods
        if method != table.against and budget_of(study, table, data, method) == budget
    }  # fmt: skip
    both = {method: one for method, one in others.items() if len(tasks_of(study, table, data, method)) > 1}
    yield from _first(study, ours, both, done and all(seeds_of(one) == every for one in both.values()))
    for method, theirs in others.items():
        label, own = study.methods[method].label, tasks_of(study, table, data, method)
        if len(own) == 1:
            text = f"ahead of {label} on {own[0]}"
            shared = seeds_of(ours) & seeds_of(theirs)
            if shared:
                mine, alone = (score(among(side, shared), own[0]) for side in (ours, theirs))
                final = done and seeds_of(theirs) == every
                yield _stands(mine > alone, final), f"{text}: {mine:.4f} against {alone:.4f}"
            else:
                yield "not measured", text
        yield _behind(study, label, own, theirs, ours, done)
    rise = mean(found["drift"]["rise"] for _, found in ours)
    yield _stands(rise <= RISE, done), f"perplexity rises by at most {RISE:.1%}: {rise:+.2%}"
    yield from _specialist(study, data, ours, done)
    references = (newest(study, data) or ours[0][1])["references"]
    for reference in OF_SEARCH if SEARCH in ours[0][1]["test"] else ():
        if reference in references:
            mine, best = score(ours, SEARCH), references[reference][SEARCH][HEADLINE]
            yield _stands(mine > best, done), f"above {reference} on search: {mine:.4f} against {best:.4f}"


def _first(study: Study, ours: Results, both: dict[str, Results], done: bool) -> Iterator[tuple[str, str]]:
    there = {method: results for method, results in both.items() if results}
    shared = seeds_of(ours).intersection(*map(seeds_of, there.values()))
    if there and shared:
        joints = {method: score(among(results, shared), JOINT) for method, results in there.items()}
        best, mine = max(joints, key=lambda method: joints[method]), score(among(ours, shared), JOINT)
        text = f"first in the joint score: {mine:.4f}, best other {study.methods[best].label} {joints[best]:.4f}"
        yield _stands(mine > joints[best], done), text


def _behind(
    study: Study, label: str, own: tuple[str, ...], theirs: Results, ours: Results, done: bool
) -> tuple[str, str]:
    text = f"not significantly behind {label} on a task"
    found = difference(study, theirs, ours)
    if found is None:
        return "not measured", text + (": no scores by query of the same seed" if theirs else "")
    behind = [task for task in own if task in found.lines and found.lines[task]["difference_high"] < 0]
    told = f"behind on {' and '.join(behind)}" if behind else "not behind"
    return _stands(not behind, done and found.whole), f"{text}: {told}"


def _specialist(study: Study, data: str, ours: Results, done: bool) -> Iterator[tuple[str, str]]:
    specialist = sasrec(study, data)
    if specialist and RECOMMENDATION in ours[0][1]["test"]:
        mine, theirs = score(ours, RECOMMENDATION), specialist["test"][RECOMMENDATION][HEADLINE]
        trials, planned = sasrec_trials(specialist)
        try:
            paired = to_sasrec(study, data, ours)
            told = f", difference {interval(paired)}" if paired else ""
        except GemstError as error:
            told, done = f" ({error})", False
        text = f"at or above tuned SASRec on recommendation: {mine:.4f} against {theirs:.4f}{told}"
        yield _stands(mine >= theirs, done and trials >= planned), text


def _stands(good: bool, final: bool) -> str:
    if final:
        return "reached" if good else "**missed**"
    return "so far reached" if good else "so far **missed**"


def interval(line: dict[str, float]) -> str:
    """A difference and its 95 % interval, bold where zero lies outside."""
    low, high = line["difference_low"], line["difference_high"]
    told = f"{line['difference']:+.4f}"
    return (f"**{told}**" if low > 0 or high < 0 else told) + f" ({low:+.4f}, {high:+.4f})"

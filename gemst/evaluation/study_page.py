"""A study's results as one Markdown page: tables with spread and paired intervals, targets, costs, what is missing."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import polars as pl

from gemst.evaluation import study as studies
from gemst.evaluation.metrics import harmonic_mean
from gemst.evaluation.significance import JOINT, paired_bootstrap
from gemst.evaluation.study import HEADLINE, Cell, Study, Table
from gemst.files import read_json
from gemst.prompts import TASKS

RISE = 0.005  # the most that perplexity on general text may rise
_NONE = "·"

Results = list[tuple[Cell, dict[str, Any]]]  # one method's cells of a table and data set that have a result


def markdown(study: Study, command: str) -> str:
    """The whole page; `command` runs the study."""
    lines = [
        f"# {study.title}", "",
        f"Made by `{command} --table` from the cells under `{study.results.as_posix()}`.",
        "Scores: NDCG@10 over the full catalogue on the test examples, items of the user's past left out for all,",
        "mean ± standard deviation over seeds; joint: harmonic mean of the two tasks. Differences (Δ) are paired by",
        "query, seeds averaged, with 95 % bootstrap intervals over users: positive means that the first row is ahead,",
        "**bold** that zero lies outside.", "",
    ]  # fmt: skip
    for key, table in study.tables.items():
        lines += [f"## {table.title}", ""]
        for data in table.data:
            lines += _part(study, table, data, command)
        lines += [f"Remake: `{command}`, or one method with `--only 'DATA/METHOD/*'` (table `{key}`).", ""]
    if study.notes:
        lines += ["## What was found", "", *(line for note in study.notes for line in (note, ""))]
    return "\n".join(lines)


def _part(study: Study, table: Table, data: str, command: str) -> list[str]:
    """One data set of a table."""
    rows = {method: _results(study, table, data, method) for method in table.methods}
    missing = [f"{method} (seeds {', '.join(map(str, seeds))})" for method, seeds in _missing(study, table, data)]
    lines = [f"### {data}", ""]
    if missing:
        lines += [f"**Not measured yet:** {'; '.join(missing)}.", ""]
    if not any(rows.values()):
        return [*lines, f"No cell of {data} has a result. `{command} --list --only '{data}/*'` lists them.", ""]
    lines += _quality(study, table, rows)
    lines += _references(study, data, rows)
    lines += _costs(study, rows)
    lines += _choices(study, table, data)
    return lines + (_targets(study, table, data, rows) if table.judged else [])


def _results(study: Study, table: Table, data: str, method: str) -> Results:
    cells = [studies.final(study, table, data, method, seed) for seed in table.seeds]
    return [(cell, found) for cell in cells if cell and (found := studies.result(study, cell)) and "test" in found]


def _missing(study: Study, table: Table, data: str) -> list[tuple[str, list[int]]]:
    absent = []
    for method in table.methods:
        there = {cell.seed for cell, _ in _results(study, table, data, method)}
        seeds = [seed for seed in table.seeds if seed not in there]
        if seeds:
            absent.append((method, seeds))
    return absent


def _own(study: Study, method: str) -> tuple[str, ...]:
    """The tasks a method is tuned for."""
    task = study.methods[method].set.get("tuning.tasks", "both")
    return TASKS if task == "both" else (task,)


def _quality(study: Study, table: Table, rows: dict[str, Results]) -> list[str]:
    head = ["", *TASKS, JOINT, *(f"Δ {task}" for task in (*TASKS, JOINT)), "seeds"]
    body = []
    for method, results in sorted(rows.items(), key=lambda row: row[0] != table.against):
        if not results:
            continue
        own = _own(study, method)
        scores = [_spread([found["test"][task][HEADLINE] for _, found in results]) if task in own else _NONE
                  for task in TASKS]  # fmt: skip
        joint = _spread([found["test"][JOINT] for _, found in results]) if len(own) > 1 else _NONE
        against = _difference_of(study, results, rows[table.against]) if method != table.against else {}
        tasks = (*own, *([JOINT] if len(own) > 1 else []))
        differences = [_difference(against.get(task)) if task in tasks else _NONE for task in (*TASKS, JOINT)]
        body.append([study.methods[method].label, *scores, joint, *differences, str(len(results))])
    alone = _two_models(study, rows)
    if alone:
        body.append(["two single-task models", _NONE, _NONE, _spread(alone), _NONE, _NONE, _NONE, str(len(alone))])
    return [*_table(head, body), ""]


def _two_models(study: Study, rows: dict[str, Results]) -> list[float]:
    """Joint score of one single-task model per task, by seed."""
    by_seed: dict[int, dict[str, float]] = {}
    for method, results in rows.items():
        own = _own(study, method)
        if len(own) == 1:
            for cell, found in results:
                by_seed.setdefault(cell.seed, {})[own[0]] = found["test"][own[0]][HEADLINE]
    return [harmonic_mean(list(scores.values())) for scores in by_seed.values() if len(scores) == len(TASKS)]


def _references(study: Study, data: str, rows: dict[str, Results]) -> list[str]:
    """The rankers that are not tuned language models, same examples and exclusions."""
    shown = next(found for results in rows.values() for _, found in results)["references"]
    body = [[name, *(f"{by[task][HEADLINE]:.4f}" for task in TASKS),
             f"{harmonic_mean([by[task][HEADLINE] for task in TASKS]):.4f}"] for name, by in shown.items()]  # fmt: skip
    specialist = _sasrec(study, data)
    if specialist:
        scores = [specialist["test"][task][HEADLINE] for task in TASKS]
        label = f"SASRec, tuned on validation ({specialist['library']}; sees no query)"
        body.append([label, *(f"{score:.4f}" for score in scores), f"{harmonic_mean(scores):.4f}"])
    note = [] if specialist else [f"SASRec: not measured yet (`python benchmarks/sasrec.py --name {data}`).", ""]
    return ["Reference rankers:", "", *_table(["", *TASKS, JOINT], body), "", *note]


def _sasrec(study: Study, data: str) -> dict[str, Any] | None:
    path = study.results.parent / f"sasrec-{data}.json"
    return read_json(path) if path.exists() else None


def _costs(study: Study, rows: dict[str, Results]) -> list[str]:
    head = ["", "perplexity", "KL, nats", "cloze", "leak", "s/step", "tuning, s", "peak MiB", "steps", "tokens"]
    body = []
    for method, results in rows.items():
        if results:
            of = _reader(results)
            before = results[0][1]["drift"]["cloze_before"]
            leaks = [found["largest_leak"] for _, found in results]
            body.append([
                study.methods[method].label, of(lambda one: one["drift"]["rise"], "+.2%"),
                of(lambda one: one["drift"]["kl"], ".4f"),
                f"{before:.3f} → {of(lambda one: one['drift']['cloze_after'], '.3f')}",
                _NONE if None in leaks else f"{max(leaks):.1e}", of(lambda one: one["seconds"]["per_step"], ".2f"),
                of(lambda one: one["seconds"]["tune"], ".0f"), of(lambda one: one["peak_mib"]["tune"], ",.0f"),
                of(lambda one: one["steps"], ",.0f"), of(lambda one: one["tokens"], ",.0f"),
            ])  # fmt: skip
    return ["General knowledge (held-out Wikipedia, against the backbone) and costs, means over seeds:", "",
            *_table(head, body), "", *_machines(rows), ""]  # fmt: skip


def _machines(rows: dict[str, Results]) -> list[str]:
    """Where the cells ran, and the seeds whose methods ran on several kinds of machine.

    Another kind of machine rounds differently, which alone has moved a joint score by 0.002.
    """
    counts, by_seed = Counter[str](), defaultdict[int, set[str]](set)
    for results in rows.values():
        for cell, found in results:
            machine = _machine(found["machine"])
            counts[machine] += 1
            by_seed[cell.seed].add(machine)
    mixed = [str(seed) for seed, machines in sorted(by_seed.items()) if len(machines) > 1]
    told = ", ".join(f"{machine}: {count}" for machine, count in counts.items())
    warning = f" **The methods of seed {', '.join(mixed)} ran on different kinds of machine.**" if mixed else ""
    return [f"Cells by kind of machine: {told}.{warning}"]


def _machine(facts: dict[str, Any]) -> str:
    """What computes and how precisely, as far as the cell tells: earlier ones name neither device nor bf16."""
    bf16 = {True: ", bf16", False: ", fp32", None: ""}[facts.get("bf16")]
    cores = f"{facts['cores']} cores ({facts.get('instructions', facts['processor'])}{bf16})"
    device = facts.get("device", "cpu")
    return cores if device == "cpu" else f"{device} beside {cores}"


def _reader(results: Results) -> Callable[[Callable[[dict[str, Any]], float], str], str]:
    return lambda read, form: format(mean(read(found) for _, found in results), form)


def _choices(study: Study, table: Table, data: str) -> list[str]:
    """Every trial, its validation score and what it forgot: how the settings were chosen, and at what price."""
    body = []
    for method in table.methods:
        if study.methods[method].like is None:
            cells = studies.trials(study, data, method, table.seeds[0])
            found = [studies.result(study, cell) for cell in cells]
            best = max((one["valid"]["joint"] for one in found if one), default=None)
            settings = [", ".join(f"{name.split('.', 1)[1]} {value}" for name, value in one.items()) or "as given"
                        for one in study.methods[method].trials]  # fmt: skip
            told = [f"{setting}: {_trial(one, best)}" for setting, one in zip(settings, found, strict=True)]
            body.append([study.methods[method].label, *told])
    if not body:
        return []
    head = ["", *(f"trial {number}" for number in range(1, len(body[0])))]
    budget = f", with {study.trial_set}" if study.trial_set else ""
    return [f"Trials{budget}: validation NDCG@10 (harmonic mean of the tuned tasks), the chosen one bold, and the KL",
            "from the backbone on general text where it was taken:", "", *_table(head, body), ""]  # fmt: skip


def _trial(found: dict[str, Any] | None, best: float | None) -> str:
    if found is None:
        return _NONE
    score = found["valid"]["joint"]
    drift = f", KL {found['drift']['kl']:.4f}" if "drift" in found else ""
    return _bold(f"{score:.4f}", score == best) + drift


def _targets(study: Study, table: Table, data: str, rows: dict[str, Results]) -> list[str]:
    """What the study set out to reach, and whether it did."""
    ours = rows[table.against]
    if not ours:
        return []
    name = study.methods[table.against].label
    score = {task: mean(found["test"][task][HEADLINE] for _, found in ours) for task in TASKS}
    joint = mean(found["test"][JOINT] for _, found in ours)
    rise = mean(found["drift"]["rise"] for _, found in ours)
    held: list[tuple[str, bool]] = []
    others = {method: results for method, results in rows.items() if results and method != table.against}
    both = {method: results for method, results in others.items() if len(_own(study, method)) > 1}
    if both:
        joints = {method: mean(found["test"][JOINT] for _, found in results) for method, results in both.items()}
        best = max(joints, key=lambda method: joints[method])
        told = f"first in the joint score: {joint:.4f}, best other {study.methods[best].label} {joints[best]:.4f}"
        held.append((told, joint > joints[best]))
    for method, results in others.items():
        label, own = study.methods[method].label, _own(study, method)
        if len(own) == 1:
            alone = mean(found["test"][own[0]][HEADLINE] for _, found in results)
            held.append(
                (f"ahead of {label} on {own[0]}: {score[own[0]]:.4f} against {alone:.4f}", score[own[0]] > alone)
            )
        against = _difference_of(study, results, ours)
        behind = [task for task in own if task in against and against[task]["difference_high"] < 0]
        told = f"behind on {' and '.join(behind)}" if behind else "not behind"
        held.append((f"not significantly behind {label} on a task: {told}", not behind))
    held.append((f"perplexity rises by at most {RISE:.1%}: {rise:+.2%}", rise <= RISE))
    specialist = _sasrec(study, data)
    if specialist:
        theirs = specialist["test"]["recommendation"][HEADLINE]
        told = f"at or above tuned SASRec on recommendation: {score['recommendation']:.4f} against {theirs:.4f}"
        held.append((told, score["recommendation"] >= theirs))
    for reference in ("bm25", "dense", "lookup"):
        theirs = ours[0][1]["references"][reference]["search"][HEADLINE]
        told = f"above {reference} on search: {score['search']:.4f} against {theirs:.4f}"
        held.append((told, score["search"] > theirs))
    return [f"Targets of {name} on {data}, from the cells above:", "",
            *(f"- {'reached' if good else '**missed**'}: {text}" for text, good in held), ""]  # fmt: skip


def _difference_of(study: Study, theirs: Results, ours: Results) -> dict[str, dict[str, float]]:
    """By task and joint: difference (ours - theirs), difference_low, difference_high; empty if unknown.

    Over the seeds for which both sides have scores by query.
    """
    places = [
        {cell.seed: path for cell, _ in side if (path := studies.queries_path(study, cell)).exists()}
        for side in (theirs, ours)
    ]
    seeds = places[0].keys() & places[1].keys()
    if not seeds:
        return {}
    tables = [_averaged([paths[seed] for seed in sorted(seeds)]) for paths in places]
    lines = paired_bootstrap(*tables, metrics=[HEADLINE])
    wanted = ("difference", "difference_low", "difference_high")
    return {line["task"]: {name: line[name] for name in wanted} for line in lines.to_dicts()}


def _averaged(paths: Sequence[Path]) -> pl.DataFrame:
    """Scores by query, averaged over seeds."""
    every = pl.concat([pl.read_parquet(path) for path in paths])
    keys = ["ranker", "protocol", "row", "user_id", "task", "timestamp"]
    return every.group_by(keys, maintain_order=True).agg(pl.col(HEADLINE).mean())


def _spread(values: list[float]) -> str:
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def _difference(line: dict[str, float] | None) -> str:
    if not line:
        return _NONE
    low, high = line["difference_low"], line["difference_high"]
    return _bold(f"{line['difference']:+.4f}", low > 0 or high < 0) + f" ({low:+.4f}, {high:+.4f})"


def _bold(text: str, wanted: bool) -> str:
    return f"**{text}**" if wanted else text


def _table(head: list[str], body: list[list[str]]) -> list[str]:
    rows = [head, ["---", *["--:"] * (len(head) - 1)], *body]
    return ["| " + " | ".join(row) + " |" for row in rows]

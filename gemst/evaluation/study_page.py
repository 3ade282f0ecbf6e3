"""A study's results as one Markdown page: tables with spread and paired intervals, targets, costs, what is missing."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from statistics import mean, stdev
from typing import Any

from gemst.evaluation import study as studies
from gemst.evaluation.metrics import harmonic_mean
from gemst.evaluation.significance import JOINT
from gemst.evaluation.study import HEADLINE, Study, Table
from gemst.evaluation.study_targets import (
    Difference,
    Results,
    difference,
    interval,
    newest,
    sasrec,
    sasrec_label,
    targets,
    tasks_of,
)
from gemst.prompts import TASKS

_NONE = "·"


def markdown(study: Study, command: str, figures: dict[tuple[str, str], str] | None = None) -> str:
    """The whole page; `command` runs the study, `figures` has the addresses of figures by table and data set."""
    lines = [
        f"# {study.title}", "", *(f"- {point}" for point in study.summary), *([""] if study.summary else []),
        f"Made by `{command} --table` from the cells under `{study.results.as_posix()}`.",
        "Scores: NDCG@10 over the full catalogue on the test examples, the user's train and valid items left out,",
        "mean ± standard deviation over seeds; joint: harmonic mean of the two tasks. Differences (Δ) are paired by",
        "query, seeds averaged, with 95 % bootstrap intervals over users and, where there are several, seeds: positive",
        "means that the first row is ahead, **bold** that zero lies outside. Of one seed they do not know what another",
        "would give. They name their seeds where these are not all of both rows'.", "",
    ]  # fmt: skip
    for key, table in study.tables.items():
        lines += [f"## {table.title}", ""]
        for data in table.data:
            lines += _part(study, table, data, command, (figures or {}).get((key, data)))
        lines += [f"Remake: `{command}`, or one method with `--only 'DATA/METHOD/*'` (table `{key}`).", ""]
    if study.notes:
        lines += ["## What was found", ""]
        for heading, paragraphs in study.notes.items():
            lines += [f"### {heading}", "", *(line for paragraph in paragraphs for line in (paragraph, ""))]
    return "\n".join(lines)


def _part(study: Study, table: Table, data: str, command: str, figure: str | None) -> list[str]:
    """One data set of a table."""
    rows = {method: _results(study, table, data, method) for method in table.methods}
    missing = [f"{method} (seeds {', '.join(map(str, seeds))})" for method, seeds in _missing(study, table, data)]
    lines = [f"### {data}", ""]
    if missing:
        lines += [f"**Not measured yet:** {'; '.join(missing)}.", ""]
    if not any(rows.values()):
        return [*lines, f"No cell of {data} has a result. `{command} --list --only '{data}/*'` lists them.", ""]
    again = ((newest(study, data) or {}).get("counts") or {}).get("test_met_again")
    if again:
        lines += [f"In {again:,} test examples the user had met a target before; there nothing is left out.", ""]
    lines += _quality(study, table, data, rows)
    if figure:
        lines += ["Every tested model, general knowledge lost across and quality up: to the left is better, and above.",
                  "Full points have the settings that validation chose, one a seed; hollow ones are the other trials.",
                  "", f"![Quality against drift on {data}]({figure})", ""]  # fmt: skip
    lines += _references(study, data, rows)
    lines += _costs(study, rows)
    lines += _choices(study, table, data)
    return lines + (targets(study, table, data, rows) if table.judged else [])


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


def _quality(study: Study, table: Table, data: str, rows: dict[str, Results]) -> list[str]:
    head = ["", *TASKS, JOINT, *(f"Δ {task}" for task in (*TASKS, JOINT)), "seeds"]
    body = []
    for method, results in sorted(rows.items(), key=lambda row: row[0] != table.against):
        if not results:
            continue
        own = [task for task in tasks_of(study, table, data, method) if task in results[0][1]["test"]]
        scores = [_spread([found["test"][task][HEADLINE] for _, found in results]) if task in own else _NONE
                  for task in TASKS]  # fmt: skip
        joint = _spread([found["test"][JOINT] for _, found in results]) if len(own) > 1 else _NONE
        against = difference(study, results, rows[table.against]) if method != table.against else None
        tasks = (*own, *([JOINT] if len(own) > 1 else []))
        differences = [_difference(against, task) if task in tasks else _NONE for task in (*TASKS, JOINT)]
        body.append([study.methods[method].label, *scores, joint, *differences, str(len(results))])
    alone = _two_models(study, table, data, rows)
    if alone:
        body.append(["two single-task models", _NONE, _NONE, _spread(alone), _NONE, _NONE, _NONE, str(len(alone))])
    return [*_table(head, body), ""]


def _difference(found: Difference | None, task: str) -> str:
    if found is None or task not in found.lines:
        return _NONE
    seeds = "" if found.whole else f"; seed {', '.join(map(str, found.seeds))}"
    return interval(found.lines[task])[:-1] + f"{seeds})"


def _two_models(study: Study, table: Table, data: str, rows: dict[str, Results]) -> list[float]:
    """Joint score of one single-task model per task, by seed."""
    by_seed: dict[int, dict[str, float]] = {}
    for method, results in rows.items():
        own = tasks_of(study, table, data, method)
        if len(own) == 1:
            for cell, found in results:
                by_seed.setdefault(cell.seed, {})[own[0]] = found["test"][own[0]][HEADLINE]
    return [harmonic_mean(list(scores.values())) for scores in by_seed.values() if len(scores) == len(TASKS)]


def _references(study: Study, data: str, rows: dict[str, Results]) -> list[str]:
    """The rankers that are not tuned language models, same examples and exclusions."""
    shown = (newest(study, data) or next(found for results in rows.values() for _, found in results))["references"]
    body = [[name, *_scores(by)] for name, by in shown.items()]
    specialist = sasrec(study, data)
    if specialist:
        body.append([sasrec_label(specialist), *_scores(specialist["test"])])
    command = f"python benchmarks/sasrec.py --examples FOLDER --name {data}"
    note = [] if specialist else [f"SASRec: not measured yet (`{command}`).", ""]
    return ["Reference rankers:", "", *_table(["", *TASKS, JOINT], body), "", *note]


def _scores(by: dict[str, Any]) -> list[str]:
    """A score a task and the joint one, as far as the data set has the tasks."""
    found = {task: by[task][HEADLINE] for task in TASKS if task in by}
    joint = f"{harmonic_mean(list(found.values())):.4f}" if len(found) == len(TASKS) else _NONE
    return [*(f"{found[task]:.4f}" if task in found else _NONE for task in TASKS), joint]


def _costs(study: Study, rows: dict[str, Results]) -> list[str]:
    head = ["", "perplexity", "KL, nats", "cloze", "leak", "s/step", "tuning, s", "peak MiB", "steps", "kept", "tokens"]
    body = []
    for method, results in rows.items():
        if results:
            of = _reader(results)
            before = results[0][1]["drift"]["cloze_before"]
            leaks = [found["largest_leak"] for _, found in results]
            body.append([
                study.methods[method].label, of(lambda one: one["drift"]["rise"], "+.2%"),
                of(lambda one: one["drift"]["kl"], "z.4f"),
                f"{before:.3f} → {of(lambda one: one['drift']['cloze_after'], '.3f')}",
                _NONE if None in leaks else f"{max(leaks):.1e}", of(lambda one: one["seconds"]["per_step"], ".2f"),
                of(lambda one: one["seconds"]["tune"], ".0f"), of(lambda one: one["peak_mib"]["tune"], ",.0f"),
                of(lambda one: one["steps"], ",.0f"), _kept(results), of(lambda one: one["tokens"], ",.0f"),
            ])  # fmt: skip
    return ["General knowledge (held-out Wikipedia, against the backbone) and costs, means over seeds; kept: the step",
            "whose validation score was best, which is the model that was tested:", "",
            *_table(head, body), "", *_unmoved(study, rows), *_origins(rows), ""]  # fmt: skip


def _kept(results: Results) -> str:
    """The step each seed's model is of."""
    steps = [f"{found['valid']['step']:,}" for _, found in results]
    return steps[0] if len(set(steps)) == 1 else ", ".join(steps)


def _unmoved(study: Study, rows: dict[str, Results]) -> list[str]:
    """Cells that tuning did not improve: what was tested there is the start."""
    found = [
        f"{study.methods[method].label} (seed {cell.seed})"
        for method, results in rows.items() for cell, one in results if one["valid"]["step"] == 0
    ]  # fmt: skip
    told = f"**Tested as they started, because no step was better on validation: {', '.join(found)}.**"
    return [told, ""] if found else []


def _origins(rows: dict[str, Results]) -> list[str]:
    """Where and from which code the cells were made, and the seeds whose methods differ in it.

    Another kind of machine rounds differently, which alone has moved a joint score by 0.002.
    """
    machines, commits = Counter[str](), Counter[str]()
    by_seed = defaultdict[int, tuple[set[str], set[str]]](lambda: (set(), set()))
    for results in rows.values():
        for cell, found in results:
            made_on, made_from = _machine(found), _commit(found)
            machines[made_on] += 1
            commits[made_from] += 1
            by_seed[cell.seed][0].add(made_on)
            by_seed[cell.seed][1].add(made_from)
    lines = []
    for place, name, counts in ((0, "kind of machine", machines), (1, "commit", commits)):
        mixed = [str(seed) for seed, sets in sorted(by_seed.items()) if len(sets[place]) > 1]
        told = ", ".join(f"{one}: {count}" for one, count in counts.items())
        warning = f" **More than one {name} in seed {', '.join(mixed)}.**" if mixed else ""
        lines.append(f"Cells by {name}: {told}.{warning}")
    return [lines[0], "", lines[1]]


def _commit(found: dict[str, Any]) -> str:
    changed = " with uncommitted changes" if str(found.get("dirty")).lower() == "true" else ""
    return f"{(found.get('commit') or 'unknown')[:7]}{changed}"


def _machine(found: dict[str, Any]) -> str:
    """What computed and how precisely, as far as the cell tells: earlier ones name neither device nor bf16."""
    facts, precision = found["machine"], found["params"].get("tuning.precision", "auto")
    if precision == "auto":  # what it meant there
        precision = {True: "bf16", False: "fp32", None: ""}[facts.get("bf16")]
    kind = ", ".join(filter(None, (facts.get("instructions", facts["processor"]), precision)))
    cores = f"{facts['cores']} cores ({kind})"
    device = facts.get("device", "cpu")
    return cores if device == "cpu" else f"{device} beside {cores}"


def _reader(results: Results) -> Callable[[Callable[[dict[str, Any]], float], str], str]:
    return lambda read, form: format(mean(read(found) for _, found in results), form)


def _choices(study: Study, table: Table, data: str) -> list[str]:
    """Every trial, its validation score and what it forgot: how the settings were chosen, and at what price."""
    if data in study.tried_on:
        return [f"No trials on {data}: every method has the settings chosen on {study.tried_on[data]}.", ""]
    body, start = [], None
    for method in table.methods:
        if study.methods[method].like is None:
            cells = studies.trials(study, data, method, table.seeds[0])
            found = [studies.result(study, cell) for cell in cells]
            best = max(one["valid"]["joint"] for one in found if one) if all(found) else None
            start = next((one["start"] for one in found if one and "start" in one), start)
            settings = [", ".join(f"{name.split('.', 1)[1]} {value}" for name, value in one.items()) or "as given"
                        for one in study.methods[method].trials]  # fmt: skip
            told = [f"{setting}: {_trial(one, best)}" for setting, one in zip(settings, found, strict=True)]
            body.append([study.methods[method].label, *told])
    if not body:
        return []
    head = ["", *(f"trial {number}" for number in range(1, len(body[0])))]
    budget = f", with {study.trial_set}" if study.trial_set else ""
    before = "" if start is None else f" All start at {start:.4f}, the item rows alone."
    return [f"Trials{budget}: validation NDCG@10 (harmonic mean of the tuned tasks), the chosen one bold, and the KL",
            f"from the backbone on general text where it was taken.{before}", "", *_table(head, body), ""]  # fmt: skip


def _trial(found: dict[str, Any] | None, best: float | None) -> str:
    if found is None:
        return _NONE
    score = found["valid"]["joint"]
    drift = f", KL {found['drift']['kl']:z.4f}" if "drift" in found else ""
    return _bold(f"{score:.4f}", score == best) + drift


def _spread(values: list[float]) -> str:
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def _bold(text: str, wanted: bool) -> str:
    return f"**{text}**" if wanted else text


def _table(head: list[str], body: list[list[str]]) -> list[str]:
    rows = [head, ["---", *["--:"] * (len(head) - 1)], *body]
    return ["| " + " | ".join(row) + " |" for row in rows]

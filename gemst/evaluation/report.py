"""The report of one run: a self-contained HTML page, and a short Markdown version of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from gemst.evaluation import page, plots
from gemst.evaluation.examples import Example, worked
from gemst.evaluation.page import Cell
from gemst.memory.evidence import FEATURES
from gemst.prompts import TASKS

if TYPE_CHECKING:
    from gemst.evaluation.run import Evaluation
    from gemst.memory.evidence import Fit

_SHOWN = ("ndcg@10", "hit@10", "mrr@10", "map@10")
_PARTS = (
    ("results", "Results"), ("memory", "The log's counts"), ("slices", "Slices"), ("protocols", "Sampled protocols"),
    ("knowledge", "General knowledge"), ("training", "Training"), ("conflict", "Task conflict"),
    ("guarantees", "Subspaces"), ("examples", "Worked examples"), ("about", "About the numbers"),
)  # fmt: skip


def write(
    folder: Path,
    result: Evaluation,
    *,
    items: pl.DataFrame,
    test: pl.DataFrame,
    tuning: Path,
    facts: Mapping[str, str] | None = None,
    memory: Sequence[Fit] = (),
) -> None:
    """Write report.html and report.md into `folder`; `tuning` holds curves.parquet and diagnostics.parquet, or not."""
    text = html(
        result, items=items, test=test, curves=tuning / "curves.parquet", diagnostics=tuning / "diagnostics.parquet",
        facts=facts, memory=memory,
    )  # fmt: skip
    (folder / "report.html").write_text(text, encoding="utf-8")
    (folder / "report.md").write_text(markdown(result.metrics), encoding="utf-8")


def html(
    result: Evaluation,
    *,
    items: pl.DataFrame,
    test: pl.DataFrame,
    curves: Path,
    diagnostics: Path,
    facts: Mapping[str, str] | None = None,
    memory: Sequence[Fit] = (),
) -> str:
    """The whole report as one page without any outside reference.

    `curves` (step, name, value) and `diagnostics` (step, module, cosine, energy_*, leak) are Parquet files of the
    tuning stage: a file or column that a tuning method did not write leaves its figure out. `facts` are shown under the
    title, such as the method and the backbone; `memory`
    are how the log's counts were weighed.
    """
    metrics, depth = result.metrics, int(result.rankings["rank"].cast(pl.Int64).max() or 0)  # type: ignore[arg-type]
    steps = pl.read_parquet(curves) if curves.exists() else pl.DataFrame(schema={"name": pl.String})
    layers = pl.read_parquet(diagnostics) if diagnostics.exists() else pl.DataFrame()
    sections = [
        page.section(
            "results", "Results", _verdict(metrics),
            page.figure(plots.metrics_with_intervals(metrics), "NDCG@10 of every ranker with 95 % intervals, per task"),
            _table(metrics), _paired(metrics),
        ),
        page.section(
            "memory", "The log's counts",
            "Clicks under the query and co-visits are mixed with the model's scores, by weights fitted on validation "
            "examples. NDCG@10 of those, without the counts and with them:",
            _memory(memory),
        ),
        page.section(
            "slices", "Slices",
            "The test set in parts: the model is the dot, each reference a bar. Small parts are noisy; n: queries.",
            page.pair(*(page.figure(plots.slices(metrics, task), f"NDCG@10 by slice, {task}") for task in TASKS)),
        ),
        page.section(
            "protocols", "Sampled protocols",
            "The targets among a few other items: easier than the catalogue, for comparison with papers only.",
            *(_protocol(name, part) for name, part in metrics.get("protocols", {}).items()),
        ),
        page.section(
            "knowledge", "General knowledge",
            "The tuned model against its backbone on held-out general text, over the backbone's own vocabulary.",
            _knowledge(metrics.get("drift", {})),
        ),
        page.section("training", "Training", "", page.figure(plots.curves(steps), "Training curves")),
        page.section(
            "conflict", "Task conflict",
            "Cosine between the gradients of the two tasks, from the coefficients of the shared basis.",
            page.figure(plots.conflict(layers), "Heat maps of gradient cosine by layer and kind of weight"),
        ),
        page.section("guarantees", "Subspaces", "", _subspaces(layers)),
        page.section(
            "examples", "Worked examples",
            "Ten examples per task, evenly spaced over the test set; nobody picked them. Targets are green.",
            *(_examples(task, worked(test, result.rankings, items, task), depth) for task in TASKS),
        ),
        page.section("about", "About the numbers", _about(metrics), _counts(metrics)),
    ]  # fmt: skip
    links = "".join(
        f'<a href="#{anchor}">{title}</a>' for (anchor, title), content in zip(_PARTS, sections, strict=True) if content
    )
    told = " · ".join(f"{escape(name)} <b>{escape(value)}</b>" for name, value in (facts or {}).items())
    header = f"<header><h1>Search and recommendation from one model</h1><p>{told}</p></header><nav>{links}</nav>"
    return page.document("gemst report", [header, _cards(metrics, layers), *sections])


def markdown(metrics: dict[str, Any]) -> str:
    """The result in one Markdown table, with the drift and the counts under it."""
    lines = [
        "| | recommendation NDCG@10 | Hit@10 | search NDCG@10 | Hit@10 | joint |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    rankers = _rankers(metrics)
    best = {task: max((by[task]["ndcg@10"] for by in rankers.values() if task in by), default=0.0) for task in TASKS}
    top_joint = max(by["joint"] for by in rankers.values())
    for name, by_task in rankers.items():
        cells = []
        for task in TASKS:
            if task in by_task:
                value = by_task[task]["ndcg@10"]
                cells += [_bold(value, value == best[task]), f"{by_task[task]['hit@10']:.4f}"]
            else:
                cells += ["", ""]
        cells.append(_bold(by_task["joint"], by_task["joint"] == top_joint))
        lines.append(f"| {f'**{name}**' if name == 'model' else name} | " + " | ".join(cells) + " |")
    counts, drift = metrics.get("counts", {}), metrics.get("drift", {})
    lines += ["", f"Full ranking of {counts.get('items', 0):,} items for {counts.get('test', 0):,} test examples."]
    if drift:
        lines[-1] += (
            f" Perplexity on general text {drift['perplexity_before']:.2f} → {drift['perplexity_after']:.2f}"
            f" ({drift['rise']:+.2%}), KL to the backbone {drift['kl']:.4f} nats per token."
        )
    return "\n".join(lines) + "\n"


def _about(metrics: dict[str, Any]) -> str:
    counts = metrics.get("counts", {})
    again = counts.get("test_met_again", 0)
    left_out = "no item is left out"
    if metrics.get("exclude_seen", True):
        left_out = "items of the user's past are left out for all alike"
        if again:
            left_out += f", except in the {again:,} of {counts['test']:,} examples with a target met before"
    return (
        f"Every ranker sorts the whole catalogue; {left_out}. NDCG's ideal and MAP's denominator count all relevant "
        "items. Joint: harmonic mean of the two NDCG@10. Intervals are 95 % bootstrap intervals over users; "
        "differences are paired by query."
    )


def _rankers(metrics: dict[str, Any]) -> dict[str, Any]:
    model = {"model": metrics["model"]} if "model" in metrics else {}
    return model | metrics.get("references", {})


def _bold(value: float, best: bool) -> str:
    return f"**{value:.4f}**" if best else f"{value:.4f}"


def _cards(metrics: dict[str, Any], layers: pl.DataFrame) -> str:
    model, cards = metrics.get("model", {}), []
    if "joint" in model:
        told = "harmonic mean of both NDCG@10" if all(task in model for task in TASKS) else "NDCG@10 of the one task"
        cards.append(page.card("Joint", f"{model['joint']:.4f}", told))
    for task in TASKS:
        if task in model:
            low, high = metrics.get("intervals", {}).get("model", {}).get(task, (None, None))
            interval = "NDCG@10" + ("" if low is None else f", 95 %: {low:.3f} to {high:.3f}")
            cards.append(page.card(task.capitalize(), f"{model[task]['ndcg@10']:.4f}", interval))
    drift = metrics.get("drift", {})
    if drift:
        detail = f"{drift['perplexity_before']:.2f} → {drift['perplexity_after']:.2f} on general text"
        cards.append(page.card("Perplexity change", f"{drift['rise']:+.2%}", detail))
    known = layers["leak"].drop_nulls().drop_nans() if "leak" in layers.columns else pl.Series([])
    if len(known):
        cards.append(
            page.card("Largest leak", f"{float(known.to_numpy().max()):.1e}", "of a layer's update onto general text")
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def _verdict(metrics: dict[str, Any]) -> str:
    """One sentence per task: how the model stands to the best reference, and whether that is more than noise."""
    sentences = []
    for task in TASKS:
        values = {name: by[task]["ndcg@10"] for name, by in metrics.get("references", {}).items() if task in by}
        if not values or task not in metrics.get("model", {}):
            continue
        best = max(values, key=lambda name: values[name])
        line = metrics.get("paired", {}).get(best, {}).get(task)
        if line is None:
            continue
        low, high = line["difference_low"], line["difference_high"]
        word = "above" if low > 0 else "below" if high < 0 else "not distinguishable from"
        sentences.append(
            f"{task.capitalize()}: {word} the best reference, {best} "
            f"(difference {line['difference']:+.4f}, 95 % interval {low:+.4f} to {high:+.4f})."
        )
    return " ".join(sentences)


def _table(metrics: dict[str, Any]) -> str:
    rankers = _rankers(metrics)
    parts = []
    for task in TASKS:
        measured = {name: by[task] for name, by in rankers.items() if task in by}
        if not measured:
            continue
        names = [name for name in _SHOWN if all(name in values for values in measured.values())]
        best = {name: max(values[name] for values in measured.values()) for name in names}
        rows: list[list[Cell]] = [
            [ranker, *((f"{values[name]:.4f}", "best" if values[name] == best[name] else "") for name in names)]
            for ranker, values in sorted(measured.items(), key=lambda pair: -pair[1][names[0]])
        ]
        parts.append(
            f"<div><h3>{task.capitalize()}</h3>{page.table(['', *(n.upper() for n in names)], rows, 'model')}</div>"
        )
    return page.pair(*parts)


def _paired(metrics: dict[str, Any]) -> str:
    rows: list[list[Cell]] = []
    for name, by_task in metrics.get("paired", {}).items():
        row: list[Cell] = [name]
        for task in (*TASKS, "joint"):
            line = by_task.get(task)
            if line is None:
                row.append("")
                continue
            low, high = line["difference_low"], line["difference_high"]
            css = "good" if low > 0 else "bad" if high < 0 else ""
            row.append((f"{line['difference']:+.4f}  [{low:+.4f}, {high:+.4f}]", css))
        rows.append(row)
    if not rows:
        return ""
    return "<h3>Model minus reference, NDCG@10, paired</h3>" + page.table(["", *TASKS, "joint"], rows)


def _memory(fits: Sequence[Fit]) -> str:
    rows: list[list[Cell]] = [
        [
            fit.case, f"{fit.examples:,}", f"{fit.before:.4f}", f"{fit.after:.4f}",
            *(f"{weight:.2f}" for weight in fit.weights),
        ]
        for fit in fits
    ]  # fmt: skip
    header = ["", "examples", "model alone", "with counts", *(f"weight: {name}" for name in FEATURES)]
    return page.table(header, rows) if rows else ""


def _protocol(name: str, part: dict[str, Any]) -> str:
    rows: list[list[Cell]] = [
        [ranker, *(f"{by[task]['ndcg@10']:.4f}" if task in by else "" for task in TASKS)]
        for ranker, by in _rankers(part).items()
    ]
    return f"<h3>{escape(name)}: NDCG@10</h3>" + page.table(["", *TASKS], rows, "model")


def _knowledge(drift: dict[str, float]) -> str:
    if not drift:
        return ""
    rows: list[list[Cell]] = [
        [
            "Perplexity", f"{drift['perplexity_before']:.3f}", f"{drift['perplexity_after']:.3f}",
            (f"{drift['rise']:+.2%}", "bad" if drift["rise"] > 0.005 else "good"),
        ],
    ]  # fmt: skip
    if drift.get("cloze_questions"):
        before, after = drift["cloze_before"], drift["cloze_after"]
        label = f"Cloze, right of {drift['cloze_questions']:,.0f} (chance 10 %)"
        rows.append([label, f"{before:.1%}", f"{after:.1%}", f"{100 * (after - before):+.1f} points"])
    rows.append(["KL(backbone || tuned), nats per token", "0", f"{drift['kl']:.5f}", ""])
    if "item_mass" in drift:
        rows.append(["Probability of item tokens in general text", "0", f"{drift['item_mass']:.2%}", ""])
    return page.table(["", "backbone", "tuned", "change"], rows)


def _subspaces(layers: pl.DataFrame) -> str:
    figures = [
        page.figure(plots.energy(layers), "Captured gradient energy over steps"),
        page.figure(plots.leaks(layers), "Leak certificate by layer"),
    ]
    return page.pair(*figures)


def _examples(task: str, examples: list[Example], depth: int) -> str:
    if not examples:
        return ""
    parts = []
    for number, example in enumerate(examples, 1):
        place = f"target at rank {min(example.places)}" if example.places else f"target not in the top {depth}"
        css = "hit" if example.places and min(example.places) <= 10 else "miss"
        asked = f"“{example.query}”" if example.query is not None else f"after {(example.history or ['nothing'])[-1]}"
        history = "".join(f"<li>{escape(title)}</li>" for title in example.history)
        answer = "".join(
            f"<li{' class=hit' if target else ''}>{escape(title)}</li>" for title, target in example.answer
        )
        parts.append(
            f"<details{' open' if number <= 2 else ''}><summary><span class=q>{escape(asked)}</span> → "
            f"{escape(', '.join(example.targets))} <span class={css}>({place})</span></summary><div class=example>"
            f"<div><h4>HISTORY, OLDEST FIRST</h4><ul>{history}</ul></div>"
            f"<div><h4>THE MODEL'S TOP TEN</h4><ol>{answer}</ol></div></div></details>"
        )
    return f"<h3>{task.capitalize()}</h3>" + "".join(parts)


def _counts(metrics: dict[str, Any]) -> str:
    rows: list[list[Cell]] = [
        [name.replace("_", " "), f"{value:,}"] for name, value in metrics.get("counts", {}).items()
    ]
    seconds: list[list[Cell]] = [[name, f"{value:,.1f}"] for name, value in metrics.get("seconds", {}).items()]
    left = page.table(["counted", "number"], rows) if rows else ""
    right = page.table(["took", "seconds"], seconds) if seconds else ""
    return page.pair(f"<div>{left}</div>", f"<div>{right}</div>")

"""The figure of a study: what every way to tune brought, against what it cost in general knowledge."""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING, Any

from gemst.evaluation import study as studies
from gemst.evaluation.metrics import harmonic_mean
from gemst.evaluation.plots import INK, MUTED, OTHER, as_svg, axes_grid
from gemst.evaluation.significance import JOINT
from gemst.evaluation.study import HEADLINE, Cell, Study, Table
from gemst.prompts import TASKS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = ("#3452d9", "#d9661f", "#1f9d6b", "#8a4fd9", "#c2a51d", "#c63f6d")
_LEAST = 1e-5  # nats: a model that forgot less stands there


def quality_and_drift(study: Study, table: Table, data: str) -> str:
    """SVG: KL from the backbone (nats per token, log scale) across, NDCG@10 up, one panel per task and the joint score.

    Every tested cell of the table's two-task methods is a point, trials included: a full one has the settings that
    validation chose, a hollow one others. The best reference ranker is a dashed line. Empty without two such methods.
    """
    cells = points(study, table, data)
    if len(cells) < 2:
        return ""

    def draw(figure: Figure) -> None:
        every = axes_grid(figure, 1, 3)
        for axes, part in zip(every, (*TASKS, JOINT), strict=True):
            for colour, (name, found) in zip(cycle(_COLOURS), cells.items(), strict=False):
                for chosen in (False, True):
                    shown = [one for one, is_chosen in found if is_chosen == chosen]
                    axes.scatter(
                        [max(one["drift"]["kl"], _LEAST) for one in shown],
                        [_score(one["test"], part) for one in shown], s=46, color=colour if chosen else "none",
                        edgecolor=colour, linewidth=1.5, zorder=3, label=study.methods[name].label if chosen else None,
                    )  # fmt: skip
            _best_reference(axes, next(iter(cells.values()))[0][0]["references"], part)
            axes.set(xscale="log", title=part.capitalize(), xlabel="KL from the backbone, nats per token")
        every[0].set_ylabel(f"test {HEADLINE.upper()}")
        handles, labels = every[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), labelcolor=INK)

    return as_svg(draw, 13, 4.4, transparent=False)


def points(study: Study, table: Table, data: str) -> dict[str, list[tuple[dict[str, Any], bool]]]:
    """Results by method of the cells tested on both tasks and for drift, and whether theirs are the settings chosen."""
    by_method = {}
    for method in table.methods:
        finals = [studies.final(study, table, data, method, seed) for seed in table.seeds]
        cells: dict[str, tuple[Cell, bool]] = {cell.name: (cell, True) for cell in finals if cell is not None}
        if study.methods[method].like is None and data not in study.tried_on:
            for cell in studies.trials(study, data, method, table.seeds[0]):
                cells.setdefault(cell.name, (cell, False))
        found = [(studies.result(study, cell), chosen) for cell, chosen in cells.values()]
        whole = [(one, chosen) for one, chosen in found if one and _is_whole(one)]
        if whole:
            by_method[method] = whole
    return by_method


def _is_whole(found: dict[str, Any]) -> bool:
    tested = set(TASKS) <= set(found.get("test", {}))
    return tested and "drift" in found and found["params"]["tuning.tasks"] == "both"


def _score(by: dict[str, Any], part: str) -> float:
    return harmonic_mean([by[task][HEADLINE] for task in (TASKS if part == JOINT else (part,))])


def _best_reference(axes: Axes, references: dict[str, Any], part: str) -> None:
    scores = {name: _score(by, part) for name, by in references.items()}
    best = max(scores, key=lambda name: scores[name])
    axes.axhline(scores[best], color=OTHER, linestyle="--", linewidth=1.2, zorder=1)
    axes.annotate(
        best, (1, scores[best]), (-2, 3), xycoords=("axes fraction", "data"), textcoords="offset points", ha="right",
        color=MUTED, fontsize=9,
    )  # fmt: skip

"""The figures of a report, each as SVG text."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID, MODEL_COLOUR, OTHER = "#1b2430", "#667085", "#e6e9ef", "#3452d9", "#a3adbd"
TASK_COLOURS = {"recommendation": "#3452d9", "search": "#d9661f", "joint": "#1b2430"}
_STYLE: Any = {
    "font.size": 10, "font.family": "sans-serif", "axes.edgecolor": "#c5cbd6", "axes.labelcolor": MUTED,
    "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False, "xtick.color": MUTED, "ytick.color": MUTED, "text.color": INK, "axes.grid": True,
    "grid.color": GRID, "grid.linewidth": 0.8, "axes.axisbelow": True, "legend.frameon": False, "svg.hashsalt": "gemst",
    "figure.constrained_layout.use": True, "axes.titlepad": 10, "xtick.major.size": 0, "ytick.major.size": 0,
}  # fmt: skip


def metrics_with_intervals(metrics: dict[str, Any]) -> str:
    """NDCG@10 of every ranker with its 95 % interval, one panel per task, best on top."""
    rankers = {"model": metrics.get("model", {}), **metrics.get("references", {})}
    tasks = [task for task in ("recommendation", "search") if any(task in by_task for by_task in rankers.values())]

    def draw(figure: Figure) -> None:
        for axes, task in zip(axes_grid(figure, 1, len(tasks)), tasks, strict=True):
            found = {name: by_task[task]["ndcg@10"] for name, by_task in rankers.items() if task in by_task}
            order = sorted(found, key=lambda name: found[name])
            for at, name in enumerate(order):
                colour = TASK_COLOURS[task] if name == "model" else OTHER
                low, high = metrics.get("intervals", {}).get(name, {}).get(task, [found[name]] * 2)
                axes.plot(
                    [low, high], [at, at], color=colour, linewidth=3 if name == "model" else 2, solid_capstyle="round"
                )
                axes.plot(found[name], at, "o", color=colour, markersize=8, markeredgecolor="white")
                axes.annotate(
                    f"{found[name]:.4f}", (max(high, found[name]), at), (7, 0), textcoords="offset points", va="center",
                    color=colour if name == "model" else MUTED, fontweight="bold" if name == "model" else "normal",
                )  # fmt: skip
            axes.set_yticks(range(len(order)), order)
            _embolden(axes, "model")
            axes.set(title=f"{task.capitalize()}: NDCG@10, full catalogue", ylim=(-0.6, len(order) - 0.4))
            axes.set_xlim(0, axes.get_xlim()[1] * 1.15)
            axes.grid(False, axis="y")

    return as_svg(draw, 10.5, 0.9 + 0.36 * len(rankers))


def slices(metrics: dict[str, Any], task: str) -> str:
    """NDCG@10 by slice of one task's test set: the model against every reference. Empty where there is no slice."""
    lines = [
        (f"{slice_name} {label}" if slice_name != "history" else f"history {label}", by_ranker)
        for slice_name, by_label in metrics.get("slices", {}).items()
        for label, by_ranker in sorted(by_label.items(), key=lambda pair: _natural(pair[0]))
        if task in by_ranker.get("model", {})
    ]
    if not lines:
        return ""

    def draw(figure: Figure) -> None:
        (axes,) = axes_grid(figure, 1, 1)
        for at, (_, by_ranker) in enumerate(reversed(lines)):
            for name, by_task in by_ranker.items():
                if task in by_task and name != "model":
                    axes.plot(by_task[task]["ndcg@10"], at, "|", color=OTHER, markersize=13, markeredgewidth=2)
            axes.plot(
                by_ranker["model"][task]["ndcg@10"], at, "o", color=TASK_COLOURS[task], markersize=8, clip_on=False
            )
        labels = [f"{label}  (n={by_ranker['model'][task]['queries']:,})" for label, by_ranker in reversed(lines)]
        axes.set_yticks(range(len(lines)), labels)
        axes.set(title=task.capitalize(), xlabel="NDCG@10", ylim=(-0.6, len(lines) - 0.4))
        axes.set_xlim(0, max(axes.get_xlim()[1], 0.01))
        axes.grid(False, axis="y")

    return as_svg(draw, 5.2, 0.9 + 0.36 * len(lines))


_PANELS = (  # title, pattern of the names, unit, whether it is noise that wants a running mean
    ("Training loss", r"^train/loss", "nats per target", True),
    ("Validation NDCG@10", r"^valid/", "", False),
    ("Gates", r"^gate/", "weight", False),
    ("Gradient cosine of the tasks, mean over layers", r"^cosine/", "", False),
    ("Captured gradient energy", r"^energy/", "share", False),
    ("Learning rate", r"^lr", "", False),
    ("Throughput", r"^tokens_per_s$", "tokens/s", True),
    ("Gradient norm", r"^train/gradient_norm$", "", True),
)


def curves(table: pl.DataFrame) -> str:
    """Training curves (columns step, name, value) in small panels, one per kind; empty where nothing was logged."""
    names = table["name"].unique().sort().to_list()
    panels = [
        (title, [name for name in names if re.search(pattern, name)], unit, noisy)
        for title, pattern, unit, noisy in _PANELS
    ]
    panels = [panel for panel in panels if panel[1]]
    if not panels:
        return ""
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)

    def draw(figure: Figure) -> None:
        every = axes_grid(figure, rows, columns)
        for axes, (title, members, unit, noisy) in zip(every, panels, strict=False):
            for number, name in enumerate(members):
                line = table.filter(pl.col("name") == name).sort("step").drop_nans("value")
                steps, values = line["step"].to_numpy(), line["value"].to_numpy()
                colour = _colour(name, number)
                if noisy and len(values) > 60:  # noise as a veil, its running mean as the line
                    axes.plot(steps, values, color=colour, alpha=0.18, linewidth=0.8)
                    values = line["value"].ewm_mean(half_life=len(values) / 40).to_numpy()
                axes.plot(
                    steps,
                    values,
                    color=colour,
                    linewidth=1.8,
                    label=name.split("/", 1)[-1],
                    marker="o" if len(values) < 30 else None,
                    markersize=3.5,
                )
            axes.set(title=title, xlabel="step", ylabel=unit)
            if len(members) > 1:
                axes.legend(fontsize=9)
        for axes in every[len(panels) :]:
            axes.set_visible(False)

    return as_svg(draw, 10.5, 2.7 * rows)


def conflict(table: pl.DataFrame) -> str:
    """Heat maps of the tasks' gradient cosine over time: by layer and by kind of weight; empty without them."""
    if "cosine" not in table.columns or "step" not in table.columns:
        return ""
    parts = _placed(table.drop_nulls("cosine").drop_nans("cosine"))
    if not len(parts):
        return ""

    def draw(figure: Figure) -> None:
        import matplotlib.pyplot as plt

        spread = max(0.05, float(parts["cosine"].abs().quantile(0.98) or 0))
        image = None
        for axes, (title, key) in zip(
            axes_grid(figure, 1, 2, [3, 2]), (("By layer", "layer"), ("By kind of weight", "kind")), strict=True
        ):
            grid = parts.group_by(key, "step").agg(pl.col("cosine").mean(), pl.col("order").min())
            labels = grid.group_by(key).agg(pl.col("order").min()).sort("order", key)[key].to_list()
            steps = grid["step"].unique().sort()
            rows = grid[key].replace_strict(labels, range(len(labels)), return_dtype=pl.Int64).to_numpy()
            cells = np.full((len(labels), len(steps)), np.nan)
            cells[rows, np.searchsorted(steps.to_numpy(), grid["step"].to_numpy())] = grid["cosine"].to_numpy()
            image = axes.imshow(
                cells, cmap=plt.get_cmap("RdBu"), vmin=-spread, vmax=spread, aspect="auto", interpolation="nearest"
            )
            step = max(1, len(labels) // 15)
            axes.set_yticks(range(0, len(labels), step), labels[::step])
            at = np.unique(np.linspace(0, len(steps) - 1, min(6, len(steps))).round().astype(int))
            axes.set_xticks(at, [str(steps[int(place)]) for place in at])
            axes.set(title=title, xlabel="step")
            axes.grid(False)
        if image is not None:
            figure.colorbar(image, ax=figure.axes, label="cosine: red conflicts, blue agrees", shrink=0.9, pad=0.01)

    return as_svg(draw, 10.5, 4.2)


def energy(table: pl.DataFrame) -> str:
    """Share of the gradient's energy that the bases capture over time: median and middle half over the layers."""
    names = [
        name for name in table.columns if name.startswith("energy_") and table[name].drop_nulls().drop_nans().len()
    ]
    if not names or "step" not in table.columns:
        return ""

    def draw(figure: Figure) -> None:
        (axes,) = axes_grid(figure, 1, 1)
        for number, name in enumerate(names):
            kind = name.removeprefix("energy_")
            band = (
                table.drop_nulls(name).drop_nans(name).group_by("step")
                .agg(low=pl.col(name).quantile(0.25), mid=pl.col(name).median(), high=pl.col(name).quantile(0.75))
                .sort("step")
            )  # fmt: skip
            colour = _colour(f"energy/{kind}", number)
            axes.fill_between(band["step"], band["low"], band["high"], color=colour, alpha=0.15, linewidth=0)
            axes.plot(band["step"], band["mid"], color=colour, linewidth=1.8, label=kind)
        axes.set(title="Gradient energy inside the bases", xlabel="step", ylabel="share", ylim=(0, 1.02))
        axes.legend(fontsize=9)

    return as_svg(draw, 5.2, 3.0)


def leaks(table: pl.DataFrame) -> str:
    """The leak certificate of every tuned weight, by layer, on a log scale; empty where there is none."""
    if "leak" not in table.columns:
        return ""
    known = table.drop_nulls("leak").drop_nans("leak").unique("module", keep="last", maintain_order=True)
    if not len(known):
        return ""
    parts = _placed(known)

    def draw(figure: Figure) -> None:
        (axes,) = axes_grid(figure, 1, 1)
        layers = parts.group_by("layer").agg(pl.col("order").min()).sort("order")["layer"].to_list()
        places = parts["layer"].replace_strict(layers, range(len(layers)), return_dtype=pl.Int64)
        axes.scatter(places, parts["leak"].clip(1e-18), s=14, color=MODEL_COLOUR, alpha=0.5, linewidth=0)
        axes.set_yscale("log")
        step = max(1, len(layers) // 10)
        axes.set_xticks(range(0, len(layers), step), layers[::step])
        axes.set(title="Leak out of the null space", xlabel="layer", ylabel="|dW K| / (|dW| |K|)")

    return as_svg(draw, 5.2, 3.0)


def _placed(table: pl.DataFrame) -> pl.DataFrame:
    """Add layer ("12", "encoder 3", or the module's own name), kind (last part) and order from module names."""
    stack = pl.col("module").str.extract(r"(encoder|decoder)")
    number = pl.col("module").str.extract(r"(?:layers?|blocks?|h)\.(\d+)\.")
    return table.with_columns(
        layer=pl.concat_str(stack, number, separator=" ", ignore_nulls=True)
        .replace("", None)
        .fill_null(pl.col("module")),
        kind=pl.col("module").str.split(".").list.last(),
        order=pl.when(stack == "decoder").then(1000).otherwise(0) + number.cast(pl.Int64).fill_null(0),
    )


def _colour(name: str, number: int) -> str:
    for part, task in (
        ("rec", "recommendation"),
        ("src", "search"),
        ("search", "search"),
        ("joint", "joint"),
        ("sh", "joint"),
    ):
        if name.split("/", 1)[-1].removeprefix("loss_").removeprefix("ndcg10_").startswith(part):
            return TASK_COLOURS[task]
    return (MODEL_COLOUR, "#d9661f", "#1f9d6b", "#8a4fd9", INK)[number % 5]


def _natural(label: str) -> tuple[int, str]:
    found = re.search(r"\d+", label)
    return (int(found.group()) if found else 0, label)


def _embolden(axes: Axes, label: str) -> None:
    for text in axes.get_yticklabels():
        if text.get_text() == label:
            text.set(fontweight="bold", color=INK)


def axes_grid(figure: Figure, rows: int, columns: int, widths: Sequence[float] | None = None) -> list[Axes]:
    """Axes in a grid, row by row; `widths` are the columns' shares."""
    grid: np.ndarray[Any, Any] = figure.subplots(rows, columns, squeeze=False, width_ratios=widths)
    return list(grid.ravel())


def as_svg(draw: Callable[[Figure], None], width: float, height: float, transparent: bool = True) -> str:
    """Draw on a fresh figure of `width` x `height` inches; equal data give equal bytes."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=(width, height))
        FigureCanvasSVG(figure)
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=transparent)
    return buffer.getvalue()

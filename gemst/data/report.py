"""A look at the data before trusting it: one HTML page with plots and no other file."""

from __future__ import annotations

import base64
import html as markup
import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from gemst.data.rules import profile
from gemst.data.tables import RECOMMENDATION, SEARCH, TASKS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {RECOMMENDATION: "#3b6ea5", SEARCH: "#c8693a"}
# up to so many days of log, a bar is that long
_PERIODS = [(3, "1h", "hour"), (90, "1d", "day"), (700, "1w", "week"), (3650, "1mo", "month"), (10**6, "1q", "quarter")]
_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
table{border-collapse:collapse}td,th{padding:.2rem .8rem;text-align:left;border-bottom:1px solid #ddd}
figure{margin:1.5rem 0}img{max-width:100%}figcaption{color:#555}
"""


def html(items: pl.DataFrame, events: pl.DataFrame, origin: dict[str, str] | None = None) -> str:
    """The page for canonical tables: sizes, plots and the commonest queries. Titles and queries are escaped.

    `origin` says where the tables come from and what became of the raw rows, in words; it stands above the plots.
    """
    plots: list[tuple[str, str, Callable[[Axes, pl.DataFrame], None]]] = [
        ("Events over time", "A gap or a cliff is worth a question.", _over_time),
        (
            "History lengths",
            "Users by their number of events. Short histories leave a model little to go by.",
            _lengths,
        ),
        ("Popularity", "Events of each item, most popular first, both axes logarithmic.", _popularity),
        ("Query lengths", "Search events by words in the query.", _queries),
        ("Search and recommendation per user", _overlap_text(events), _overlap),
    ]
    parts = [f"<h1>The data</h1><table>{''.join(_row(*size) for size in _sizes(items, events))}</table>"]
    if origin:
        parts.append(f"<h2>Where it comes from</h2><table>{''.join(_row(*line) for line in origin.items())}</table>")
    for title, caption, draw in plots:
        source = _figure(draw, events)
        parts.append(
            f'<h2>{title}</h2><figure><img alt="{title}" src="{source}"><figcaption>{caption}</figcaption></figure>'
        )
    top = (
        events["query"].drop_nulls().value_counts(sort=True).sort(["count", "query"], descending=[True, False]).head(20)
    )
    parts.append(f"<h2>Commonest queries</h2><table>{''.join(_row(*row) for row in top.iter_rows())}</table>")
    body = "\n".join(parts)
    head = f'<meta charset="utf-8"><title>gemst: the data</title><style>{_STYLE}</style>'
    return f'<!DOCTYPE html><html lang="en"><head>{head}</head><body>{body}</body></html>'


def _sizes(items: pl.DataFrame, events: pl.DataFrame) -> list[tuple[str, object]]:
    facts: dict[str, Any] = profile(items, events)
    met = events["item_id"].n_unique()
    sizes: list[tuple[str, object]] = [("items", facts["items"])]
    sizes.append(("items with an event", f"{met:,} ({met / max(facts['items'], 1):.1%})"))
    if events.is_empty():
        return [*sizes, ("events", 0)]
    tasks = dict(events["task"].value_counts().iter_rows())
    return [
        *sizes,
        ("users", facts["users"]),
        ("events", facts["events"]),
        *((f"{task} events", f"{tasks.get(task, 0):,} ({tasks.get(task, 0) / facts['events']:.1%})") for task in TASKS),
        ("from, to (UTC)", f"{facts['oldest'][:16].replace('T', ' ')}, {facts['newest'][:16].replace('T', ' ')}"),
        ("different queries", events["query"].drop_nulls().n_unique()),
        ("words in a query, mean", f"{facts['query_words'] or 0:.2f}"),
        ("the top item's share of events", f"{facts['top_item_share']:.2%}"),
    ]


def _row(name: object, value: object) -> str:
    shown = f"{value:,}" if isinstance(value, int) else str(value)
    return f"<tr><th>{markup.escape(str(name))}</th><td>{markup.escape(shown)}</td></tr>"


def _figure(draw: Callable[[Axes, pl.DataFrame], None], events: pl.DataFrame) -> str:
    """One plot as a data URI. Matplotlib is imported here: it is slow, and no other stage needs it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.yaxis.set_major_formatter("{x:,.0f}")
    draw(axes, events)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _over_time(axes: Axes, events: pl.DataFrame) -> None:
    """Bars of whole days, weeks, months or quarters: dates that are known to the month alone must not make spikes."""
    oldest: Any = events["timestamp"].min()
    newest: Any = events["timestamp"].max()
    days = (newest - oldest).days if len(events) else 0
    every, unit = next((every, unit) for longest, every, unit in _PERIODS if days <= longest)
    counts = events.select("task", start=pl.col("timestamp").dt.truncate(every)).group_by("task", "start").len()
    if len(counts):
        first: Any = counts["start"].min()
        edges = pl.datetime_range(first, newest, every, time_unit="ms", time_zone="UTC", eager=True)
        ends = pl.concat([edges, edges.tail(1).dt.offset_by(every)])
        for task in TASKS:
            mine = edges.to_frame("start").join(counts.filter(task=task), on="start", how="left", maintain_order="left")
            heights = mine["len"].fill_null(0).to_numpy()
            axes.stairs(heights, ends.dt.replace_time_zone(None).to_numpy(), label=task, color=_COLOURS[task])
        axes.legend(frameon=False)
    axes.set_ylabel(f"events per {unit}")


def _lengths(axes: Axes, events: pl.DataFrame) -> None:
    lengths = events.group_by("user_id").len()["len"].to_numpy()
    most = int(lengths.max(initial=1))
    edges = sorted({*np.geomspace(1, most + 1, 40).round().tolist()})
    axes.hist(lengths, bins=edges, color="#666")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel(f"events of a user (median {np.median(lengths) if len(lengths) else 0:.0f})")
    axes.set_ylabel("users")


def _popularity(axes: Axes, events: pl.DataFrame) -> None:
    for task in TASKS:
        counts = events.filter(pl.col("task") == task).group_by("item_id").len()["len"].sort(descending=True).to_numpy()
        if len(counts):
            rank = np.unique(np.geomspace(1, len(counts), 500).astype(int))
            axes.loglog(rank, counts[rank - 1], label=task, color=_COLOURS[task])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("rank of the item")
    axes.set_ylabel("events")
    axes.legend(frameon=False)


def _queries(axes: Axes, events: pl.DataFrame) -> None:
    words = events["query"].drop_nulls().str.split(" ").list.len().clip(upper_bound=20).to_numpy()
    axes.hist(words, bins=[n + 0.5 for n in range(21)], color=_COLOURS[SEARCH])
    axes.set_xticks([1, *range(5, 21, 5)], ["1", "5", "10", "15", "20+"])
    axes.set_xlabel("words")
    axes.set_ylabel("search events")


def _overlap(axes: Axes, events: pl.DataFrame) -> None:
    share = events.group_by("user_id").agg((pl.col("task") == SEARCH).mean())["task"].to_numpy()
    axes.hist(share, bins=[n / 20 for n in range(21)], color="#666")
    axes.set_xlabel("share of a user's events that are searches")
    axes.set_ylabel("users")


def _overlap_text(events: pl.DataFrame) -> str:
    tasks = events.group_by("user_id").agg(pl.col("task").n_unique())
    items = events.group_by("user_id", "item_id").agg(pl.col("task").n_unique())
    both, shared = (float(np.mean(counts["task"].to_numpy() == 2)) for counts in (tasks, items))
    return f"{both:.1%} of the users use both. Of the items that a user met, {shared:.1%} were met in both."

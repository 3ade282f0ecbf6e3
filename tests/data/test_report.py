from __future__ import annotations

import base64
import re
from html.parser import HTMLParser

import pytest

from gemst.data import report
from tests.data.conftest import events_table, items_table


def test_page_has_every_plot_and_escapes_what_users_wrote():
    rows = [(f"u{n % 9}", f"i{n % 5}", n, "<b>red</b> & blue" if n % 2 else None) for n in range(80)]
    page = report.html(items_table(*(f"i{n}" for n in range(5))), events_table(*rows))
    images = re.findall(r'alt="([^"]+)" src="data:image/png;base64,([^"]+)"', page)
    assert [alt for alt, _ in images] == [
        "Events over time", "History lengths", "Popularity", "Query lengths", "Search and recommendation per user",
    ]  # fmt: skip
    assert all(base64.b64decode(data).startswith(b"\x89PNG") for _, data in images)
    assert "<b>" not in page
    assert "&lt;b&gt;red&lt;/b&gt; &amp; blue</th><td>40</td>" in page
    assert "http" not in page  # one file, nothing fetched
    HTMLParser().feed(page)


def test_overlap_is_counted_per_user():
    events = events_table(("u", "a", 0, None), ("u", "a", 1, "q"), ("u", "b", 2, None), ("v", "a", 3, "q"))
    page = report.html(items_table("a", "b"), events)
    assert "50.0% of the users use both" in page
    assert "33.3% were met in both" in page


def test_one_task_alone_and_one_event():
    for rows in ([("u", "a", 0, None)], [("u", "a", n, "q") for n in range(3)]):
        assert report.html(items_table("a"), events_table(*rows)).endswith("</html>")


def test_where_the_data_come_from_stands_on_the_page():
    events = events_table(("u", "a", 0, "q"))
    page = report.html(items_table("a"), events, {"events.query": "proxy: the <tag>"})
    assert "<tr><th>events.query</th><td>proxy: the &lt;tag&gt;</td></tr>" in page
    assert "<tr><th>search events</th><td>1 (100.0%)</td></tr>" in page


@pytest.mark.parametrize(
    ("days", "unit"), [(0, "hour"), (40, "day"), (400, "week"), (2000, "month"), (8000, "quarter")]
)
def test_bars_are_whole_periods_and_hold_every_event(days, unit):
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    report._over_time(axes, events_table(("u", "a", 0, None), ("u", "a", days * 1440, "q"), ("u", "a", 5, None)))
    assert axes.get_ylabel() == f"events per {unit}"
    assert [int(bars.get_data().values.sum()) for bars in axes.patches] == [2, 1]

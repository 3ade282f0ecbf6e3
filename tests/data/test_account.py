import pytest

from gemst.data import account
from gemst.errors import GemstError


def test_every_row_has_an_end():
    rows_in = {"items": 3, "events": 10, "events: first tag": 5}
    dropped, quarantined = {"events: seen": 4, "items: seen": 1}, {"events: too early": 2}
    assert account.lines(rows_in, {"items": 2, "events": 9}, dropped, quarantined) == [
        "items: 3 rows in = 2 out + 0 in quarantine + 1 dropped",
        "events: 15 rows in = 9 out + 2 in quarantine + 4 dropped",
    ]


def test_a_lost_row_is_an_error():
    with pytest.raises(GemstError, match="events: 1 rows are unaccounted for"):
        account.lines({"events": 10}, {"events": 9}, {})


def test_a_report_belongs_to_the_tables_it_judged():
    ingested = {"rows_in": {"items": 3, "events": 10, "events: recent": 2}, "dropped": {"events: again": 1}}
    assert account.belongs({"rows_in": {"items": 3, "events": 11}}, ingested)
    assert not account.belongs({"rows_in": {"items": 3, "events": 10}}, ingested)

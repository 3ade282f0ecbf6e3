from typer.testing import CliRunner

from gemst import cli
from gemst.config import Data
from gemst.data.preview import preview
from tests.data.conftest import write_recbole


def test_counts_what_would_be_dropped_and_quarantined_and_writes_nothing(tmp_path):
    item = (
        "item_id:token\ttitle:token_seq\tgenre:token_seq\n"
        + "".join(f"{n}\tFilm {n}\tDrama\n" for n in range(12))
        + "99\t\tDrama\n"
    )
    inter = "user_id:token\titem_id:token\ttimestamp:float\n" + "".join(f"u\t{n}\t{881250000 + n}\n" for n in range(12))
    folder = write_recbole(
        tmp_path, item=item, inter=inter + "u\t0\t881250000\nu\t99\t881250001\nu\tgone\t881250001\nu\t1\tsoon\n"
    )
    before = sorted(tmp_path.rglob("*"))
    seen = preview(Data(path=folder))
    assert sorted(tmp_path.rglob("*")) == before
    assert seen.mapping["items.title"] == "title"
    assert seen.items.height == seen.events.height == 10
    assert seen.rows_in == {"items": 13, "events": 16}
    assert seen.dropped == {"events: exact duplicate of another row": 1}
    assert seen.quarantined == {
        "items: title is missing": 1,
        "events: item is not in items": 1,
        "events: its item is in quarantine": 1,
        "events: timestamp is missing or not a time": 1,
    }
    assert seen.rows_out == {"items": 12, "events": 12}
    assert (seen.profile["events"], seen.profile["users"]) == (12, 1)


def test_what_the_command_shows_adds_up(tmp_path, monkeypatch):
    """A stranger's first call: the mapping, what is not used, every row's end, what is left and what is odd."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text(
        "data: {source: table, path: logs, columns: {item_id: sku, title: name, timestamp: at, user_id: who}}\n"
    )
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "items.csv").write_text("sku;name\n1;Soap\n2;Brush\n")
    (tmp_path / "logs" / "events.csv").write_text(
        "who;sku;at;words\n" + "".join(f"u{n};1;2024-01-0{1 + n};soap\n" for n in range(5)) + "u;2;soon;soap\n" * 2
    )
    shown = CliRunner().invoke(cli.app, ["ingest", "--dry-run"])
    assert shown.exit_code == 0, shown.output
    for said in (
        "events.user_id    <- who\n",
        "events.timestamp  <- at (2 of 7 values are no time, such as 'soon')\n",
        "nothing in events <- words\n",
        "2 in quarantine: events: timestamp is missing or not a time\n",
        "items: 2 rows in = 2 out + 0 in quarantine + 0 dropped\n",
        "events: 7 rows in = 5 out + 2 in quarantine + 0 dropped\n",
        "what is left: items 2, events 5, users 5, search_share 0.0,",
        "No event is a search",
    ):
        assert said in shown.output
    assert not (tmp_path / "artifacts").exists()

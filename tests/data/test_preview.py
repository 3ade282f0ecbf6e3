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

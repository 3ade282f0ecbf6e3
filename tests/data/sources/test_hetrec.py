from __future__ import annotations

import polars as pl
import pytest

from gemst.config import Data
from gemst.data import examples, rules, sources
from gemst.errors import GemstError

ARTISTS = "id\tname\turl\tpictureURL\n1\tMALICE MIZER\thttp://a\thttp://b\n2\tMúm\tu\tp\n3\tAir\tu\tp\n"
TAGS = "tagID\ttagValue\n1\tmetal\n2\tchillout\n3\tfran\xe7ais\n".encode("latin-1")
HEADER = "userID\tartistID\ttagID\tday\tmonth\tyear\n"


def lastfm(folder, assignments: str) -> Data:
    (folder / "artists.dat").write_text(ARTISTS, encoding="utf-8")
    (folder / "tags.dat").write_bytes(TAGS)
    (folder / "user_taggedartists.dat").write_text(HEADER + assignments)
    return Data(source="hetrec", path=folder)


def test_tags_are_queries_and_the_first_one_also_a_recommendation(tmp_path):
    loaded = sources.load(lastfm(tmp_path, "7\t1\t1\t1\t4\t2009\n7\t1\t3\t1\t6\t2009\n7\t2\t1\t1\t4\t2009\n"))
    rows = loaded.events.sort("timestamp", "task", "item_id").select(
        "item_id", "task", "query", pl.col("timestamp").dt.month()
    )
    assert rows.rows() == [
        ("1", "recommendation", None, 4), ("2", "recommendation", None, 4),
        ("1", "search", "metal", 4), ("2", "search", "metal", 4), ("1", "search", "français", 6),
    ]  # fmt: skip
    assert loaded.items["categories"].list.len().sum() == 0  # tags would hand over the query
    # Two artists under one tag at one time are two clicks of one request.
    metal = loaded.events.filter(pl.col("query") == "metal")["request_id"]
    assert metal.n_unique() == 1
    assert metal.null_count() == 0


def test_a_tag_given_twice_is_one_whatever_the_order_of_the_file(tmp_path):
    config = lastfm(tmp_path, "7\t1\t1\t1\t4\t2009\n")
    for lines in (b"1\tmetal\n1\tdoom\n", b"1\tdoom\n1\tmetal\n"):
        (tmp_path / "tags.dat").write_bytes(b"tagID\ttagValue\n" + lines)
        assert sources.load(config).events["query"].drop_nulls().to_list() == ["doom"]


def test_the_targets_own_tags_are_in_none_of_its_histories(tmp_path):
    rows = "".join(f"7\t{1 + n % 3}\t{1 + n % 2}\t1\t{1 + n // 2}\t2009\n" for n in range(20))
    loaded = sources.load(lastfm(tmp_path, rows))
    splits = examples.build(loaded.items, loaded.events, Data(), seed=0)
    for table in (splits.train, splits.valid, splits.test):
        for row in table.filter(pl.col("task") == "recommendation").to_dicts():
            assert not set(row["history"]) & set(row["targets"])


def test_junk_dates_are_left_for_quarantine_and_start_nothing(tmp_path):
    loaded = sources.load(lastfm(tmp_path, "7\t1\t1\t1\t9\t1956\n7\t1\t2\t1\t6\t2009\n7\t2\t1\t31\t2\t2010\n"))
    assert loaded.rows_in["events"] == 3
    recommendations = loaded.events.filter(pl.col("task") == "recommendation")
    assert recommendations["timestamp"].dt.year().to_list() == [2009]
    marked = rules.mark_items(loaded.events, loaded.items["item_id"], loaded.items["item_id"])
    reasons = rules.judge(marked, rules.event_rules(loaded.events["timestamp"].max()))
    assert sorted(reasons.drop_nulls()) == ["timestamp is before 1990", "timestamp is missing or not a time"]


def test_movielens_layout_with_exact_times(tmp_path):
    (tmp_path / "movies.dat").write_text("id\ttitle\timdbID\tyear\n1\tToy story\t0114709\t1995\n2\tJumanji\t\\N\t\\N\n")
    (tmp_path / "tags.dat").write_text("id\tvalue\n5\tpixar\n")
    (tmp_path / "user_taggedmovies-timestamps.dat").write_text(
        "userID\tmovieID\ttagID\ttimestamp\n75\t1\t5\t1162160236000\n"
    )
    loaded = sources.load(Data(source="hetrec", path=tmp_path))
    assert loaded.items["title"].to_list() == ["Toy story (1995)", "Jumanji"]
    assert loaded.events["query"].to_list() == [None, "pixar"]
    assert loaded.events["timestamp"].dt.epoch("ms").unique().to_list() == [1162160236000]


def test_dates_of_movielens_without_the_timestamps_file(tmp_path):
    (tmp_path / "movies.dat").write_text("id\ttitle\n1\tToy story\n")
    (tmp_path / "tags.dat").write_text("id\tvalue\n5\tpixar\n")
    header = "userID\tmovieID\ttagID\tdate_day\tdate_month\tdate_year\tdate_hour\tdate_minute\tdate_second\n"
    (tmp_path / "user_taggedmovies.dat").write_text(header + "75\t1\t5\t29\t10\t2006\t23\t17\t16\n")
    loaded = sources.load(Data(source="hetrec", path=tmp_path))
    assert loaded.events["timestamp"].dt.date().cast(pl.String).unique().to_list() == ["2006-10-29"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("artists.dat", "id\tlabel\n1\tx\n", "artists.dat lacks the column name"),
        ("tags.dat", "tagID\ttagValue\tmore\n1\ta\tb\n", "has 3 columns"),
        ("user_taggedartists.dat", "userID\ttagID\n1\t2\n", "lacks the column artistID"),
    ],
)
def test_faults_name_the_file_and_column(tmp_path, name, content, message):
    config = lastfm(tmp_path, "7\t1\t1\t1\t4\t2009\n")
    (tmp_path / name).write_text(content)
    with pytest.raises(GemstError, match=message):
        sources.load(config)


def test_neither_data_set(tmp_path):
    with pytest.raises(GemstError, match=r"neither artists\.dat nor movies\.dat"):
        sources.load(Data(source="hetrec", path=tmp_path))


def test_lastfm_2k(shared_data):
    folder = shared_data / "hetrec-lastfm-2k"
    if not folder.is_dir():
        pytest.skip("hetrec-lastfm-2k is absent")
    loaded = sources.load(Data(source="hetrec", path=folder))
    assert loaded.rows_in == {"items": 17_632, "events": 186_479, "events: first tag of an item by a user": 71_062}
    assert loaded.dropped == {}
    assert dict(loaded.events["task"].value_counts().iter_rows()) == {"search": 186_479, "recommendation": 71_062}
    assert loaded.events.filter(pl.col("timestamp") < rules.EARLIEST)["query"].len() == 5
    assert loaded.events.filter(pl.col("task") == "search")["query"].null_count() == 0

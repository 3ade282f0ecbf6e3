from __future__ import annotations

import datetime as dt
import gzip

import polars as pl
import pytest

from gemst.config import Data
from gemst.data import sources
from gemst.errors import GemstError


def write(folder, items: pl.DataFrame, events: pl.DataFrame, kind: str = "parquet") -> None:
    for name, table in (("items", items), ("events", events)):
        getattr(table, f"write_{kind}")(folder / f"{name}.{kind}")


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_own_column_names_and_kinds(tmp_path, kind):
    items = pl.DataFrame({"sku": [7, 8], "title": ["Soap, green", "Brush"], "tags": ["Bath | Soap", None]})
    events = pl.DataFrame(
        {
            "customer": ["c"] * 2,
            "product": [7, 8],
            "at": ["2024-02-29T10:00:00+02:00", "2024-03-01"],
            "words": ["soap", None],
        }
    )
    write(tmp_path, items, events, kind)
    columns = {
        "user_id": "customer",
        "items.item_id": "sku",
        "events.item_id": "product",
        "timestamp": "at",
        "query": "words",
        "categories": "tags",
    }
    loaded = sources.load(Data(source="table", path=tmp_path, columns=columns))
    assert loaded.items["item_id"].to_list() == ["7", "8"]
    assert loaded.items["categories"].to_list() == [["Bath", "Soap"], []]
    assert loaded.events["timestamp"].to_list() == [
        dt.datetime(2024, 2, 29, 8, tzinfo=dt.UTC), dt.datetime(2024, 3, 1, tzinfo=dt.UTC),
    ]  # fmt: skip
    assert loaded.events["task"].to_list() == ["search", "recommendation"]
    assert loaded.mapping["events.user_id"] == "customer"
    assert loaded.mapping["items.text"] == "absent"


MOMENT = dt.datetime(2021, 6, 1, 12, 30, tzinfo=dt.UTC)


@pytest.mark.parametrize(
    "values",
    [
        pl.Series([MOMENT]),
        pl.Series([MOMENT]).dt.replace_time_zone(None),
        pl.Series([MOMENT]).dt.convert_time_zone("Asia/Tokyo"),
        pl.Series([1_622_550_600]),
        pl.Series([1_622_550_600_000]),
        pl.Series([1_622_550_600_000_000]),
        pl.Series([1_622_550_600.0]),
        pl.Series(["1622550600"]),
        pl.Series(["2021-06-01T12:30:00Z"]),
        pl.Series(["2021-06-01 12:30:00"]),
        pl.Series(["2021-06-01T12:30"]),
        pl.Series(["2021-06-01T14:30:00.000+02:00"]),
        pl.Series(["2021-06-01 14:30:00+02"]),
        pl.Series(["2021-06-01 12:30:00 UTC"]),
        pl.Series([" 1622550600 "]),
    ],
)
def test_every_way_to_write_a_time(tmp_path, values):
    events = pl.DataFrame({"user_id": ["u"], "item_id": ["a"], "timestamp": values})
    write(tmp_path, pl.DataFrame({"item_id": ["a"], "title": ["A"]}), events)
    assert sources.load(Data(source="table", path=tmp_path)).events["timestamp"].to_list() == [MOMENT]


def test_days_whose_empty_columns_have_no_type(tmp_path):
    (tmp_path / "events").mkdir()
    pl.DataFrame({"item_id": ["a"], "title": ["A"]}).write_parquet(tmp_path / "items.parquet")
    days = [(None, "ns"), ("soap", "us"), (None, "ms")]
    for number, (query, unit) in enumerate(days):
        day = pl.DataFrame({"user_id": [f"u{number}"], "item_id": ["a"], "timestamp": [MOMENT], "query": [query]})
        lists = pl.Series([["b"]] if query else [[]])  # of no type where all are empty
        day = day.with_columns(pl.col("timestamp").dt.cast_time_unit(unit), shown=lists)
        day.write_parquet(tmp_path / "events" / f"{number}.parquet")
    events = sources.load(Data(source="table", path=tmp_path)).events
    assert events["query"].to_list() == [None, "soap", None]
    assert events["shown"].to_list() == [[], ["b"], []]
    assert events["timestamp"].to_list() == [MOMENT] * 3
    pl.DataFrame({"user_id": [1], "item_id": "a", "timestamp": MOMENT, "query": "q", "shown": [["b"]]}).write_parquet(
        tmp_path / "events" / "3.parquet"
    )
    with pytest.raises(GemstError, match=r"3.parquet has the columns user_id \(Int64\)"):
        sources.load(Data(source="table", path=tmp_path))


def test_canonical_tables_come_back_as_they_are(tmp_path):
    items = pl.DataFrame({"item_id": ["a"], "title": ["A"], "text": ["words"], "categories": [["X", "Y"]]})
    events = pl.DataFrame(
        {
            "user_id": ["u"], "item_id": ["a"], "timestamp": [MOMENT], "task": ["search"], "query": ["q"],
            "request_id": ["r"], "shown": [["b", "c"]],
        }
    )  # fmt: skip
    write(tmp_path, items, events)
    loaded = sources.load(Data(source="table", path=tmp_path))
    assert loaded.items.to_dicts() == items.to_dicts()
    assert loaded.events.to_dicts() == events.to_dicts()


@pytest.mark.parametrize(
    "vectors",
    [
        pl.Series([[0.5, 1.0], [2.0, -1.0]]),
        pl.Series([[0.5, 1.0], [2.0, -1.0]], dtype=pl.Array(pl.Float64, 2)),
        pl.Series(["0.5 | 1", "2|-1e0"]),
    ],
)
def test_own_item_vectors_come_along(tmp_path, vectors):
    items = pl.DataFrame({"item_id": ["a", "b"], "title": ["A", "B"], "vector": vectors})
    write(tmp_path, items, pl.DataFrame({"user_id": ["u"], "item_id": ["a"], "timestamp": [MOMENT]}))
    loaded = sources.load(Data(source="table", path=tmp_path, columns={"embedding": "vector"})).items
    assert loaded.schema["embedding"] == pl.List(pl.Float32)
    assert loaded["embedding"].to_list() == [[0.5, 1.0], [2.0, -1.0]]
    assert "embedding" not in sources.load(Data(source="table", path=tmp_path)).items.columns


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"user": "customer"}, "maps 'user', which is no column"),
        ({"user_id": "customer"}, r"no column customer \(for user_id\).*events\.user_id: user_id\}"),
    ],
)
def test_mapping_that_leads_nowhere(tmp_path, columns, message):
    events = pl.DataFrame({"user_id": ["u"], "item_id": ["a"], "timestamp": [MOMENT]})
    write(tmp_path, pl.DataFrame({"item_id": ["a"], "title": ["A"]}), events)
    with pytest.raises(GemstError, match=message):
        sources.load(Data(source="table", path=tmp_path, columns=columns))


def test_order_and_growth_of_the_log_do_not_change_the_bytes(tmp_path):
    """An ingest of grown logs equals an ingest from scratch, whatever order the rows came in."""
    from gemst.data import tables

    items = pl.DataFrame({"item_id": [f"i{n}" for n in range(9)], "title": ["T"] * 9})
    events = pl.DataFrame(
        {
            "user_id": [f"u{n % 5}" for n in range(200)],
            "item_id": [f"i{n * n % 9}" for n in range(200)],
            "timestamp": [1_600_000_000 + n % 17 for n in range(200)],
        }
    )
    written = []
    for name, table in (
        ("scratch", events),
        ("grown", pl.concat([events[120:], events[:120]])),
        ("mixed", events.sample(fraction=1, shuffle=True, seed=1)),
    ):
        folder = tmp_path / name
        folder.mkdir()
        write(folder, items.reverse() if name == "mixed" else items, table)
        loaded = sources.load(Data(source="table", path=folder))
        tables.write_events(loaded.events, folder / "out" / "events.parquet")
        tables.write_items(loaded.items, folder / "out" / "items.parquet")
        written.append([(folder / "out" / f"{t}.parquet").read_bytes() for t in ("items", "events")])
    assert written[0] == written[1] == written[2]


def test_a_missing_mapping_is_written_for_the_user(tmp_path):
    write(
        tmp_path,
        pl.DataFrame({"SKU": ["a"], "product_name": ["A"], "price": ["3"]}),
        pl.DataFrame({"customer_id": ["u"], "product": ["a"], "x": ["2024-01-01"]}),
        "csv",
    )
    with pytest.raises(GemstError) as fault:
        sources.load(Data(source="table", path=tmp_path))
    assert fault.value.fix.endswith(
        "data.columns: {items.item_id: SKU, items.title: product_name, events.user_id: customer_id, "
        "events.item_id: product, events.timestamp: YOURS}"
    )


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
def test_separator_is_told_by_the_header(tmp_path, mark):
    lines = [["item_id", " title "], ["a", "Soap"]], [["user_id", "item_id", "timestamp"], ["u", "a", "2024-01-01"]]
    for name, rows in zip(("items.tsv", "events.csv"), lines, strict=True):
        (tmp_path / name).write_text("".join(mark.join(row) + "\r\n" for row in rows))
    loaded = sources.load(Data(source="table", path=tmp_path))
    assert loaded.items["title"].to_list() == ["Soap"]
    assert loaded.events.height == 1


def test_a_log_in_parts(tmp_path):
    """A folder of daily files is one table: a new day is a new file."""
    (tmp_path / "items.csv").write_text("item_id,title\na,A\n")
    (tmp_path / "events").mkdir()
    for day in (1, 2):
        content = f"user_id,item_id,timestamp\nu,a,2024-01-0{day}\n".encode()
        (tmp_path / "events" / f"{day}.csv.gz").write_bytes(gzip.compress(content))
    assert sources.load(Data(source="table", path=tmp_path)).rows_in["events"] == 2
    (tmp_path / "events" / "3.csv").write_text("user_id,timestamp\nu,2024-01-03\n")
    with pytest.raises(
        GemstError, match=r"3\.csv has the columns user_id, timestamp, but those before it have user_id, item"
    ):
        sources.load(Data(source="table", path=tmp_path))
    (tmp_path / "events.csv").write_text("user_id,item_id,timestamp\nu,a,2024-01-01\n")
    with pytest.raises(GemstError, match=r"both events\.csv and events/"):
        sources.load(Data(source="table", path=tmp_path))


def test_no_time_can_be_read(tmp_path):
    events = pl.DataFrame({"user_id": ["u"] * 2, "item_id": ["a"] * 2, "timestamp": ["31/01/2024 10:00"] * 2})
    write(tmp_path, pl.DataFrame({"item_id": ["a"], "title": ["A"]}), events)
    with pytest.raises(
        GemstError, match=r"2 of 2 values are no time, such as '31/01/2024 10:00'.*Write times as 2024-"
    ):
        sources.load(Data(source="table", path=tmp_path))


@pytest.mark.parametrize("kind", ["parquet", "csv"])
@pytest.mark.parametrize("blank", ["", " "])
def test_a_blank_query_request_or_text_is_none(tmp_path, kind, blank):
    items = pl.DataFrame({"item_id": ["a"], "title": ["Soap"], "text": [blank]})
    events = pl.DataFrame(
        {"user_id": ["u"] * 3, "item_id": ["a"] * 3, "timestamp": [1, 2, 3], "query": [blank, "soap", blank],
         "request_id": [blank] * 3}
    )  # fmt: skip
    write(tmp_path, items, events, kind)
    loaded = sources.load(Data(source="table", path=tmp_path))
    assert loaded.events["task"].to_list() == ["recommendation", "search", "recommendation"]
    assert loaded.events["query"].to_list() == [None, "soap", None]
    assert loaded.events["request_id"].null_count() == 3
    assert loaded.items["text"].to_list() == [None]


@pytest.mark.parametrize("null", ["NULL", "\\N"])
def test_what_databases_write_for_null_is_none_in_a_csv(tmp_path, null):
    (tmp_path / "items.csv").write_text(f"item_id,title,text\n1,Null,{null}\n")
    (tmp_path / "events.csv").write_text(
        f"user_id,item_id,timestamp,query\nu,1,2024-01-01,{null}\n{null},1,2024-01-02,a\n"
    )
    loaded = sources.load(Data(source="table", path=tmp_path))
    assert loaded.items.select("title", "text").rows() == [("Null", None)]
    assert set(loaded.events.select("user_id", "task", "query").rows()) == {
        ("u", "recommendation", None), (None, "search", "a"),
    }  # fmt: skip


@pytest.mark.parametrize("printed", ["['Bath', 'Care']", '["Bath"]', "[1, 2.5]", " [] "])
def test_printed_lists_are_refused(tmp_path, printed):
    items = pl.DataFrame({"item_id": ["1", "2"], "title": ["A", "B"], "categories": ["[new] Bath", printed]})
    events = pl.DataFrame({"user_id": ["u"], "item_id": ["1"], "timestamp": [MOMENT]})
    write(tmp_path, items, events)
    with pytest.raises(
        GemstError, match=r"column 'categories' holds printed lists, such as ['\"].*Separate its values by \|"
    ):
        sources.load(Data(source="table", path=tmp_path))
    write(tmp_path, items.with_columns(categories=pl.Series(["[new] Bath", "[sale] | Care"])), events)
    loaded = sources.load(Data(source="table", path=tmp_path))
    assert loaded.items["categories"].to_list() == [["[new] Bath"], ["[sale]", "Care"]]


def test_fractions_of_seconds_and_nanoseconds_are_times(tmp_path):
    items = pl.DataFrame({"item_id": ["a"], "title": ["Soap"]})
    times = ["1600000000.75", "1600000000.25", "1600000000", "1600000000500000000", "1600000000100.0"]
    events = pl.DataFrame({"user_id": [f"u{n}" for n in range(5)], "item_id": ["a"] * 5, "timestamp": times})
    write(tmp_path, items, events)
    read = sources.load(Data(source="table", path=tmp_path)).events["timestamp"].dt.epoch("ms").to_list()
    assert [time - 1_600_000_000_000 for time in read] == [750, 250, 0, 500, 100]


def test_an_optional_column_that_is_mapped_has_to_be_there(tmp_path):
    items = pl.DataFrame({"item_id": ["a"], "title": ["Soap"]})
    events = pl.DataFrame({"user_id": ["u"], "item_id": ["a"], "timestamp": [1], "search_text": ["soap"]})
    write(tmp_path, items, events)
    with pytest.raises(GemstError, match=r"events in .* has no column serch_text \(for query\)"):
        sources.load(Data(source="table", path=tmp_path, columns={"query": "serch_text"}))

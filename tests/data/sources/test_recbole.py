from __future__ import annotations

import polars as pl
import pytest

from gemst.config import Data
from gemst.data import sources
from gemst.errors import GemstError
from tests.data.conftest import PROJECT, write_recbole

ITEM = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"


def films(count: int = 4) -> str:
    return ITEM + "".join(f"{n}\tFilm {n}\t{1980 + 10 * (n % 3)}\tComedy Sci-Fi\n" for n in range(count))


def clicks(count: int = 400) -> str:
    return INTER + "".join(f"{n % 20}\t{n % 4}\t3\t{881250000 + n}\n" for n in range(count))


def test_titles_years_and_categories(tmp_path):
    item = ITEM + "1\tToy Story\t1995\tAnimation Children's\n2\tUnknown\tunkonwn\tunknown\n3\t  Fargo \t\t\n"
    loaded = sources.load(Data(path=write_recbole(tmp_path, item=item, inter=INTER + "u\t1\t5\t881250949\n")))
    assert loaded.items.to_dicts() == [
        {"item_id": "1", "title": "Toy Story (1995)", "text": None, "categories": ["Animation", "Children's"]},
        {"item_id": "2", "title": "Unknown", "text": None, "categories": ["unknown"]},
        {"item_id": "3", "title": "Fargo", "text": None, "categories": []},
    ]
    assert loaded.events["timestamp"].dt.epoch("s").to_list() == [881250949]


def test_half_the_events_search_by_one_category_and_a_third_of_them_by_decade(tmp_path):
    loaded = sources.load(Data(path=write_recbole(tmp_path, item=films(), inter=clicks(4000))))
    searches = loaded.events.filter(pl.col("task") == "search")
    assert 1900 < len(searches) < 2100
    assert searches["query"].null_count() == 0
    assert loaded.events.filter(pl.col("task") == "recommendation")["query"].drop_nulls().is_empty()
    assert set(searches["query"]) == {
        f"{c}{d}" for c in ("comedy", "sci-fi") for d in ("", " 1980s", " 1990s", " 2000s")
    }
    dated = searches.filter(pl.col("query").str.ends_with("s"))
    assert 0.28 < len(dated) / len(searches) < 0.38
    decade = {"0": "1980s", "1": "1990s", "2": "2000s", "3": "1980s"}
    assert all(row["query"].endswith(decade[row["item_id"]]) for row in dated.to_dicts())


def test_an_event_keeps_its_task_and_query_as_the_log_grows(tmp_path):
    small = sources.load(Data(path=write_recbole(tmp_path / "a", item=films(), inter=clicks(200)))).events
    grown = sources.load(Data(path=write_recbole(tmp_path / "b", item=films(8), inter=clicks(400)))).events
    keys = ["user_id", "item_id", "timestamp"]
    both = small.join(grown, on=keys, suffix="_grown")
    assert len(both) == 200
    assert both["task"].equals(both["task_grown"])
    assert both["query"].equals(both["query_grown"])


def test_queries_of_an_item_given_twice_do_not_depend_on_the_order_of_the_file(tmp_path):
    """Both come from the row that the items table keeps, which has the title that sorts first."""
    lines = ["0\tZebra\t1990\tDrama\n", "0\tAnt\t1980\tComedy\n", "1\tOther\t2000\tWar\n"]
    forward, backward = (
        sources.load(Data(path=write_recbole(tmp_path / name, item=ITEM + "".join(order), inter=clicks())))
        for name, order in (("a", lines), ("b", lines[::-1]))
    )
    assert forward.events.equals(backward.events)
    assert forward.items.equals(backward.items)
    assert forward.items["title"].to_list() == ["Ant (1980)", "Zebra (1990)", "Other (2000)"]
    queries = forward.events.filter(pl.col("item_id") == "0")["query"].drop_nulls()
    assert set(queries) == {"comedy", "comedy 1980s"}
    assert forward.events.height == 400


def test_other_data_sets_of_the_format(tmp_path):
    item = "item_id:token\tname:token_seq\tcategories:token_seq\n1\tSoap\t'Beauty', 'Skin Care'\n2\tBrush\t\n"
    inter = "item_id:token\tuser_id:token\ttimestamp:float\n1\tu\t1.5e9\n2\tu\t1500000001\n"
    loaded = sources.load(Data(path=write_recbole(tmp_path, item=item, inter=inter)))
    assert loaded.items["categories"].to_list() == [["Beauty", "Skin Care"], []]
    assert loaded.items["title"].to_list() == ["Soap", "Brush"]
    assert loaded.mapping["items.title"] == "name"
    # Without a category there is no query to search by.
    assert loaded.events.filter(pl.col("item_id") == "2")["task"].to_list() == ["recommendation"]


@pytest.mark.parametrize(
    ("field", "names"),
    [
        ("Comedy Drama", ["Comedy", "Drama"]),
        ("Comedy|Film Noir", ["Comedy", "Film Noir"]),
        ("Doctors, Weight Loss Centers", ["Doctors", "Weight Loss Centers"]),
        ("Children's Comedy", ["Children's", "Comedy"]),
        ("'Books'", ["Books"]),
        ("'Hair Care'", ["Hair Care"]),
        ("'Beauty', 'Food, Drink'", ["Beauty", "Food, Drink"]),
        ('"Men\'s"', ["Men's"]),
        ("['Toys', \"Men's\"]", ["Toys", "Men's"]),
        ("[]", []),
        # What CSV makes of a name with an apostrophe among others, and of one alone.
        ('"\'Clothing\', ""Men\'s"", \'Shoes\'"', ["Clothing", "Men's", "Shoes"]),
        ('"""Kids\'"""', ["Kids'"]),
    ],
)
def test_every_way_a_sequence_is_written(tmp_path, field, names):
    item = f"item_id:token\tname:token_seq\tcategories:token_seq\n1\tSoap\t{field}\n"
    inter = "item_id:token\tuser_id:token\ttimestamp:float\n1\tu\t1500000000\n"
    loaded = sources.load(Data(path=write_recbole(tmp_path, item=item, inter=inter)))
    assert loaded.items["categories"].to_list() == [names]


@pytest.mark.parametrize(
    ("item", "inter", "message"),
    [
        (films().replace("movie_title", "color"), clicks(), "no title field"),
        (films(), clicks().replace("timestamp", "when"), "lacks the field timestamp"),
        (films().replace(":token\t", "\t", 1), clicks(), "'item_id' has no type"),
        (films(), "", "is empty"),
        (films(), INTER, "gives no events"),
        (films(), clicks() + "1\t2\t3\t4\t5\n", "do not fit its header"),
    ],
)
def test_faults_name_the_file_or_field(tmp_path, item, inter, message):
    with pytest.raises(GemstError, match=message):
        sources.load(Data(path=write_recbole(tmp_path, item=item, inter=inter)))


def test_two_data_sets_in_one_folder(tmp_path):
    write_recbole(tmp_path, item=films(), inter=clicks())
    (tmp_path / "other.inter").write_text(clicks())
    with pytest.raises(GemstError, match=r"2 \.inter files"):
        sources.load(Data(path=tmp_path))


def test_movielens_100k():
    folder = PROJECT / "data" / "ml-100k"
    if not (folder / "ml-100k.inter").exists():
        pytest.skip("data/ml-100k is absent (gemst fetch brings it)")
    loaded = sources.load(Data(path=folder))
    assert loaded.rows_in == {"items": 1682, "events": 100_000}
    assert loaded.dropped == {}
    assert dict(loaded.events["task"].value_counts().iter_rows()) == {"search": 50_154, "recommendation": 49_846}
    assert loaded.events["query"].drop_nulls().n_unique() == 134
    first = loaded.items.filter(pl.col("item_id") == "1").to_dicts()[0]
    assert first["title"] == "Toy Story (1995)"
    assert first["categories"] == ["Animation", "Children's", "Comedy"]

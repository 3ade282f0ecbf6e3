from __future__ import annotations

import gzip
import json

import polars as pl
import pytest

from gemst.config import Data
from gemst.data import sources
from gemst.errors import GemstError


def write(folder, suffix: str, reviews: list[dict], meta: list[dict]) -> Data:
    for name, rows in (("Toys", reviews), ("meta_Toys", meta)):
        (folder / f"{name}{suffix}").write_bytes(
            gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
        )
    return Data(source="amazon", path=folder)


def test_2018_layout(tmp_path):
    meta = {
        "asin": "A1",
        "title": "Board &amp; Dice <span>Game</span>",
        "category": ["Toys & Games", "Games", "Games for the Family"],
        "description": ["<p>Fun</p>", "for all"],
        "price": "$3",
        "details": {"x": 1},
    }
    reviews = [
        {"reviewerID": f"u{n}", "asin": "A1", "unixReviewTime": 1_500_000_000 + n, "overall": 5.0} for n in range(40)
    ]
    loaded = sources.load(write(tmp_path, ".json.gz", reviews, [meta]))
    assert loaded.items.to_dicts() == [
        {"item_id": "A1", "title": "Board & Dice Game", "text": "Fun for all", "categories": meta["category"]}
    ]
    # Ai et al.: the words of the path, lower case, without punctuation, stop words and repeats.
    assert loaded.events["query"].drop_nulls().unique().to_list() == ["toys games family"]
    assert 10 < loaded.events["query"].null_count() < 30
    assert loaded.events["timestamp"].min().timestamp() == 1_500_000_000


def test_2023_layout_joins_by_parent(tmp_path):
    meta = [
        {
            "parent_asin": "P1",
            "title": "Doll",
            "categories": ["Toys", "Dolls"],
            "description": [],
            "main_category": "Toys",
        },
        {"parent_asin": "P2", "title": "Loose", "categories": ["Toys"], "description": ["Plain"]},
    ]
    reviews = [
        {
            "user_id": f"u{n}",
            "asin": "child",
            "parent_asin": f"P{1 + n % 2}",
            "timestamp": 1_600_000_000_123,
            "rating": 4.0,
        }
        for n in range(40)
    ]
    loaded = sources.load(write(tmp_path, ".jsonl.gz", reviews, meta))
    assert loaded.items["text"].to_list() == [None, "Plain"]
    assert loaded.events["item_id"].unique().sort().to_list() == ["P1", "P2"]
    assert loaded.events["timestamp"].dt.epoch("ms").unique().to_list() == [1_600_000_000_123]
    by_item = {item: set(rows["query"]) for (item,), rows in loaded.events.group_by("item_id")}
    assert by_item == {"P1": {None, "toys dolls"}, "P2": {None}}  # one level gives no query


def test_repeated_reviews_and_items_are_dropped_by_name(tmp_path):
    review, meta = (
        {"reviewerID": "u", "asin": "A", "unixReviewTime": 1_500_000_000},
        {"asin": "A", "title": "T", "category": ["X", "Y"]},
    )
    loaded = sources.load(write(tmp_path, ".json.gz", [review] * 3, [meta] * 2))
    assert loaded.dropped == {"items: exact duplicate of another row": 1, "events: exact duplicate of another row": 2}


def test_queries_of_an_item_given_twice_do_not_depend_on_the_order_of_the_file(tmp_path):
    meta = [{"asin": "A", "title": title, "category": ["Toys", title]} for title in ("Train", "Car")]
    reviews = [{"reviewerID": f"u{n}", "asin": "A", "unixReviewTime": 1_500_000_000 + n} for n in range(40)]
    for order in (meta, meta[::-1]):
        loaded = sources.load(write(tmp_path, ".json.gz", reviews, order))
        assert loaded.items["title"].to_list() == ["Car", "Train"]
        assert loaded.events["query"].drop_nulls().unique().to_list() == ["toys car"]
        assert loaded.events.height == 40


def test_two_categories_in_one_folder(tmp_path):
    config = write(tmp_path, ".json.gz", [], [])
    (tmp_path / "Books.json.gz").write_bytes(b"")
    with pytest.raises(GemstError, match=r"exactly one NAME\.json\(l\)\.gz, found Books\.json\.gz, Toys\.json\.gz"):
        sources.load(config)


def test_left_over_html_goes_and_the_rest_stays(tmp_path):
    title = "Nut &lt; 3 mm and > 2 mm, 1 < 2 &#34;x&#34; Levi&#146;s &#8220;y&#x201D; caf&eacute; <b>bold</b> &amp;lt;"
    review = {"reviewerID": "u", "asin": "A", "unixReviewTime": 1_500_000_000}
    loaded = sources.load(write(tmp_path, ".json.gz", [review], [{"asin": "A", "title": title}]))
    assert loaded.items["title"].to_list() == ['Nut < 3 mm and > 2 mm, 1 < 2 "x" Levi’s “y” café bold &lt;']


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"categories": [["Sports", "Dance"]]}, "lists of category paths, as the release of 2014 did"),
        ({"description": "a text"}, r"another type than expected .* description \(list of texts\)"),
    ],
)
def test_fields_of_another_release_are_named(tmp_path, row, message):
    review = {"reviewerID": "u", "asin": "A", "unixReviewTime": 1_500_000_000}
    config = write(tmp_path, ".json.gz", [review], [{"asin": "A", "title": "T", **row}])
    with pytest.raises(GemstError, match=message):
        sources.load(config)


def test_gift_cards(shared_data):
    folder = shared_data / "amazon-gift-cards"
    if not folder.is_dir():
        pytest.skip("amazon-gift-cards is absent")
    loaded = sources.load(Data(source="amazon", path=folder))
    assert loaded.rows_in == {"items": 1547, "events": 2972}
    assert loaded.dropped == {"events: exact duplicate of another row": 3}
    assert dict(loaded.events["task"].value_counts().iter_rows()) == {"search": 1450, "recommendation": 1519}
    assert loaded.events["query"].drop_nulls().unique().to_list() == ["gift cards"]
    assert not loaded.items.select(pl.col("categories").list.join("|").str.contains("<")).to_series().any()

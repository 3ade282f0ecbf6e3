"""BM25-hard negatives: what a text search engine would have put beside the target.

Postings and sums are polars tables; weights are integers, so a sum does not depend on the order of its terms and equal
scores are really equal (a fixed hash of the item then decides).
"""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from gemst.data.blocks import blocks, spread
from gemst.data.hashing import stable_hash

_K1, _B = 1.2, 0.75
_UNIT = 1e6  # integer weights are millionths
_WORD = r"\p{Han}|[^\W\p{Han}]+"  # a Chinese character counts as a word


def words(text: pl.Expr) -> pl.Expr:
    """Lower-case words of a text: list[str]."""
    return text.str.to_lowercase().str.extract_all(_WORD)


def postings(items: pl.DataFrame, ids: pl.Series) -> pl.DataFrame:
    """Columns word, item (position in `ids`), weight: of a word in an item's title, text and categories together."""
    text = pl.concat_str("title", "text", pl.col("categories").list.join(" "), separator=" ", ignore_nulls=True)
    codes = pl.DataFrame({"item_id": ids}).with_row_index("item")
    known = (
        items.join(codes, on="item_id").select("item", word=words(text)).with_columns(length=pl.col("word").list.len())
    )
    mean = pl.col("length") / (known["length"].mean() or 1.0)
    counts = known.explode("word", empty_as_null=True).drop_nulls().group_by("item", "word", "length").agg(tf=pl.len())
    df = pl.len().over("word")
    idf = ((known.height - df + 0.5) / (df + 0.5) + 1).log()
    weight = idf * pl.col("tf") * (_K1 + 1) / (pl.col("tf") + _K1 * (1 - _B + _B * mean))
    return counts.select("word", "item", weight=(weight * _UNIT).round().cast(pl.Int64))


@dataclass(frozen=True)
class Index:
    """A catalogue to look words up in: the postings of a word are rows begin .. begin + length - 1 of `postings`."""

    words: pl.DataFrame  # word, begin, length
    postings: pl.DataFrame  # item (code), weight
    ties: pl.Series  # uint64 of each item, decides between equal scores


def index(items: pl.DataFrame, ids: pl.Series) -> Index:
    """The index of `items`; an item's code is its position in `ids`."""
    table = postings(items, ids).sort("word").with_row_index("begin")
    spans = table.group_by("word", maintain_order=True).agg(pl.col("begin").first(), length=pl.len())
    return Index(spans, table.select("item", "weight"), pl.Series("tie", stable_hash(ids)))


def hardest(queries: pl.DataFrame, index: Index, barred: pl.DataFrame, count: int) -> pl.DataFrame:
    """The `count` best-scoring items per row that are not barred: columns row, item, best first.

    `queries` has row, query; `barred` has row, item. Only items that share a word with the query are scored, so a row
    can have fewer. Takes memory for `count` and the barred items of each row, and for the postings of a few queries.
    """
    terms = (
        queries.select(pl.col("query").unique().sort())
        .with_columns(word=words(pl.col("query")).list.unique())
        .explode("word", empty_as_null=True)
        .join(index.words, on="word", maintain_order="left")
    )
    need = pl.col("barred").fill_null(0) + count  # enough once the barred ones are out
    asked = queries.join(barred.group_by("row").agg(barred=pl.len()), on="row", how="left", maintain_order="left")
    found = [pl.DataFrame(schema={"row": pl.UInt32, "item": pl.UInt32})]
    distinct = terms.group_by("query", maintain_order=True).agg(pl.col("length").sum())
    for block in blocks(distinct["length"]):
        batch = distinct[block].select("query")
        ranked = (
            spread(terms.join(batch, on="query", how="semi").drop("word"), index.postings)
            .group_by("query", "item")
            .agg(pl.col("weight").sum())
            .with_columns(tie=pl.lit(index.ties).gather("item"))
            .sort("query", -pl.col("weight"), "tie")
        )
        places = ranked.with_row_index("begin").group_by("query").agg(pl.col("begin").first(), length=pl.len())
        best = asked.join(places, on="query", maintain_order="left").select(
            "row", "begin", length=pl.min_horizontal("length", need)
        )
        found.append(
            spread(best, ranked.select("item"))
            .join(barred, on=["row", "item"], how="anti", maintain_order="left")
            .group_by("row", maintain_order=True)
            .head(count)
        )
    return pl.concat(found)

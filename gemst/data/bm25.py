"""BM25-hard negatives: what a text search engine would have put beside the target.

Postings and sums are polars joins; weights are integers, so a sum does not depend on the order of its terms and equal
scores are really equal (a fixed hash of the item then decides).
"""

from __future__ import annotations

import numpy as np
import polars as pl

from gemst.data.hashing import stable_hash

_K1, _B = 1.2, 0.75
_UNIT = 1e6  # integer weights are millionths
_WORD = r"\p{Han}|[^\W\p{Han}]+"  # a Chinese character counts as a word
_QUERIES = 256  # distinct queries scored at once


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


def hardest(
    queries: pl.DataFrame, items: pl.DataFrame, ids: pl.Series, barred: pl.DataFrame, count: int
) -> pl.DataFrame:
    """The `count` best-scoring items per row that are not barred: columns row, item, best first.

    `queries` has row, query; `barred` has row, item. Only items that share a word with the query are scored, so a row
    can have fewer.
    """
    table = postings(items, ids)
    tie = pl.DataFrame({"item": np.arange(len(ids), dtype=np.uint32), "tie": stable_hash(ids)})
    found = [pl.DataFrame(schema={"row": pl.UInt32, "item": pl.UInt32})]
    distinct = queries["query"].unique().sort()
    most = int(np.bincount(barred["row"].to_numpy()).max(initial=0)) + count  # enough once the barred ones are out
    for start in range(0, len(distinct), _QUERIES):
        batch = distinct.slice(start, _QUERIES).to_frame()
        scored = (
            batch.with_columns(word=words(pl.col("query")).list.unique())
            .explode("word", empty_as_null=True)
            .join(table, on="word")
            .group_by("query", "item")
            .agg(pl.col("weight").sum())
            .join(tie, on="item")
            .sort("query", -pl.col("weight"), "tie")
            .group_by("query", maintain_order=True)
            .head(most)
        )
        found.append(
            queries.join(scored, on="query", maintain_order="left_right")
            .join(barred, on=["row", "item"], how="anti", maintain_order="left")
            .group_by("row", maintain_order=True)
            .head(count)
            .select("row", "item")
        )
    return pl.concat(found)

"""Candidates beside the targets of a valid or test example: uniform, BM25-hard, or what the page showed.

Drawn with a counter-based hash of the seed and the example itself, so an example's negatives depend neither on the
other examples nor on order or threads. An item the user ever met, targets included, is no negative (except for
`shown`, which is what the page showed minus the targets); events outside the k-core count as well.
"""

from __future__ import annotations

import numpy as np
import polars as pl

from gemst.config import Data
from gemst.data import bm25
from gemst.data.blocks import blocks
from gemst.data.hashing import Hashes, finish, mix, stable_hash
from gemst.data.log import Log, Rows

_SCHEMA = {"row": pl.UInt32, "item": pl.UInt32}


def draw(
    config: Data,
    seed: int,
    log: Log,
    heads: Rows,
    targets: pl.DataFrame,
    items: pl.DataFrame,
    events: pl.DataFrame,
    met: pl.DataFrame,
) -> pl.DataFrame:
    """Negatives of the examples at log positions `heads`: columns row (position in `heads`), item, sorted by row.

    `targets` has the same columns. `met` (user, item, as codes of `log`; repeats are fine) is every item that a user
    met, also in events that are not in `log`. At most `config.num_negatives` a row, fewer when the catalogue has no
    more; `shown` gives all that was shown.
    """
    if config.negatives == "none":
        return pl.DataFrame(schema=_SCHEMA)
    if config.negatives == "shown":
        return _shown(log, heads, targets, events)
    keys, count = _example_hash(log, heads, seed), config.num_negatives
    rows = pl.DataFrame({"row": np.arange(len(heads), dtype=np.uint32), "user": log.user[heads]})
    index = None
    if config.negatives == "bm25":
        index = bm25.index(items, log.items)
        # Side by side, rows with the same query share its scores.
        rows = rows.with_columns(query=events["query"].gather(log.row[heads])).sort("query", maintain_order=True)
    mine = met.filter(pl.col("user").is_in(rows["user"].unique().implode())).unique().group_by("user").agg("item")
    lengths = mine.select("user", length=pl.col("item").list.len())
    found = [pl.DataFrame(schema=_SCHEMA)]
    # In blocks of the cells that a row takes: all that its user met, and twice as many draws as it has negatives.
    sizes = rows.join(lengths, on="user", how="left", maintain_order="left")["length"].fill_null(0).to_numpy()
    for block in blocks(sizes + 2 * count):
        at = rows[block].rename({"row": "head"}).with_row_index("row")  # rows of the block alone
        head = at["head"].to_numpy()
        barred = at.join(mine, on="user").select("row", "item").explode("item", empty_as_null=True)
        hard = pl.DataFrame(schema=_SCHEMA)
        if index is not None:
            hard = bm25.hardest(at.select("row", "query").drop_nulls(), index, barred, count)
        missing = count - _counts(hard, len(head))
        filled = uniform(keys[head], pl.concat([barred, hard]), len(log.items), missing)
        drawn = pl.concat([hard, filled])
        found.append(drawn.with_columns(row=at["head"].gather(drawn["row"])))
    return pl.concat(found).sort("row", maintain_order=True)


def uniform(keys: Hashes, barred: pl.DataFrame, num_items: int, wanted: Rows) -> pl.DataFrame:
    """Items drawn uniformly without replacement, columns row, item.

    `keys` (rows,) seeds each row; `barred` (row, item) is left out and unique; `wanted` (rows,) is each row's number.
    """
    free = num_items - _counts(barred, len(keys))
    # Rows that take all there is: drawing would take long, listing does not.
    scarce = pl.DataFrame({"row": np.flatnonzero((free <= wanted) & (wanted > 0)).astype(np.uint32)})
    everything = scarce.join(pl.DataFrame({"item": np.arange(num_items, dtype=np.uint32)}), how="cross")
    done = [everything.join(barred, on=["row", "item"], how="anti").sort("row", "item")]
    open_rows = np.flatnonzero((free > wanted) & (wanted > 0))
    found = pl.DataFrame(schema={**_SCHEMA, "order": pl.Int64})
    draws, first = 2 * int(wanted.max(initial=0)), 0
    while len(open_rows):
        order = np.arange(first, first + draws)
        cells = finish(keys[open_rows][:, None] + finish(order.astype(np.uint64))[None, :]) % np.uint64(num_items)
        drawn = {
            "row": np.repeat(open_rows, draws).astype(np.uint32),
            "item": cells.ravel().astype(np.uint32),
            "order": np.tile(order, len(open_rows)),
        }
        fresh = pl.DataFrame(drawn).join(barred, on=["row", "item"], how="anti")
        found = pl.concat([found, fresh]).group_by("row", "item").agg(pl.col("order").min())
        have = _counts(found, len(keys))
        full = open_rows[have[open_rows] >= wanted[open_rows]]
        limits = pl.DataFrame({"row": full.astype(np.uint32), "limit": wanted[full]})
        ready = found.join(limits, on="row").sort("row", "order")
        done.append(ready.filter(pl.int_range(pl.len()).over("row") < pl.col("limit")).select("row", "item"))
        open_rows = open_rows[have[open_rows] < wanted[open_rows]]
        found = found.join(limits, on="row", how="anti")
        first += draws
    return pl.concat(done).sort("row", maintain_order=True)


def _shown(log: Log, heads: Rows, targets: pl.DataFrame, events: pl.DataFrame) -> pl.DataFrame:
    """Items on the page that were not clicked, in the page's order; unknown ones are left out."""
    at = np.flatnonzero(np.isin(log.unit, heads))
    row = np.argsort(heads, kind="stable")[np.searchsorted(np.sort(heads), log.unit[at])]
    codes = pl.DataFrame({"item_id": log.items}).with_row_index("item")
    return (
        pl.DataFrame({"row": row.astype(np.uint32), "item_id": events["shown"].gather(log.row[at])})
        .explode("item_id", empty_as_null=True)
        .drop_nulls()
        .unique(maintain_order=True)
        .join(codes, on="item_id", how="inner", maintain_order="left")
        .select("row", "item")
        .join(targets, on=["row", "item"], how="anti", maintain_order="left")
        .sort("row", maintain_order=True)
    )


def _example_hash(log: Log, heads: Rows, seed: int) -> Hashes:
    users, items = stable_hash(log.users, seed)[log.user[heads]], stable_hash(log.items)[log.item[heads]]
    moments = mix(log.unit_time[heads].astype(np.uint64), log.search[heads].astype(np.uint64))
    return mix(mix(users, moments), items)


def _counts(table: pl.DataFrame, rows: int) -> Rows:
    return np.bincount(table["row"].to_numpy(), minlength=rows)

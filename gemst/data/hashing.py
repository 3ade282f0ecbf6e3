"""A hash that is the same for ever: on any machine, thread count and library version.

Polars' and Python's own hashes change between versions or runs; task assignment, query choice, tie order and sampling
must not. This one is a polynomial over the UTF-8 bytes modulo 2^64 with splitmix64's finisher, in NumPy.
"""

from __future__ import annotations

import numpy as np
import polars as pl
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

_BASE = 0x100000001B3  # FNV's prime, an odd multiplier
_NULL = np.uint64(0x9E3779B97F4A7C15)
_ROWS = 1 << 18  # rows hashed at once: temporaries take eight bytes per byte of text


def stable_hash(values: pl.Series, salt: int = 0) -> Hashes:
    """Hash each string of `values` (nulls have a hash of their own): uint64 (rows,). `salt` gives another hash."""
    if values.null_count() == len(values):
        return finish(np.full(len(values), _NULL) + np.uint64(salt))
    distinct = values.unique()
    if len(distinct) > len(values) // 2:
        return np.concatenate([_hash(values.slice(start, _ROWS), salt) for start in range(0, len(values), _ROWS)])
    parts = [_hash(distinct.slice(start, _ROWS), salt) for start in range(0, len(distinct), _ROWS)]
    table = pl.DataFrame({"value": distinct, "hash": np.concatenate(parts)})
    rows = values.rename("value").to_frame()
    return rows.join(table, on="value", how="left", nulls_equal=True, maintain_order="left")["hash"].to_numpy()


def _hash(values: pl.Series, salt: int) -> Hashes:
    lengths = values.str.len_bytes().fill_null(0).to_numpy().astype(np.int64)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    text = np.frombuffer(values.fill_null("").str.join("")[0].encode(), dtype=np.uint8)
    position = np.arange(len(text)) - np.repeat(starts, lengths)
    powers = np.cumprod(np.r_[np.uint64(1), np.full(int(lengths.max(initial=1)), _BASE, np.uint64)], dtype=np.uint64)
    terms = (text.astype(np.uint64) + np.uint64(1)) * powers[position]
    sums = np.r_[np.uint64(0), np.cumsum(terms, dtype=np.uint64)]  # wraps modulo 2^64, as do the differences below
    hashes = sums[ends] - sums[starts]
    hashes[values.is_null().to_numpy()] = _NULL
    return finish(hashes + np.uint64(salt))


def finish(hashes: Hashes) -> Hashes:
    """splitmix64's finisher: every input bit moves every output bit."""
    with np.errstate(over="ignore"):
        z = hashes + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def mix(left: Hashes, right: Hashes) -> Hashes:
    """Combine two hashes into one; the order matters."""
    return finish(left * np.uint64(3) + right)

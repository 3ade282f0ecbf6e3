"""General-domain text: what the null space is calibrated on, and what forgetting is measured with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from gemst.data.hashing import stable_hash
from gemst.errors import GemstError

_CALIBRATION_IN_FIVE = 4


def split(path: Path) -> tuple[list[str], list[str]]:
    """Texts of a Parquet with `title` and `text`: four fifths for calibration, one held out, by a hash of the title.

    An article is always on the same side, however the file grows or is ordered; texts come in order of their title.
    Raises GemstError when a column is missing or a side stays empty.
    """
    try:
        table = pl.read_parquet(path)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise GemstError(f"{path} is not readable as Parquet ({error})", "Run `gemst fetch` again") from None
    for column in ("title", "text"):
        if table.schema.get(column) != pl.String:
            raise GemstError(f"{path} has no text column {column!r}", "It needs string columns title and text")
    table = table.filter(pl.col("text").str.strip_chars().str.len_bytes() > 0).sort("title", "text")
    kept = stable_hash(table["title"]) % np.uint64(5) < _CALIBRATION_IN_FIVE
    calibration, heldout = (table.filter(pl.Series(side))["text"].to_list() for side in (kept, ~kept))
    if not calibration or not heldout:
        raise GemstError(f"{path} has too few articles to hold some out ({len(table)})", "Use a larger general corpus")
    return calibration, heldout


def stretches(texts: list[str], skip: int = 2000, length: int = 1200) -> list[str]:
    """A stretch of `length` characters from inside each text that is long enough: many texts in few tokens.

    Beginnings and lists drift several times as much as running text, so a few whole articles make a poor sample. Where
    no text is long enough, the texts themselves.
    """
    return [text[skip : skip + length] for text in texts if len(text) >= skip + length] or texts

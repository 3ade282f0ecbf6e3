"""Item IDs as the rest of the house sees them: one frozen table, and the tokens it stands for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import repeat
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from gemst.errors import GemstError
from gemst.files import read_json, require, sha256
from gemst.item_ids import trie
from gemst.item_ids.trie import Trie

ATOMIC = "atomic"


@dataclass(frozen=True)
class ItemIds:
    """The identifiers of a catalogue, retired items included.

    `codes` (items, levels) int32 are local to their level: level l holds codes below level_sizes[l].
    `generation` (items,) int32 says which build published an ID; `active` (items,) bool is False for retired items:
    they keep their ID and may stand in histories, but are never returned.
    """

    item_id: list[str]
    codes: NDArray[np.int32]
    level_sizes: tuple[int, ...]
    strategy: str
    generation: NDArray[np.int32]
    active: NDArray[np.bool_]

    @cached_property
    def index(self) -> dict[str, int]:
        """Row of each item_id."""
        return {item: row for row, item in enumerate(self.item_id)}

    @cached_property
    def names(self) -> pl.Series:
        """The item_ids as a String series: gathered from, not made again, by every ranking."""
        return pl.Series(self.item_id, dtype=pl.String)

    def rows_of(self, item_ids: pl.Series) -> NDArray[np.int64]:
        """Row of each item_id, -1 for those the catalogue does not hold."""
        return rows_by(self.index, item_ids)

    @cached_property
    def tokens(self) -> list[str]:
        """Vocabulary tokens in order of their ids: all codes of level 0, then level 1, and so on."""
        if self.strategy == ATOMIC:
            return [f"<item_{code}>" for code in range(self.level_sizes[0])]
        return [f"<id_{level}_{code}>" for level, size in enumerate(self.level_sizes) for code in range(size)]

    @property
    def level_starts(self) -> list[int]:
        """Position of each level's first token in `tokens`; the last entry is their number."""
        return [sum(self.level_sizes[:level]) for level in range(len(self.level_sizes) + 1)]

    def token_ids(self, first: int) -> NDArray[np.int64]:
        """Vocabulary ids (items, levels) when the first of `tokens` has the id `first`."""
        return self.codes.astype(np.int64) + np.asarray(self.level_starts[:-1]) + first

    def only(self, item_ids: pl.Series) -> ItemIds:
        """The same identifiers with every item retired that `item_ids` does not hold: nothing else is ever ranked."""
        active = self.active & self.names.is_in(item_ids.implode()).to_numpy()
        return self if np.array_equal(active, self.active) else replace(self, active=active)

    @cached_property
    def trie(self) -> Trie:
        """The trie over the active items."""
        rows = np.flatnonzero(self.active).astype(np.int32)
        return trie.build(self.codes[rows], rows)


def rows_by(index: dict[str, int], item_ids: pl.Series) -> NDArray[np.int64]:
    """Row of each item_id by `index`, -1 for those it does not hold. Costs what is asked, not the catalogue."""
    return np.fromiter(map(index.get, item_ids.cast(pl.String), repeat(-1)), np.int64, len(item_ids))


def table(ids: ItemIds) -> pl.DataFrame:
    """What ids.parquet holds: item_id, tokens str, codes list[i32], generation i32, active bool.

    It maps in both directions: `tokens` is what the model generates for an item, and no two items share it.
    """
    tokens = pl.Series(ids.tokens)
    spelled = [tokens.gather(column).alias(str(level)) for level, column in enumerate(ids.token_ids(0).T)]
    return pl.DataFrame(
        {
            "item_id": ids.item_id,
            "tokens": pl.DataFrame(spelled).select(pl.concat_str(pl.all()))[:, 0],
            "codes": pl.Series(ids.codes).cast(pl.List(pl.Int32)),
            "generation": ids.generation,
            "active": ids.active,
        },
        schema_overrides={"item_id": pl.String},
    )


def load(folder: Path) -> ItemIds:
    """Read a build's folder. Raises GemstError when it is incomplete or does not fit its manifest."""
    manifest = read_json(require(folder / "manifest.json", made_by="gemst tokenize"))
    # Builds of gemst before 2026-12 vouch for the table alone.
    for name, digest in manifest.get("files", {"ids.parquet": manifest.get("sha256")}).items():
        path = require(folder / name, made_by="gemst tokenize")
        if sha256(path) != digest:
            raise GemstError(f"{path} is not the file its manifest.json was written for", "Run `gemst tokenize` again")
    frame = pl.read_parquet(folder / "ids.parquet")
    codes = frame["codes"].explode(empty_as_null=True).to_numpy(writable=True).reshape(len(frame), -1)
    ids = ItemIds(
        item_id=frame["item_id"].to_list(),
        codes=np.ascontiguousarray(codes, np.int32),
        level_sizes=tuple(manifest["level_sizes"]),
        strategy=manifest["strategy"],
        generation=frame["generation"].to_numpy(),
        active=frame["active"].to_numpy(writable=True),
    )
    ids.__dict__["trie"] = Trie.load(
        folder / "trie.safetensors"
    )  # fills the cached property: no need to build it again
    return ids

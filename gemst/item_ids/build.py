"""Build the identifiers of a catalogue, or extend a published build by a generation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from gemst.errors import GemstError
from gemst.files import atomic_folder, read_json, require, sha256, write_json
from gemst.item_ids.ids import ATOMIC, ItemIds, load, table

if TYPE_CHECKING:
    from gemst.config import Config
    from gemst.item_ids.semantic import Quantizer

_QUANTIZER = "quantizer.safetensors"
_CHECKED = (".parquet", ".safetensors")  # the map, the trie that constrains decoding, what places new items


def build(items: pl.DataFrame, train: pl.DataFrame, config: Config, out: Path) -> dict[str, Any]:
    """Give every item a unique ID and write the build's folder; return its quality report.

    `items` as in gemst.data.tables, `train` examples; only `joint` reads `train`. With `item_ids.extends` the IDs of
    that build stay bit for bit: new items are appended, items that are gone are retired and their IDs never reused.

    The folder holds ids.parquet (the map), trie.safetensors, quality.json, quality.png, for semantic strategies
    quantizer.safetensors (what it takes to place new items), and manifest.json, written last. Raises GemstError when
    the items do not fit the code space, or `extends` was built with other settings.
    """
    if items.is_empty():
        raise GemstError("there are no items to give IDs to", "Check the items table that `gemst validate` wrote")
    if config.item_ids.extends is not None:
        ids, before, quantizer = _extend(items, config, config.item_ids.extends)
        generation = int(read_json(config.item_ids.extends / "manifest.json")["generation"]) + 1
    else:
        ids, before, quantizer = _fresh(items, train, config)
        generation = 0
    return _publish(out, ids, before, quantizer, generation, config)


def _fresh(items: pl.DataFrame, train: pl.DataFrame, config: Config) -> tuple[ItemIds, np.ndarray, Quantizer | None]:
    settings, n = config.item_ids, len(items)
    born, active = np.zeros(n, np.int32), np.ones(n, bool)
    if settings.strategy == ATOMIC:
        codes = np.arange(n, dtype=np.int32)[:, None]
        return ItemIds(items["item_id"].to_list(), codes, (n,), ATOMIC, born, active), codes, None
    from gemst.item_ids import semantic

    sizes = (settings.codebook_size,) * settings.levels
    _check_room(n, sizes)
    quantizer, before, codes = semantic.fit(items, train, config)
    return ItemIds(items["item_id"].to_list(), codes, sizes, settings.strategy, born, active), before, quantizer


def _extend(items: pl.DataFrame, config: Config, folder: Path) -> tuple[ItemIds, np.ndarray, Quantizer | None]:
    """The published IDs of `folder` unchanged, then one row for each item it does not know."""
    if not (folder / "manifest.json").exists():
        raise GemstError(
            f"item_ids.extends = {str(folder)!r} is no published build: it has no manifest.json",
            "Name the item_ids folder of a build or of a model, or clear item_ids.extends",
        )
    published, manifest, settings = load(folder), read_json(folder / "manifest.json"), config.item_ids
    asked = _settings(config)
    changed = [name for name, value in asked.items() if manifest["settings"].get(name) != value]
    if changed:
        name = "strategy" if "strategy" in changed else changed[0]  # the others follow from it
        value = manifest["settings"].get(name)
        field = name if "." in name else f"item_ids.{name}"
        raise GemstError(
            f"item_ids.extends = {str(folder)!r} was built with {name} = {value!r}, not {asked[name]!r}",
            f"Set {field} to {value!r}, or clear item_ids.extends to build new IDs (and tune again)",
        )
    fresh = items.filter(~pl.col("item_id").is_in(pl.Series(published.item_id).implode()))
    kept = pl.Series(published.item_id).is_in(items["item_id"].implode()).to_numpy()
    quantizer: Quantizer | None = None
    if settings.strategy == ATOMIC:
        size = published.level_sizes[0] + len(fresh)
        sizes: tuple[int, ...] = (size,)
        codes = before = np.arange(published.level_sizes[0], size, dtype=np.int32)[:, None]
    else:
        from gemst.item_ids import semantic

        sizes = published.level_sizes
        _check_room(len(published.item_id) + len(fresh), sizes, retired=int((~kept).sum()))
        quantizer = semantic.Quantizer.load(require(folder / _QUANTIZER, made_by="gemst tokenize"))
        before, codes = semantic.place(quantizer, fresh, published.codes, config)
    generation = np.full(len(fresh), int(manifest["generation"]) + 1, np.int32)
    ids = ItemIds(
        item_id=published.item_id + fresh["item_id"].to_list(),
        codes=np.concatenate([published.codes, codes]),
        level_sizes=sizes,
        strategy=published.strategy,
        generation=np.concatenate([published.generation, generation]),
        active=np.concatenate([kept, np.ones(len(fresh), bool)]),
    )
    return ids, np.concatenate([published.codes, before]), quantizer


def _publish(
    out: Path, ids: ItemIds, before: np.ndarray, quantizer: Quantizer | None, generation: int, config: Config
) -> dict[str, Any]:
    from gemst.item_ids import quality

    report = quality.report(ids, before)
    with atomic_folder(out) as folder:
        table(ids).write_parquet(folder / "ids.parquet")
        ids.trie.save(folder / "trie.safetensors")
        if quantizer is not None:
            quantizer.save(folder / _QUANTIZER)
        write_json(folder / "quality.json", report)
        quality.plot(ids, report, folder / "quality.png")
        manifest = {
            "strategy": ids.strategy,
            "level_sizes": list(ids.level_sizes),
            "items": len(ids.item_id),
            "active": int(ids.active.sum()),
            "generation": generation,
            "settings": _settings(config),
            "files": {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.suffix in _CHECKED},
        }
        write_json(folder / "manifest.json", manifest)  # last: a folder without it is no build
    return report


def _settings(config: Config) -> dict[str, Any]:
    """What an extension must share with the build it extends: fields of `item_ids`, and the backbone if it is read."""
    settings = config.item_ids
    if settings.strategy == ATOMIC:
        return {"strategy": ATOMIC}
    names = ["strategy", "levels", "codebook_size", "embedding"]
    names += ["encoder"] if settings.embedding == "sentence" else []
    names += ["joint", "text_weight"] if settings.strategy == "joint" else []
    shared: dict[str, Any] = {name: getattr(settings, name) for name in names}
    if settings.embedding == "backbone":
        shared |= {"backbone.name": config.backbone.name, "backbone.num_layers": config.backbone.num_layers}
    return shared


def _check_room(n: int, sizes: tuple[int, ...], retired: int | None = None) -> None:
    """Raise GemstError when `n` IDs are too many; `retired` of them are, where published ones are extended."""
    room = int(np.prod(np.array(sizes, dtype=object)))
    if n <= room:
        return
    fix = "Raise item_ids.levels or item_ids.codebook_size"
    if retired is not None:
        fix = (
            f"Published IDs never move and {retired:,} of them are retired: build new ones with more room "
            "(item_ids.extends: null, larger item_ids.levels or item_ids.codebook_size) and tune again"
        )
    raise GemstError(
        f"{n:,} items do not fit item_ids.levels = {len(sizes)} of item_ids.codebook_size = {sizes[0]} ({room:,} IDs)",
        fix,
    )

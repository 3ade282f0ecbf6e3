"""A tuned model kept up to date without training: an ID for each new item and, for atomic IDs, rows made from its text;
the log's counts of today."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from gemst.errors import GemstError

if TYPE_CHECKING:
    from gemst.config import Config


@dataclass(frozen=True)
class Appended:
    """Items that got an ID, items that lost their place, items of the catalogue now; whether the counts changed."""

    new: int
    retired: int
    returned: int
    items: int
    recounted: bool

    def __bool__(self) -> bool:
        """Whether anything is other than it was."""
        return bool(self.new or self.retired or self.returned or self.recounted)


def append(model: Path, items: pl.DataFrame, events: pl.DataFrame, config: Config, out: Path) -> Appended:
    """Write to `out` the tuned model of the folder `model` with the catalogue `items`, all of it as it is today.

    IDs are a new generation of the model's own (`gemst.item_ids.build`): published ones stay, items that are gone from
    `items` are retired, ones that are back no longer are. Semantic IDs are made of codes that the model knows already,
    so not one weight changes. An atomic ID is a new token with an input and an output row (`gemst.tuning.new_rows`),
    for which `events`, the log of today, says what is asked; every other weight keeps its bits. A memory counts all of
    `events`, under the weights it has. Raises GemstError when the items do not fit the model's code space, or the model
    knows none of them.
    """
    from gemst import backbone, item_ids, memory
    from gemst.files import atomic_folder, read_json, write_json
    from gemst.tuning.new_rows import make

    tuned = backbone.load_tuned(model)
    if not items["item_id"].is_in(tuned.ids.names.implode()).any():
        raise GemstError(
            f"the model knows none of today's {len(items):,} items: all of its own would be retired",
            "Check that items.item_id is spelled as in the logs it was tuned on, or tune a new model",
        )
    card, made_with = read_json(model / "gemst.json"), read_json(model / "item_ids" / "manifest.json")["settings"]
    own_ids = {name: value for name, value in made_with.items() if "." not in name} | {"extends": model / "item_ids"}
    own_backbone = {name.removeprefix("backbone."): value for name, value in made_with.items() if "." in name}
    made = {  # as the model's own were made, whatever the next one shall have
        "item_ids": config.item_ids.model_copy(update=own_ids),
        "backbone": config.backbone.model_copy(update=own_backbone),
    }
    with atomic_folder(out) as folder:
        quality = item_ids.build(items, pl.DataFrame(), config.model_copy(update=made), folder / "item_ids")
        ids = item_ids.load(folder / "item_ids")
        known = len(tuned.ids.tokens)
        if len(ids.tokens) > known:
            own = card["params"]["data"]["history"] == "own"
            rows_in, rows_out = make(tuned, items, events, ids.item_id[known:], own)
            backbone.add_item_tokens(tuned.model, tuned.tokenizer, ids.tokens[known:], rows_in, rows_out)
        backbone.save(tuned.model, tuned.tokenizer, folder)
        write_json(folder / "gemst.json", card)
        recounted = False
        if tuned.memory is not None:
            counted = memory.build(ids, events).fitted(tuned.memory.fits)
            counted.save(folder / "memory", ids)
            recounted = not counted.counts_as(tuned.memory)
    before, now = tuned.ids.active, ids.active[: len(tuned.ids.active)]
    return Appended(
        new=len(ids.item_id) - len(before),
        retired=int((before & ~now).sum()),
        returned=int((now & ~before).sum()),
        items=quality["items"],
        recounted=recounted,
    )

"""Ask the champion: ranked items for a user of the logs, with a query and without."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gemst import inputs, layout
from gemst.errors import GemstError
from gemst.files import read_json
from gemst.serving.api import MOST_ITEMS

if TYPE_CHECKING:
    import polars as pl

    from gemst.config import Config


def recommend(config: Config, user: str, k: int) -> pl.DataFrame:
    """The champion's top-k items for a user: rank, item_id, title, score. Raises GemstError when none is left."""
    return _serve(config, user, None, k)


def search(config: Config, user: str, query: str, k: int) -> pl.DataFrame:
    """The champion's top-k items for a user's query: as `recommend`."""
    if not query.strip():
        raise GemstError("the query is empty", "Give words to search for, such as `gemst search --user 196 comedy`")
    try:
        query.encode()
    except UnicodeEncodeError:
        raise GemstError("the query is not UTF-8", "Set the terminal's encoding to UTF-8") from None
    return _serve(config, user, query.strip(), k)


def _serve(config: Config, user: str, query: str | None, k: int) -> pl.DataFrame:
    import polars as pl

    from gemst import backbone, registry
    from gemst.ranking import rank

    if not 1 <= k <= MOST_ITEMS:
        raise GemstError(f"k = {k} is out of bounds", f"Ask for 1 to {MOST_ITEMS} items")
    items, events = inputs.items(), inputs.events()
    met = events.filter(pl.col("user_id") == user).sort("timestamp", maintain_order=True)
    if met.is_empty():
        raise GemstError(f"user {user!r} has no event", f"Known users are in {layout.VALIDATED / 'events.parquet'}")
    backbone.set_threads(config)
    folder = registry.champion(config).folder
    tuned = backbone.load_tuned(folder, backbone.best_device()).only(items["item_id"])  # some may be gone since
    task = "recommendation" if query is None else "search"
    own = read_json(folder / "gemst.json")["params"]["data"]["history"] == "own"  # what it was tuned on
    history = (met.filter(task=task) if own else met)["item_id"].to_list()
    asked = pl.DataFrame(
        {"user_id": [user], "task": [task], "query": [query], "history": [history]},
        schema_overrides={"query": pl.String, "history": pl.List(pl.String)},
    )
    seen = met.select(pl.lit(0, pl.UInt32).alias("row"), "item_id") if config.evaluation.exclude_seen else None
    if not tuned.ids.active.any():
        raise GemstError("the champion knows no item of today's catalogue", "Run `gemst append`, or tune on it")
    ranked = rank(tuned, asked, k, config.ranking, seen)
    if ranked.is_empty():
        raise GemstError(
            "nothing is left to recommend: the user has met all items",
            "Set evaluation.exclude_seen=false to rank them too",
        )
    return (
        ranked.join(items.select("item_id", "title"), on="item_id", how="left")
        .sort("rank")
        .select("rank", "item_id", "title", "score")
    )

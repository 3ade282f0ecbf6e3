"""Raw logs to the canonical tables: one adapter per format, one front for all of them."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from gemst.config import Data
from gemst.data.sources.base import Loaded, settle
from gemst.errors import GemstError

__all__ = ["Loaded", "load"]


def load(config: Data) -> Loaded:
    """Read the logs in `config.path` with the adapter `config.source`.

    Raises GemstError when the folder, a file or a column is missing or damaged, and when no rows are left.
    """
    if not config.path.is_dir():
        raise GemstError(
            f"data.path = {config.path} is not a folder", "Set it to the raw logs, or run `gemst fetch` for the demo's"
        )
    return settle(_adapter(config.source)(config))


def _adapter(source: str) -> Callable[[Data], Loaded]:
    """The adapter's `load`, imported on demand."""
    adapter: Callable[[Data], Loaded] = import_module(f"gemst.data.sources.{source}").load
    return adapter

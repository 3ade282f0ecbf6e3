"""Item-ID tokenization: unique, stable identifiers made of codes that the model can generate (docs/item-ids.md)."""

from gemst.item_ids.build import build
from gemst.item_ids.ids import ItemIds, load

__all__ = ["ItemIds", "build", "load"]

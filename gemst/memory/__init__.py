"""Memory: the log's own counts, mixed with the model's scores (docs/memory.md)."""

from gemst.memory.counts import train_events
from gemst.memory.evidence import Memory, build, load

__all__ = ["Memory", "build", "load", "train_events"]

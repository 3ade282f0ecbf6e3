"""One at a time in a folder, whoever starts it: a deployment, a person or `make`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def alone(place: Path, who: str, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock file `place`; where `who` holds it, say so and wait for its end. It falls with its process."""
    place.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(place)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        say(f"{who} is at work in this folder: waiting for it to end")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()

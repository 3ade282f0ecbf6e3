"""Progress of long work and the closing summary of a stage."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")
_LOG_EVERY = 10.0  # seconds between lines where there is no terminal


class Progress:
    """A bar on a terminal, a line every ten seconds in a log; silent for work under two seconds.

    `total` may be changed while it runs.
    """

    def __init__(self, label: str, total: int | None = None, done: int = 0) -> None:
        self.label, self.total, self.done, self.first = label, total, done, done
        self._started = self._said = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Bar(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(self.label, total=self.total, completed=self.done, note="")
        return self

    def advance(self, note: str = "", steps: int = 1) -> None:
        """Count `steps` more as done; `note` is shown beside them."""
        self.done += steps
        now = time.monotonic()
        if self._bar is not None:
            if not self._bar.live.is_started and now - self._started > 2:
                self._bar.start()
            self._bar.update(self._task, completed=self.done, total=self.total, note=note)
        elif now - self._said > _LOG_EVERY:
            self._said = now
            print(self._line(now, note), file=sys.stderr, flush=True)

    def _line(self, now: float, note: str) -> str:
        share = f"{self.done}/{self.total}" if self.total else str(self.done)
        line = f"{self.label}: {share}"
        if self.total and self.done > self.first:
            left = (now - self._started) / (self.done - self.first) * (self.total - self.done)
            line += f", {left:.0f} s left"
        return f"{line}, {note}" if note else line

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()


def track(work: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """Iterate over `work` and show how far it is."""
    if total is None and hasattr(work, "__len__"):
        total = len(work)
    with Progress(label, total) as progress:
        for piece in work:
            yield piece
            progress.advance()


@dataclass
class Summary:
    """What a stage read, wrote and dropped, and what it cost."""

    stage: str
    read: dict[str, int | str] = field(default_factory=dict)
    written: dict[str, int | str] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    peak_mib: float = 0.0

    def lines(self) -> list[str]:
        """The summary as printed."""

        def listed(facts: dict[str, Any]) -> str:
            return ", ".join(f"{value:,} {name}" if isinstance(value, int) else f"{name} {value}" for name, value in facts.items())

        lines = [f"{self.stage}: {self.seconds:.1f} s, peak memory {self.peak_mib:,.0f} MiB"]
        for label, facts in (("read", self.read), ("wrote", self.written), ("dropped", self.dropped)):
            if facts:
                lines.append(f"  {label} {listed(facts)}")
        return lines + [f"  {note}" for note in self.notes]


@contextmanager
def stage(name: str) -> Iterator[Summary]:
    """Measure a stage; its summary is printed when it ends well."""
    import resource

    summary, started = Summary(name), time.perf_counter()
    yield summary
    summary.seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    summary.peak_mib = peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)
    print("\n".join(summary.lines()), flush=True)

"""What a stage tells the person who waits for it: progress while it runs, a summary when it ends.

On a terminal, anything that takes longer than two seconds gets a bar. In a log (a file, DVC, a Prefect worker) it is
one plain line every ten seconds instead.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from gemst import layout
from gemst.files import write_json

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

T = TypeVar("T")

BAR_AFTER = 2.0  # seconds before the first bar
LINE_EVERY = 10.0  # seconds between lines in a log


@dataclass
class Summary:
    """What a stage read, wrote, dropped and set aside, how long it took (seconds) and the peak memory (MiB)."""

    stage: str
    read: dict[str, int | str] = field(default_factory=dict)
    written: dict[str, int | str] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    quarantined: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    peak_mib: int = 0
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The summary as plain text lines, the first one with the stage, its time and its memory."""
        lines = [f"{self.stage}: done in {duration(self.seconds)}, peak memory {self.peak_mib:,} MiB"]
        for name in ("read", "written", "dropped", "quarantined"):
            counts: dict[str, int | str] = getattr(self, name)
            if counts:
                shown = (
                    f"{key} {value:,}" if isinstance(value, int) else f"{key} {value}" for key, value in counts.items()
                )
                lines.append(f"  {name:<8} " + " · ".join(shown))
        return lines + [f"  {'note':<8} {note}" for note in self.notes]


def summary_path(stage: str) -> Path:
    """Where the latest summary of a stage is kept: outside every DVC output, since it holds seconds."""
    return layout.ARTIFACTS / "summaries" / f"{stage}.json"


@contextmanager
def stage(name: str, shown: bool = True) -> Iterator[Summary]:
    """Yield a Summary to fill in; on success measure it, print it and keep it (`summary_path`), if it is to be shown.

    Of several processes that run a stage together, one shows it.
    """
    summary = Summary(name)
    began = time.perf_counter()
    yield summary
    summary.seconds = round(time.perf_counter() - began, 2)
    summary.peak_mib = peak_mib()
    if not shown:
        return
    write_json(summary_path(name), asdict(summary))
    print("\n".join(summary.lines()), flush=True)


class Progress:
    """Progress of a loop: `with Progress("tuning", total=800) as progress: progress.advance("loss 7.1")`.

    `total` may be changed while it runs; None means unknown. Nothing is shown for work that ends within two seconds,
    nor by other processes of a launcher than its first.
    """

    def __init__(self, label: str, total: int | None = None, done: int = 0, shown: bool = True) -> None:
        self.label, self.total, self.done = label, total, done
        self.shown = shown and os.environ.get("RANK", "0") == "0"
        self._bar: Bar | None = None
        self._began = self._last = time.monotonic()
        self._first = done

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, text: str = "", by: int = 1) -> None:
        """Count `by` more units as done; `text` says how it goes."""
        self.done += by
        if not self.shown:
            return
        now = time.monotonic()
        if sys.stderr.isatty():
            if self._bar is None and now - self._began >= BAR_AFTER:
                self._bar = _bar(self.label, self.total, self.done)
            if self._bar is not None:
                self._bar.update(self._bar.task_ids[0], completed=self.done, total=self.total, text=text)
        elif now - self._last >= LINE_EVERY:
            self._last = now
            print(self._line(now, text), file=sys.stderr, flush=True)

    def _line(self, now: float, text: str) -> str:
        parts = [f"{self.done:,}" if self.total is None else f"{self.done:,} of {self.total:,}"]
        if self.total is not None and self.done > self._first:
            left = (now - self._began) / (self.done - self._first) * max(self.total - self.done, 0)
            parts.append(f"{duration(left)} left")
        return f"{self.label}: " + ", ".join(parts + [text] * bool(text))


def track(iterable: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """Yield from `iterable` and show the progress; its length is the total where none is given."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with Progress(label, total) as progress:
        for item in iterable:
            yield item
            progress.advance()


def _bar(label: str, total: int | None, done: int) -> Bar:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    bar = Bar(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(), TextColumn("{task.fields[text]}", style="dim"),
        console=Console(stderr=True), transient=True,
    )  # fmt: skip
    bar.add_task(label, total=total, completed=done, text="")
    bar.start()
    return bar


def duration(seconds: float) -> str:
    """Seconds as a person says them: 0.4 s, 38 s, 4 min 12 s, 1 h 5 min.

    >>> duration(0.42), duration(38.2), duration(252), duration(3900)
    ('0.4 s', '38 s', '4 min 12 s', '1 h 5 min')
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def peak_mib() -> int:
    """Peak resident memory of this process in MiB.

    Linux is asked for the high-water mark of this program alone: getrusage also counts the parent it was forked from.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) // 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (1024 * 1024 if sys.platform == "darwin" else 1024)

"""Run a command of this project as a child process, its output streamed line by line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

# What DVC repeats after every stage; in the log of a flow it hides the rest.
_HINT = re.compile(
    r"To track the changes with git|\s+git add |To enable auto staging|\s+dvc config |Use `dvc push`|Updating lock"
)


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit status and what it printed."""

    status: int
    lines: tuple[str, ...]

    @property
    def reason(self) -> str:
        """The line that says why it failed: gemst's own, else DVC's first error, else the last one."""
        own = [line.removeprefix("gemst: ") for line in self.lines if line.startswith("gemst: ")]
        dvc = [line.removeprefix("ERROR: ") for line in self.lines if line.startswith("ERROR: ")]
        said = [line for line in self.lines if line.strip()]
        return (own[-1:] or dvc[:1] or said[-1:] or [f"exit status {self.status}"])[0]


def run(
    module: str,
    *arguments: str,
    say: Callable[[str], None],
    folder: Path | None = None,
    extra: Mapping[str, str] | None = None,
) -> Outcome:
    """Run `python -m module arguments` with this interpreter; `say` hears every line as it is printed.

    It works in `folder` (here, where none is given) with `extra` in its environment. The child finds the commands
    installed beside this interpreter first, whichever shell or worker started us.
    """
    environment = os.environ | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "PYTHONUNBUFFERED": "1",
        "DVC_NO_ANALYTICS": "1",
        **(extra or {}),
    }
    command = [sys.executable, "-m", module, *arguments]
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        cwd=folder,
    )
    lines: list[str] = []
    with _ended(child):
        assert child.stdout is not None
        for line in child.stdout:
            lines.append(line.rstrip())
            if lines[-1] and not _HINT.match(lines[-1]):
                say(lines[-1])
        child.wait()
    return Outcome(child.returncode, tuple(lines))


@contextmanager
def _ended(child: subprocess.Popen[str]) -> Iterator[None]:
    """Leave no child behind, nor a child of its own (DVC starts the stage), whatever interrupts us."""
    try:
        yield
    finally:
        if child.poll() is None:
            first = psutil.Process(child.pid)
            family = [first, *first.children(recursive=True)]
            _, alive = psutil.wait_procs(family, timeout=3)  # Ctrl-C has reached all of them: let them end
            for stop in (psutil.Process.terminate, psutil.Process.kill):
                for process in alive:
                    with suppress(psutil.NoSuchProcess):
                        stop(process)
                _, alive = psutil.wait_procs(alive, timeout=20)
            child.wait()

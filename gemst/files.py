"""Reading and writing files so that a reader never meets half of one."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gemst.errors import GemstError

_PART = ".part-"  # in temporary names
_OLD, _GONE = ".old", ".gone"  # at their end: a folder that is being replaced, or removed
_YOUNG = 10.0  # seconds


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` on success, remove it on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path, path.suffix)
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL, 0o666))  # unlike those of tempfile, as the umask says
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`; swap it for `path` on success, remove it on failure.

    Interrupted between the swap's two renames, the old folder goes back to its place; what a killed process has left
    is put right by the next call.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _tidy(path)
    temporary = _beside(path)
    retired = temporary.with_name(temporary.name + _OLD)
    temporary.mkdir()
    held = _lock(temporary)
    try:
        yield temporary
        if path.exists():
            path.rename(retired)
        temporary.rename(path)
    finally:
        if retired.exists() and not path.exists():
            retired.rename(path)
        shutil.rmtree(temporary, ignore_errors=True)
        _discard(retired, temporary)
        if held is not None:
            os.close(held)


def _beside(path: Path, suffix: str = "") -> Path:
    return path.with_name(f".{path.name}{_PART}{secrets.token_hex(4)}{suffix}")


def _tidy(path: Path) -> None:
    """Remove the temporary folders of processes that were killed while they wrote `path`; restore what they moved."""
    for left in path.parent.glob(f".{glob.escape(path.name)}{_PART}*"):
        with contextlib.suppress(OSError):  # another process tidies, too
            if time.time() - left.stat().st_ctime < _YOUNG:  # may not be locked yet
                continue
            held = _lock(left)
            if held is None:  # somebody is at work there
                continue
            try:
                if left.suffix == _OLD and not path.exists():
                    left.rename(path)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(held)


def _lock(folder: Path) -> int | None:
    """A lock that ends with this process; None where another one holds it, or the file system has none."""
    try:
        import fcntl

        held = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(held)
        return None
    return held


def remove_folder(path: Path) -> None:
    """Remove a folder; killed on the way, it is gone from its place, and what is left of it is in nobody's way."""
    for left in path.parent.glob(f".{glob.escape(path.name)}{_PART}*{_GONE}"):
        shutil.rmtree(left, ignore_errors=True)
    _discard(path, _beside(path, _GONE))


def _discard(path: Path, gone: Path) -> None:
    """Remove a folder under the name `gone`, so that nobody meets half of it; of a link, the link alone."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as sorted, indented JSON (stable bytes for equal values)."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file; a damaged one is a GemstError that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise GemstError(f"{path} is not valid JSON ({error})", "Delete it and run the stage that writes it") from None


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require(path: Path, made_by: str) -> Path:
    """Return `path`, or raise a GemstError that names the command which makes it."""
    if not path.exists():
        raise GemstError(f"{path} does not exist", f"Run `{made_by}` first")
    return path

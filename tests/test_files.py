"""Nobody ever meets half a file."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gemst import files
from gemst.errors import GemstError


def test_a_failed_write_leaves_the_old_file_and_no_trace(tmp_path):
    path = tmp_path / "a" / "x.json"
    files.write_json(path, {"b": 1, "a": 2})
    before = path.read_bytes()
    with pytest.raises(ZeroDivisionError), files.atomic_file(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


def test_a_failed_folder_leaves_the_old_folder_and_no_trace(tmp_path):
    folder = tmp_path / "out"
    for content in ("one", "two"):
        with files.atomic_folder(folder) as temporary:
            (temporary / content).write_text(content)
    assert [p.name for p in folder.iterdir()] == ["two"]
    with pytest.raises(KeyboardInterrupt), files.atomic_folder(folder) as temporary:
        (temporary / "half").write_text("")
        raise KeyboardInterrupt
    assert [p.name for p in folder.iterdir()] == ["two"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_interrupted_swap_leaves_the_old_folder(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").touch()
    real = Path.rename

    def rename(self, target):
        if target == tmp_path / "out" and not self.name.endswith(".old"):
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt), files.atomic_folder(tmp_path / "out") as folder:
        (folder / "new").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "kept"]


KILLED = """
import os, signal, sys
from pathlib import Path
from gemst import files
with files.atomic_folder(Path(sys.argv[1])) as folder:
    (folder / "half").touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_removed_and_what_another_writes_stays(tmp_path, monkeypatch):
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "out")], check=False)
    (left,) = tmp_path.iterdir()
    with files.atomic_folder(tmp_path / "out"):
        assert left.exists()  # young: it may be another's that is about to be locked
    monkeypatch.setattr(files, "_YOUNG", -1.0)
    with files.atomic_folder(tmp_path / "out") as first:
        assert not left.exists()
        with files.atomic_folder(tmp_path / "out"):
            assert first.exists()


def test_a_folder_that_was_moved_away_by_a_killed_process_comes_back(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_YOUNG", -1.0)
    (tmp_path / ".out.part-1234.old").mkdir()
    (tmp_path / ".out.part-1234.old" / "kept").touch()
    with pytest.raises(ZeroDivisionError), files.atomic_folder(tmp_path / "out"):
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "kept"]


def test_what_was_removed_in_part_is_never_put_back(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_YOUNG", -1.0)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, ignore_errors: None)  # as killed before it
        with files.atomic_folder(tmp_path / "out"):
            pass
    (tmp_path / "out").rmdir()
    with pytest.raises(ZeroDivisionError), files.atomic_folder(tmp_path / "out"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_linked_folder_is_replaced_and_what_it_led_to_stays(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "kept").touch()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    with files.atomic_folder(tmp_path / "out"):
        pass
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["disk", "kept", "out"]
    assert not (tmp_path / "out").is_symlink()


def test_a_removal_that_is_killed_leaves_nothing_in_the_way(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "state").touch()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, ignore_errors: None)
        files.remove_folder(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    files.remove_folder(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_who_may_read_and_write_is_the_umask_s_to_say(tmp_path, mask):
    before = os.umask(mask)
    try:
        files.write_json(tmp_path / "x.json", 1)
        with files.atomic_folder(tmp_path / "out"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "x.json").stat().st_mode & 0o777 == 0o666 & ~mask
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~mask


def test_equal_values_are_equal_bytes(tmp_path):
    files.write_json(tmp_path / "x", {"b": 1, "a": [1.5, "é"]})
    files.write_json(tmp_path / "y", {"a": [1.5, "é"], "b": 1})
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()
    assert files.read_json(tmp_path / "x") == {"a": [1.5, "é"], "b": 1}


def test_a_damaged_json_is_named(tmp_path):
    (tmp_path / "x.json").write_bytes(b'{"a": \xff')
    with pytest.raises(GemstError, match=r"x\.json is not valid JSON"):
        files.read_json(tmp_path / "x.json")


def test_sha256_of_the_bytes(tmp_path):
    (tmp_path / "x").write_bytes(b"abc" * 100_000)
    assert files.sha256(tmp_path / "x") == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_a_missing_input_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(GemstError, match=r"tables does not exist\. Run `gemst ingest` first"):
        files.require(tmp_path / "tables", made_by="gemst ingest")
    assert files.require(tmp_path, made_by="x") == tmp_path

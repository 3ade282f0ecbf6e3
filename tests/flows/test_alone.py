"""A folder's lock, between processes and within one."""

import subprocess
import sys
import threading

import pytest

from flows.alone import alone

HOLDER = """
import sys
from pathlib import Path
from flows.alone import alone
with alone(Path(sys.argv[1]), "nobody", print):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("killed", [False, True])
def test_the_second_waits_for_the_first_to_end_or_die(tmp_path, killed):
    place = tmp_path / "work" / ".lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(place)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdin
        assert first.stdout
        assert first.stdout.readline() == "held\n"
        said, entered = [], threading.Event()

        def second():
            with alone(place, "another run", said.append):
                entered.set()

        thread = threading.Thread(target=second, daemon=True)
        thread.start()
        assert not entered.wait(0.5)
        assert said == ["another run is at work in this folder: waiting for it to end"]
        first.kill() if killed else first.stdin.close()
        assert entered.wait(30)
        thread.join(30)


def test_nobody_waits_in_an_empty_folder(tmp_path):
    with alone(tmp_path / ".lock", "another run", lambda words: pytest.fail(words)):
        pass

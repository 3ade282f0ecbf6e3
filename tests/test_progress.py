"""What the person at the terminal, or at the log, is told."""

import json
import subprocess
import sys

import pytest

from gemst import progress


class Terminal:
    """A stderr that says it is a terminal."""

    def __init__(self):
        self.text = ""

    def isatty(self):
        return True

    def write(self, text):
        self.text += text
        return len(text)

    def flush(self):
        pass


@pytest.fixture
def clock(monkeypatch):
    """A clock set by hand."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_every_ten_seconds(clock, capsys):
    with progress.Progress("tuning", total=100) as bar:
        for second in range(35):
            clock[0] = 100.0 + second
            bar.advance(f"loss {second}")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "tuning: 11 of 100, 1 min 21 s left, loss 10",
        "tuning: 21 of 100, 1 min 15 s left, loss 20",
        "tuning: 31 of 100, 1 min 7 s left, loss 30",
    ]


def test_resumed_work_is_not_counted_as_fast(clock, capsys):
    with progress.Progress("tuning", total=100, done=80) as bar:
        clock[0] += 10
        bar.advance()
    assert capsys.readouterr().err == "tuning: 81 of 100, 3 min 10 s left\n"


def test_short_work_is_silent_and_long_work_has_a_bar(clock, monkeypatch):
    monkeypatch.setattr(progress.sys, "stderr", terminal := Terminal())
    list(progress.track(range(5), "quick"))
    assert terminal.text == ""
    with progress.Progress("slow", total=4) as bar:
        clock[0] += 3
        bar.advance("half way", by=2)
        assert "slow" in terminal.text
        assert "2/4" in terminal.text


def test_track_yields_everything_and_knows_the_length(clock, capsys):
    seen = []
    for item in progress.track(["a", "b"], "letters"):
        clock[0] += 11
        seen.append(item)
    assert seen == ["a", "b"]
    assert "letters: 1 of 2" in capsys.readouterr().err
    assert list(progress.track((i for i in range(3)), "unknown length")) == [0, 1, 2]


def test_summary_is_printed_and_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with progress.stage("ingest") as summary:
        summary.read["events"] = 100_000
        summary.written["tables"] = "artifacts/tables"
        summary.dropped["no title"] = 3
        summary.notes.append("all is well")
    out = capsys.readouterr().out
    assert out.startswith("ingest: done in 0.")
    assert "peak memory" in out.splitlines()[0]
    assert out.splitlines()[1:] == [
        "  read     events 100,000",
        "  written  tables artifacts/tables",
        "  dropped  no title 3",
        "  note     all is well",
    ]
    kept = json.loads(progress.summary_path("ingest").read_text())
    assert kept["read"] == {"events": 100_000}
    assert kept["peak_mib"] > 10


def test_a_failed_stage_keeps_no_summary(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="x"), progress.stage("ingest"):
        raise ValueError("x")
    assert capsys.readouterr().out == ""
    assert not progress.summary_path("ingest").exists()


def test_peak_memory_grows_with_what_is_held():
    # In a process of its own: a high-water mark never falls, so other tests of this one may have set it.
    code = (
        "from gemst.progress import peak_mib; before = peak_mib(); held = bytearray(200 << 20); "
        "grown = peak_mib() - before; del held; print(before, grown, peak_mib() - before)"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    before, grown, afterwards = map(float, said.split())
    assert before > 5
    assert 190 <= grown < 230
    assert afterwards >= grown

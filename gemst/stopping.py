"""How a program of gemst ends when it is told to."""

from __future__ import annotations

import signal


def stop_cleanly() -> None:
    """Let SIGTERM end this program as Ctrl-C does: what it has started is ended, what it was writing is put right."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)

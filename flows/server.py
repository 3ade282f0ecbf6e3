"""Whether the Prefect server that PREFECT_API_URL names is there: said in a line, before anything waits for it."""

from __future__ import annotations

import sys

import httpx
from prefect.settings import PREFECT_API_URL

_SECONDS = 10.0


def away(program: str) -> bool:
    """True, and said so on stderr, when a server is named and nothing answers there.

    Without PREFECT_API_URL there is nothing to be away: Prefect starts a server for the flow.
    """
    url = PREFECT_API_URL.value()
    if not url:
        return False
    try:
        httpx.get(f"{url}/health", timeout=_SECONDS)
    except httpx.TransportError as error:
        print(
            f"{program}: no Prefect server answers at {url} ({error}). Start `prefect server start`, or "
            "`unset PREFECT_API_URL` to run without one",
            file=sys.stderr,
        )
        return True
    return False

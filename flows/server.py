"""Whether the Prefect server that is asked for is there: said in a line, before anything waits for it."""

from __future__ import annotations

import sys

import httpx
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL


def away(program: str) -> bool:
    """True, and said so on stderr, when a server is named and nothing answers there.

    Without an address there is nothing to be away: Prefect starts a server for the flow.
    """
    url = PREFECT_API_URL.value()
    if not url:
        return False
    with get_client(sync_client=True) as client:
        error = client.api_healthcheck()
    if not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):  # a slow one is there
        return False
    print(
        f"{program}: no Prefect server answers at {url} ({error}). Start `prefect server start`, or take the address "
        "away (`unset PREFECT_API_URL`, `prefect config unset PREFECT_API_URL`) to run without one",
        file=sys.stderr,
    )
    return True

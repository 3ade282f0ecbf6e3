"""Today's items and counts for the champion, between two tunings: `python -m flows.refresh`, or its deployment.

fetch, ingest and validate as in the pipeline, with the same cache, then `gemst append`. Nothing is trained: the next
pipeline starts from these tables and does not make them again.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from flows import server
from flows.alone import alone
from flows.tasks import LOCK, OTHERS, chain, summary
from gemst import params
from gemst.errors import GemstError
from gemst.stopping import stop_cleanly


@flow(name="refresh", flow_run_name="refresh", retries=0, persist_result=False)
def refresh() -> State[Any]:
    """The champion with what the logs hold now. Ends as Failed, with its one-line reason, at the first step that fails.

    A failed expectation keeps the champion as it is.
    """
    try:
        params.load()
    except GemstError as error:
        return Failed(message=str(error))
    with alone(LOCK, OTHERS, get_run_logger().info):
        states, failed = chain(("fetch", "ingest", "validate", "append"))
    if failed:
        return Failed(message=failed)
    return Completed(message=summary("append")["notes"][-1], data=states)


def main() -> int:
    """Run the flow here and now; its API is the one of PREFECT_API_URL or a server that lives as long as the flow."""
    argparse.ArgumentParser(prog="python -m flows.refresh", description=__doc__).parse_args()
    stop_cleanly()
    if server.away("refresh"):
        return 1
    state: State[Any] = refresh(return_state=True)
    print(f"refresh: {state.message}", file=sys.stdout if state.is_completed() else sys.stderr)
    return 0 if state.is_completed() else 1


if __name__ == "__main__":
    sys.exit(main())

"""Work pools, deployments and the watch over runs, on the server of PREFECT_API_URL: `python -m flows.deploy`.

Run again, it updates them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from datetime import timedelta

from prefect.automations import Automation
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectAlreadyExists
from prefect.settings import PREFECT_API_URL

from flows import server

# pool -> flow runs at a time. A GPU takes one; the CPU pool is bounded by the deployments' own limits.
POOLS = {"cpu": None, "gpu": 1}
# A run whose worker died sends no heartbeat (one in three minutes) and would hold its pool's place for ever.
HEARTBEAT, SILENCE = "prefect.flow-run.heartbeat", timedelta(minutes=10)


def make_pools() -> None:
    """Create the process pools, or set the limits of those that exist."""
    with get_client(sync_client=True) as client:
        for name, limit in POOLS.items():
            try:
                client.create_work_pool(WorkPoolCreate(name=name, type="process", concurrency_limit=limit))
            except ObjectAlreadyExists:
                client.update_work_pool(name, WorkPoolUpdate(concurrency_limit=limit))


def watch_heartbeats() -> None:
    """Create or renew the automation that marks silent runs as crashed (Prefect's "detect zombie flows")."""
    ended = {f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed")}
    watch = Automation(
        name="gemst: runs that fell silent",
        description="A flow run without a heartbeat has lost its worker: it becomes Crashed and frees its place.",
        trigger=EventTrigger(
            after={HEARTBEAT}, expect={HEARTBEAT, *ended}, for_each={"prefect.resource.id"},
            match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
            posture=Posture.Proactive, threshold=1, within=SILENCE,
        ),
        actions=[ChangeFlowRunState(state=StateType.CRASHED, message="no heartbeat: the worker is gone")],
    )  # fmt: skip
    with get_client(sync_client=True) as client:
        for old in client.read_automations_by_name(watch.name):
            client.delete_automation(old.id)
    watch.create()


def main() -> int:
    """Make the pools and the watch, then deploy everything in prefect.yaml."""
    argparse.ArgumentParser(prog="python -m flows.deploy", description=__doc__).parse_args()
    if not PREFECT_API_URL.value():
        print(
            "flows.deploy: PREFECT_API_URL is not set. Start `prefect server start`, then "
            "`export PREFECT_API_URL=http://127.0.0.1:4200/api`",
            file=sys.stderr,
        )
        return 1
    if server.away("flows.deploy"):
        return 1
    make_pools()
    watch_heartbeats()
    return subprocess.run([sys.executable, "-m", "prefect", "deploy", "--all", "--no-prompt"], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())

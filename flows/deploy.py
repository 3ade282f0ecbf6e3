"""Work pools and deployments on the server of PREFECT_API_URL: `python -m flows.deploy`. Run again, it updates them."""

from __future__ import annotations

import argparse
import subprocess
import sys

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.exceptions import ObjectAlreadyExists
from prefect.settings import PREFECT_API_URL

# pool -> flow runs at a time. A GPU takes one; the CPU pool is bounded by the deployments' own limits.
POOLS = {"cpu": None, "gpu": 1}


def make_pools() -> None:
    """Create the process pools, or set the limits of those that exist."""
    with get_client(sync_client=True) as client:
        for name, limit in POOLS.items():
            try:
                client.create_work_pool(WorkPoolCreate(name=name, type="process", concurrency_limit=limit))
            except ObjectAlreadyExists:
                client.update_work_pool(name, WorkPoolUpdate(concurrency_limit=limit))


def main() -> int:
    """Make the pools, then deploy everything in prefect.yaml."""
    argparse.ArgumentParser(prog="python -m flows.deploy", description=__doc__).parse_args()
    if not PREFECT_API_URL.value():
        print(
            "flows.deploy: PREFECT_API_URL is not set. Start `prefect server start`, then "
            "`export PREFECT_API_URL=http://127.0.0.1:4200/api`",
            file=sys.stderr,
        )
        return 1
    make_pools()
    return subprocess.run([sys.executable, "-m", "prefect", "deploy", "--all", "--no-prompt"], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())

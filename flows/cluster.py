"""Work pools, their deployments and their workers; and all of it on one machine, to try it."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from flows.clones import CLONE
from flows.server import PATIENT, QUIET, own_server
from flows.supervise import Supervisor

POOLS = ("cpu", "gpu", "api", "retrain")
PROJECT = Path(__file__).parents[1]
HOME = Path(".prefopt/cluster")
ROOT = "PREFOPT_ROOT"  # of prefect.yaml: the repository that is retrained
RESTART_SECONDS = 5.0
# A free worker asks so often for work, unless told otherwise: by itself every ten seconds.
PROMPT = {"PREFECT_WORKER_QUERY_SECONDS": "2"}


def deploy(api_at_once: int) -> None:
    """Make the work pools that are missing, the limit of the API, and prefect.yaml's deployments.

    Args:
        api_at_once: stages of the pool `api` that run at the same time, on all machines.

    Raises:
        RuntimeError: if Prefect refuses.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists
    from prefect.workers.process import ProcessWorker

    template = ProcessWorker.get_default_base_job_template()
    with get_client(sync_client=True) as client:
        for pool in POOLS:
            try:
                client.create_work_pool(
                    WorkPoolCreate(
                        name=f"prefopt-{pool}", type="process", base_job_template=template
                    )
                )
            except ObjectAlreadyExists:
                continue  # Perhaps of another type: Kubernetes, say.
        client.upsert_global_concurrency_limit_by_name("prefopt-api", api_at_once)
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"],
        cwd=PROJECT,
        env=os.environ | QUIET | {ROOT: str(Path.cwd())},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"prefect deploy: it failed, got {done.stdout}{done.stderr}")


def work(pool: str, clone: Path | None, at_once: int) -> None:
    """Be a worker until SIGTERM or SIGINT; one that gave up on a silent server is started again.

    Args:
        pool: whose stages.
        clone: where it works, made when the first stage comes; None for rounds of retraining.
        at_once: stages at the same time.

    Raises:
        ValueError: if no server is configured, the pool is unknown, or has no use for a clone, or
            needs one.
    """
    require_place(pool, clone)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    require_server()
    with Supervisor() as supervisor:
        while True:
            start_worker(supervisor, pool, clone, at_once).wait()
            time.sleep(RESTART_SECONDS)


def require_place(pool: str, clone: Path | None) -> None:
    """Refuse a pool that nobody has, and a clone where it is not used or is lacking.

    Raises:
        ValueError: with the remedy.
    """
    if pool not in POOLS:
        raise ValueError(f"worker: no such pool, got {pool}; one of {', '.join(POOLS)}")
    if pool == "retrain" and clone is not None:
        raise ValueError(
            "worker --clone: rounds run in the repository where `prefopt deploy` was given, got "
            f"{clone}; leave it out"
        )
    if pool != "retrain" and clone is None:
        raise ValueError(
            f"worker --clone: stages of the pool {pool} run in a clone, got none; name a folder"
        )


def start_worker(
    supervisor: Supervisor, pool: str, clone: Path | None, at_once: int = 1
) -> subprocess.Popen[bytes]:
    """Start a worker, which ends together with what it runs; the environment is its own."""
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").replace(",", "-")
    place = clone.resolve().name if clone else ""
    name = "-".join(filter(None, [socket.gethostname(), place, pool, gpus]))
    command = [
        *(sys.executable, "-m", "prefect", "worker", "start", "--name", name),
        *("--pool", f"prefopt-{pool}", "--type", "process", "--install-policy", "never"),
        *("--limit", str(at_once)),
    ]
    # `python` in prefect.yaml is to be this one.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    here = {"PATH": path} | ({CLONE: str(clone.resolve())} if clone else {})
    environment = {**PROMPT, **os.environ, **QUIET, **PATIENT, **here}
    return supervisor.start(command, environment, None)


def try_out(say: Callable[[str], None]) -> None:
    """Be a server and two workers on this machine until SIGTERM or SIGINT.

    Args:
        say: is told what to do with them.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with own_server(HOME) as url, Supervisor() as supervisor:
        os.environ["PREFECT_API_URL"] = url  # Prefect, not yet imported, and its programs read it.
        deploy(api_at_once=2)
        workers = [start_worker(supervisor, "cpu", HOME / f"clone-{i}") for i in (1, 2)]
        say(
            f"a Prefect server and two workers are up; in another terminal:\n"
            f"  PREFECT_API_URL={url} python -m flows.pipeline --pools --only cpu"
        )
        for worker in workers:
            worker.wait()


def require_server() -> None:
    """Refuse to go on without a server that others speak to as well."""
    from prefect.settings import PREFECT_API_URL

    if not PREFECT_API_URL.value():
        raise ValueError(
            "PREFECT_API_URL: workers and coordinators need a server of theirs, got nothing; "
            "start `prefect server start` or `make cluster`, and set it to that server's /api"
        )

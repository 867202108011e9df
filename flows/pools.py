"""The graph of `dvc.yaml` by workers on many machines: `python -m flows.pipeline --pools`.

The coordinator, this flow, computes nothing. It starts a run of prefopt-stage/POOL for each stage
when what the stage needs is done, and puts what comes back into dvc.lock, which in the end is the
one that `dvc repro` on one machine leaves. If a worker dies, its stage goes to another.
"""

import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from uuid import UUID

import httpx
from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, State, WorkerStatus
from prefect.deployments import run_deployment
from prefect.exceptions import PrefectHTTPStatusError
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run
from prefect.states import Cancelling, Crashed

from flows.alive import check_in, end
from flows.artifacts import show_results
from flows.clones import (
    REFS,
    fetch_file,
    origin_of,
    publish_lock,
    remove_refs,
    require_committed,
    require_remote,
)
from flows.graph import LOCK, Demands, adopt_entry, parse_entries, read_plan, restore_order
from flows.leftovers import remove_leftovers
from flows.locks import hold_workspace
from flows.reproduce import POLL_SECONDS, StageError, run_plan

LIVES = 3  # workers that may die of one stage
MOST = 64  # stages submitted at once: the workers set the pace
# Heartbeats, beyond the three after which Prefect calls a worker offline, until we believe it.
SILENT_HEARTBEATS = 2
AWAY = (httpx.TransportError, PrefectHTTPStatusError)


class Coordinator:
    """What the stages of one run share: the workspace, its ref, and who works for it."""

    def __init__(self, root: Path, origin: str, run: str) -> None:
        self.root, self.origin, self.ref = root, origin, f"{REFS}/{run}"
        self.ended = False
        self._published = "HEAD"
        self._lock = threading.Lock()
        self._children: set[UUID] = set()

    def start(self, name: str, needs: Iterable[str], demands: Demands) -> UUID:
        """Have the stage run by the next free worker of its pool; gives its flow run."""
        with self._lock:
            commit = publish_lock(self.root, self.ref, origin=self.origin, after=self._published)
            # A worker fetches the ref, which may have gone on by then.
            self._published = commit
        place = {"ref": self.ref, "commit": commit, "origin": self.origin}
        started = run_deployment(
            f"prefopt-stage/{demands.pool}",
            flow_run_name=name,
            parameters={"stage": name, "needs": sorted(needs), **place, **asdict(demands)},
            timeout=0,
        )
        assert isinstance(started, FlowRun)
        self._children.add(started.id)
        return started.id

    def adopt(self, name: str, child: UUID) -> None:
        """Put what a child's dvc.lock says of its stage into ours."""
        ref = f"{self.ref}-{child}"
        with self._lock:
            text = fetch_file(self.root, ref, LOCK, origin=self.origin)
            adopt_entry(self.root, name, parse_entries(text)[name])

    def forget(self, child: UUID) -> None:
        """Of a child that has ended."""
        self._children.discard(child)

    def close(self) -> None:
        """Cancel who still runs, and remove the refs."""
        self.ended = True
        # A server that is away has no workers that listen.
        with get_client(sync_client=True) as client, suppress(*AWAY):
            for child in self._children:
                client.set_flow_run_state(child, Cancelling())
        remove_refs(self.root, f"{self.ref}*", origin=self.origin)


@flow(name="prefopt-pools", persist_result=False)
def distribute(root: str = ".", only: str | None = None) -> State[None]:
    """Bring every stage up to date by the workers of its pool; dvc.lock comes back, no data.

    Args:
        root: a workspace whose tracked files are committed, in a clone of what workers clone.
        only: a pool that all stages go to, whatever they ask for.

    Raises:
        ValueError: if something is not committed, or DVC has no remote.
    """
    folder = Path(root)
    killed = check_in()
    with hold_workspace(folder, get_run_logger().info):
        require_committed(folder)
        require_remote(folder)
        remove_leftovers(folder, get_run_logger().info)
        plan = read_plan(folder, without_data=True)
        if only is not None:
            demands = {name: replace(asked, pool=only) for name, asked in plan.demands.items()}
            plan = replace(plan, demands=demands)
        origin = origin_of(folder)
        for run in killed:
            remove_refs(folder, f"{REFS}/{run}*", origin=origin)
        coordinator = Coordinator(folder, origin, str(flow_run.id))

        def submit(name: str) -> PrefectFuture[None]:
            named = dispatch_stage.with_options(task_run_name=name)
            return named.submit(name, plan.needs[name], plan.demands[name], coordinator)

        try:
            state = run_plan(plan, MOST, submit)
            if state.is_completed():
                show_results(folder)
            return state
        finally:
            coordinator.close()
            restore_order(folder, plan)


@task(cache_policy=NO_CACHE, persist_result=False)
def dispatch_stage(
    name: str, needs: frozenset[str], demands: Demands, coordinator: Coordinator
) -> None:
    """Have a worker run the stage; if the worker dies, another."""
    deaths = 0
    while True:
        child = coordinator.start(name, needs, demands)
        state = _end_of(child, demands.pool, coordinator)
        coordinator.forget(child)
        if state.is_completed():
            coordinator.adopt(name, child)
            return
        deaths += state.is_crashed()
        if not state.is_crashed() or deaths == LIVES:
            raise StageError(
                f"stage '{name}': it failed, got {state.name} of flow run {child}, "
                f"{state.message}; its log says why",
                retries=0,
            )
        get_run_logger().warning("%s; the stage goes to another worker", state.message)


def _end_of(child: UUID, pool: str, coordinator: Coordinator) -> State[None]:
    """Wait for a flow run's end, or for its worker's."""
    silent_since: float | None = None
    with get_client(sync_client=True) as client:
        while not coordinator.ended:
            time.sleep(POLL_SECONDS)
            try:
                run = client.read_flow_run(child)
                assert run.state is not None
                if run.state.is_final():
                    return run.state
                patience = _silence(client, run, pool)
            except AWAY:
                silent_since = None  # The server is away, and with it the heartbeats.
                continue
            if patience is None:
                silent_since = None
            elif silent_since is None:
                silent_since = time.monotonic()
            elif time.monotonic() - silent_since > patience:
                why = f"worker {_worker_of(run)} fell silent"
                end(client, child, why)
                return Crashed(message=why)
    return Cancelling(message="the coordinator ended")


def _silence(client: SyncPrefectClient, run: FlowRun, pool: str) -> float | None:
    """If the run's worker is offline, how many further seconds to wait for it."""
    name = _worker_of(run)
    for worker in client.read_workers_for_work_pool(f"prefopt-{pool}") if name else []:
        if worker.name == name and worker.status == WorkerStatus.OFFLINE:
            return SILENT_HEARTBEATS * (worker.heartbeat_interval_seconds or 30)
    return None


def _worker_of(run: FlowRun) -> str | None:
    name = run.labels.get("prefect.worker.name")
    return None if name is None else str(name)

"""The graph of `dvc.yaml` as a Prefect flow: a task for each stage that is out of date.

A task runs `dvc repro` on its stage alone, so what is done, and what dvc.lock says of it, is what
DVC would have done; Prefect decides when, keeps the logs, and goes on where a run has failed.
Here in the workspace itself; `flows.pools` goes through the same graph with workers elsewhere.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import httpx
from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State, TaskRun
from prefect.concurrency.sync import concurrency as limit
from prefect.exceptions import PrefectHTTPStatusError
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run
from prefect.states import Cancelled, Completed, Failed
from prefect.tasks import Task, exponential_backoff

from flows.alive import check_in
from flows.artifacts import identity, progress, publish
from flows.graph import MAX_RETRIES, Demands, Plan, read_plan, restore_order
from flows.leftovers import remove_leftovers
from flows.locks import hold_gpus, hold_workspace
from flows.supervise import Supervisor

# What DVC, or a stage, says when another process is in the way: the same can succeed later.
BUSY = ("Unable to acquire lock", "is busy, it is being blocked by", "another process runs it")
# What DVC says when the stage's own command failed, and not DVC around it.
FAILED = "failed to run: "
POLL_SECONDS = 2.0

Submit = Callable[[str], PrefectFuture[None]]


class StageError(Exception):
    """A stage failed: the message, and how many further tries it is to have."""

    def __init__(self, message: str, retries: int) -> None:
        super().__init__(message)
        self.retries = retries


class BusyError(Exception):
    """What the stage needs was not to be had, and may be later: a lock, or the remote."""


@flow(name="prefopt-pipeline", persist_result=False)
def reproduce(root: str = ".", concurrency: int = 2) -> State[None]:
    """Bring every stage up to date, several at once; a failure stops its dependants only.

    Args:
        root: the workspace.
        concurrency: stages at once.
    """
    if concurrency < 1:
        raise ValueError(f"concurrency: must be at least 1, got {concurrency}; 1 is serial")
    folder = Path(root)
    check_in()
    with hold_workspace(folder, get_run_logger().info) as lock:
        remove_leftovers(folder, get_run_logger().info)
        plan = read_plan(folder)
        environment = stage_environment(str(flow_run.id), Path.cwd())
        try:
            with Supervisor([lock]) as supervisor:

                def submit(name: str) -> PrefectFuture[None]:
                    named = reproduce_stage.with_options(task_run_name=name)
                    return named.submit(
                        name, plan.demands[name], environment, supervisor, folder=folder
                    )

                state = run_plan(plan, concurrency, submit)
                publish(folder, supervisor, environment, whole=state.is_completed())
                return state
        finally:
            restore_order(folder, plan)


def run_plan(plan: Plan, concurrency: int, submit: Submit) -> State[None]:
    """Submit what is out of date, each after what it needs; the state that the flow ends in."""
    current = [name for name in plan.order if name not in plan.outdated]
    get_run_logger().info("%d stages are current: %s", len(current), ", ".join(current) or "none")
    done: set[str] = set()
    failed: set[str] = set()
    waiting = set(plan.outdated)
    running: dict[PrefectFuture[None], str] = {}
    ended: SimpleQueue[PrefectFuture[None]] = SimpleQueue()
    while True:
        for name in plan.ready(waiting, done)[: concurrency - len(running)]:
            waiting.remove(name)
            future = submit(name)
            running[future] = name
            future.add_done_callback(ended.put)
        if not running:
            return _final_state(plan, done, failed)
        try:
            future = ended.get(timeout=POLL_SECONDS)
        except Empty:
            if _is_cancelled():
                return Cancelled(message=f"cancelled; done: {', '.join(sorted(done)) or 'none'}")
            continue
        future.wait()  # It has ended, but does not know its state before it is asked to wait.
        (done if future.state.is_completed() else failed).add(running.pop(future))


def _final_state(plan: Plan, done: set[str], failed: set[str]) -> State[None]:
    if not failed:
        return Completed(message=f"{len(done)} stages were out of date, now all are current")
    not_reached = [name for name in plan.order if name in plan.outdated - done - failed]
    return Failed(
        message=f"failed: {', '.join(name for name in plan.order if name in failed)}; "
        f"not reached: {', '.join(not_reached) or 'none'}"
    )


def _is_cancelled() -> bool:
    """Whether somebody wants this flow run to end; who has no worker above it must ask."""
    try:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(flow_run.id).state
    except (httpx.TransportError, PrefectHTTPStatusError):
        return False  # The server is away, and we go on without it.
    return state is not None and (state.is_cancelling() or state.is_cancelled())


def stage_environment(flow_run_id: str, home: Path) -> dict[str, str]:
    """Our environment, less Prefect's settings: a stage knows of the flow by its id only.

    Args:
        flow_run_id: of the flow.
        home: where MLflow's file lies, if no server is set; it outlives a worktree.
    """
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
    # `python` in dvc.yaml is to be this Python, whether or not its environment is activated.
    path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", os.defpath)])
    tracked = {"MLFLOW_TRACKING_URI": f"sqlite:///{home}/mlflow.db"}
    ours = {"PATH": path, "PREFOPT_FLOW_RUN_ID": flow_run_id, "TQDM_DISABLE": "1"}
    return tracked | kept | ours


def _may_succeed_later(_task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    match state.data:
        case BusyError():
            return True
        case StageError(retries=retries):
            return run.run_count <= retries
        case _:
            return False


# DVC is the only cache: Prefect's would be a second truth, which can disagree.
dvc_task = task(
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=MAX_RETRIES,
    retry_delay_seconds=exponential_backoff(backoff_factor=5),
    retry_condition_fn=_may_succeed_later,
)


@dvc_task
def reproduce_stage(
    name: str,
    demands: Demands,
    environment: Mapping[str, str],
    supervisor: Supervisor,
    *,
    folder: Path,
    pull: bool = False,
) -> None:
    """Let DVC bring one stage up to date; its output goes to the task's log.

    Args:
        name: of the stage.
        demands: what it is given before it starts.
        environment: of DVC and the stage.
        supervisor: of its processes.
        folder: where dvc.yaml lies.
        pull: what is missing, and what the run cache of others has, comes from the remote.
    """
    with ExitStack() as given:
        slots = given.enter_context(hold_gpus(demands.gpus, lambda: supervisor.closed))
        if demands.pool == "api":
            # Renewing it fails when the server is away, which is no reason to end a stage.
            given.enter_context(
                limit("prefopt-api", occupy=1, raise_on_lease_renewal_failure=False)
            )
        # -s, because DVC would lock, for writing, the outputs of all stages before it.
        command = ["repro", *(["--pull"] if pull else []), "--single-item", name]
        given.enter_context(progress(name, folder))
        told = {**environment, **identity(), **slots.environment}
        dvc = run_dvc(command, told, supervisor, folder, slots.locks)
    if dvc.status == 0:
        return
    if dvc.says(*BUSY):
        raise BusyError(f"stage '{name}': another process is in the way, got {dvc.reason}")
    if pull and not dvc.says(FAILED):
        raise BusyError(f"stage '{name}': it was not reached, got {dvc.reason}")
    raise StageError(
        f"stage '{name}': it failed, got status {dvc.status} of dvc; "
        f"see the log above, and `dvc repro --single-item {name}` repeats it",
        demands.retries,
    )


@dataclass(frozen=True)
class Outcome:
    """Of a command of DVC's."""

    status: int
    said: tuple[str, ...]

    def says(self, *signs: str) -> bool:
        """Whether one of the signs is in what it said."""
        return any(sign in line for line in self.said for sign in signs)

    @property
    def reason(self) -> str:
        """Its last error, or the last that it said."""
        errors = [line for line in self.said if line.startswith("ERROR")]
        return [f"status {self.status}", *self.said, *errors][-1]


def run_dvc(
    command: Sequence[str],
    environment: Mapping[str, str],
    supervisor: Supervisor,
    folder: Path,
    locks: Sequence[int] = (),
) -> Outcome:
    """Run DVC, which waits for its lock, and log what it says."""
    log = get_run_logger()
    said: list[str] = []

    def hear(line: str) -> None:
        said.append(line)
        log.info("%s", line)

    # Without that wait, a lock that is busy when a training ends loses the training.
    patient = ["--wait-for-lock", *command]
    status = supervisor.run_dvc(patient, environment, hear, folder=folder, locks=locks)
    return Outcome(status, tuple(said))

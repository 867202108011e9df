"""The graph of `dvc.yaml` as a Prefect flow: a task for each stage that is out of date.

A task runs `dvc repro` on its stage alone, so what is done, and what dvc.lock says of it, is what
DVC would have done; Prefect decides when, keeps the logs, and goes on where a run has failed.
"""

import os
import sys
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run
from prefect.states import Completed, Failed
from prefect.tasks import Task, exponential_backoff

from flows.artifacts import identity, progress, publish
from flows.graph import Plan, read_plan, restore_order
from flows.supervise import Supervisor

# What DVC says when another process of DVC is in the way: the same command can succeed later.
BUSY = ("Unable to acquire lock", "is busy, it is being blocked by")


class StageError(Exception):
    """A stage failed, and would fail again."""


class BusyError(Exception):
    """Another process of DVC held what the stage needs."""


@flow(name="prefopt-pipeline", persist_result=False)
def reproduce(concurrency: int = 2) -> State[None]:
    """Bring every stage up to date, several at once; a failure stops its dependants only."""
    if concurrency < 1:
        raise ValueError(f"concurrency: must be at least 1, got {concurrency}; 1 is serial")
    log = get_run_logger()
    plan = read_plan()
    current = [name for name in plan.order if name not in plan.outdated]
    log.info("%d stages are current: %s", len(current), ", ".join(current) or "none")
    try:
        with Supervisor() as supervisor:
            done, failed = _run_outdated(plan, concurrency, supervisor)
            publish(Path(), supervisor, stage_environment(str(flow_run.id)), whole=not failed)
    finally:
        restore_order(plan)
    if not failed:
        return Completed(message=f"{len(done)} stages were out of date, now all are current")
    not_reached = [name for name in plan.order if name in plan.outdated - done - failed]
    return Failed(
        message=f"failed: {', '.join(name for name in plan.order if name in failed)}; "
        f"not reached: {', '.join(not_reached) or 'none'}"
    )


def _run_outdated(
    plan: Plan, concurrency: int, supervisor: Supervisor
) -> tuple[set[str], set[str]]:
    """Run what can be run; returns the stages that succeeded and those that failed."""
    environment = stage_environment(str(flow_run.id))
    done: set[str] = set()
    failed: set[str] = set()
    waiting = set(plan.outdated)
    running: dict[PrefectFuture[None], str] = {}
    ended: SimpleQueue[PrefectFuture[None]] = SimpleQueue()
    while True:
        for name in plan.ready(waiting, done)[: concurrency - len(running)]:
            waiting.remove(name)
            named = reproduce_stage.with_options(task_run_name=name)
            future = named.submit(name, environment, supervisor)
            running[future] = name
            future.add_done_callback(ended.put)
        if not running:
            return done, failed
        future = ended.get()
        future.wait()  # It has ended, but does not know its state before it is asked to wait.
        (done if future.state.is_completed() else failed).add(running.pop(future))


def stage_environment(flow_run_id: str) -> dict[str, str]:
    """Our environment, less Prefect's settings: a stage knows of the flow by its id only."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
    # `python` in dvc.yaml is to be this Python, whether or not its environment is activated.
    path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", os.defpath)])
    return kept | {"PATH": path, "PREFOPT_FLOW_RUN_ID": flow_run_id, "TQDM_DISABLE": "1"}


def _is_busy(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    return isinstance(state.data, BusyError)


# DVC is the only cache: Prefect's would be a second truth, which can disagree.
@task(
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=4,
    retry_delay_seconds=exponential_backoff(backoff_factor=5),
    retry_condition_fn=_is_busy,
)
def reproduce_stage(name: str, environment: dict[str, str], supervisor: Supervisor) -> None:
    """Let DVC bring one stage up to date; its output goes to the task's log."""
    log = get_run_logger()
    said: list[str] = []

    def hear(line: str) -> None:
        said.append(line)
        log.info("%s", line)

    # A global flag: without it, a lock that is busy when a training ends loses the training.
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", name]
    with progress(name, Path()):
        status = supervisor.run(command, environment | identity(), hear)
    if status == 0:
        return
    if any(sign in line for line in said for sign in BUSY):
        raise BusyError(f"stage '{name}': another process of DVC is in the way, got {said[-1]}")
    raise StageError(
        f"stage '{name}': it failed, got status {status} of dvc; "
        f"see the log above, and `dvc repro --single-item {name}` repeats it"
    )

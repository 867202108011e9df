"""What a worker does: one stage, in a worktree of its own clone, its data by DVC's remote.

The deployments prefopt-stage/cpu, gpu and api of prefect.yaml are this flow. Environment of the
worker: PREFOPT_CLONE, its clone (./clone, made if it is not there); PREFOPT_SHARED, a folder of
all workers for checkpoints, which go by DVC's remote otherwise.
"""

from pathlib import Path

from prefect import flow
from prefect.runtime import flow_run

from flows.alive import check_in
from flows.artifacts import publish
from flows.clones import own_clone, publish_lock, worktree
from flows.graph import Demands
from flows.handover import handed_over
from flows.keeper import end_with_parent
from flows.reproduce import BusyError, dvc_task, reproduce_stage, run_dvc, stage_environment
from flows.supervise import Supervisor


@flow(name="prefopt-stage", persist_result=False)
def run_stage(
    stage: str,
    needs: list[str],
    ref: str,
    commit: str,
    origin: str,
    pool: str,
    gpus: int,
    retries: int,
) -> None:
    """Bring one stage up to date, push what it left, and dvc.lock as the ref `REF-FLOW_RUN`.

    Args:
        stage: its name.
        needs: the stages whose outputs it reads; they are up to date in the commit.
        ref: of the run of the pipeline.
        commit: of that ref, with dvc.lock as far as the run has got.
        origin: where git finds both.
        pool: of the stage; see `Demands`.
        gpus: that it is to have alone.
        retries: of the stage, if it fails.
    """
    end_with_parent()  # What the worker no longer watches is to end.
    check_in()
    clone = own_clone(origin, ref)
    run = str(flow_run.id)
    environment = stage_environment(run, clone)
    with worktree(clone, commit, run) as tree, Supervisor() as supervisor:
        if needs:
            # Of the stages, because DVC does not pull a folder that several outputs lie in.
            exchange.with_options(task_run_name="pull")(
                ["pull", *needs], environment, supervisor, tree
            )
        demands = Demands(pool, gpus, retries)
        with handed_over(tree, stage):
            reproduce_stage.with_options(task_run_name=stage)(
                stage, demands, environment, supervisor, folder=tree, pull=True
            )
        publish(tree, supervisor, environment, whole=False)
        exchange.with_options(task_run_name="push")(
            ["push", "--run-cache", stage], environment, supervisor, tree
        )
        publish_lock(tree, f"{ref}-{run}", origin=origin)


@dvc_task
def exchange(
    command: list[str], environment: dict[str, str], supervisor: Supervisor, tree: Path
) -> None:
    """Exchange data, and entries of the run cache, with DVC's remote; it may be away for a time."""
    dvc = run_dvc(command, environment, supervisor, tree)
    if dvc.status != 0:
        raise BusyError(f"remote: `dvc {' '.join(command)}` failed, got {dvc.reason}")

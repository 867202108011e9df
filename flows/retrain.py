"""Scheduled retraining: new data, a challenger, a paired test, and a champion that is promoted.

The flow prefopt-retrain is one round, by `prefopt retrain` or the deployment of prefect.yaml. What
is compared, and by which bounds, is `retrain` of params.yaml; who is champion is MLflow's to say.
The flow prefopt-watch emits an event when the source of the data changes, which starts a round.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterStartTime,
)
from prefect.client.schemas.objects import FlowRun, State
from prefect.events import emit_event
from prefect.runtime import deployment, flow_run
from prefect.states import Completed, Failed

from flows.alive import check_in
from flows.artifacts import UNREACHABLE
from flows.clones import SCRATCH, require_remote
from flows.keeper import end_with_parent
from flows.pools import distribute
from flows.programs import ask
from flows.reproduce import reproduce, stage_environment
from flows.rounds import ACCEPTED, CHAMPION, DATA, Round, model_path, new_round

BRANCH = "retrain"
ARRIVED = "prefopt.data.arrived"
# Names of states that are no failures, beside Completed: promoted.
REFUSED, SKIPPED, CAUGHT_UP = "Refused", "Skipped", "CaughtUp"

Bounds = list[dict[str, Any]]


@flow(name="prefopt-retrain", persist_result=False)
def retrain(
    root: str = ".",
    revision: str = "HEAD",
    branch: str = BRANCH,
    concurrency: int = 2,
    *,
    pools: bool = False,
) -> State[None]:
    """One round, whose end is Completed if the challenger is promoted, Refused if it is not.

    Skipped: there are no new data. CaughtUp: a later round did what this one was for. Failed: the
    data are refused, or a stage failed.

    Args:
        root: a repository; its working tree is not touched.
        revision: of it, whose code and parameters the round is of.
        branch: where the rounds are kept.
        concurrency: stages at once, on this machine.
        pools: by the workers of the stages' pools instead, which see the round as commits.

    Raises:
        ValueError: if another round of the branch is under way, or `retrain` cannot be done.
    """
    if deployment.id:
        end_with_parent()  # What the worker no longer watches is to end.
        if later := later_round():
            return Completed(name=CAUGHT_UP, message=f"round {later} did what this one was for")
    check_in()
    folder = Path(root).resolve()
    # MLflow's file, if no server is set, is the repository's and not the worktree's.
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
    environment = stage_environment(str(flow_run.id), folder)
    with new_round(folder, revision, branch, environment) as round_:
        return play(round_, None if pools else concurrency)


def play(round_: Round, concurrency: int | None) -> State[None]:
    """All of a round; the state that the flow ends in.

    Args:
        round_: with nothing done.
        concurrency: stages at once on this machine, or None: by the workers of the pools.
    """
    tree = round_.tree
    if concurrency is None:
        require_remote(tree)
    registry = ask(tree, "registry", "show")
    ask(tree, "pull", DATA, "--root", str(round_.root))
    data = round_.add(DATA)
    for alias in ("champion", "challenger"):
        if is_of(registry[alias], data, round_.code):
            return Completed(name=SKIPPED, message=f"no new data since those of the {alias}")
    champion = registry["champion"]["tags"] if registry["champion"] else {"prefopt.run": "sft"}
    trained = champion["prefopt.run"] != "sft"
    if trained:
        round_.fetch({CHAMPION: champion["dvc.md5"], ACCEPTED: champion["prefopt.data"]})
    drift: Bounds = ask(tree, "drift", DATA, *([ACCEPTED] if trained else []))
    round_.forget(ACCEPTED)
    made = ask(tree, "challenge", *([CHAMPION] if trained else []), "--data", DATA)
    inputs = round_.commit_inputs(f"retraining: data {data[:12]}")
    if unmet(drift):
        round_.publish()
        return Failed(message=tell(f"data {data[:12]} are refused", drift))
    if concurrency is None:
        round_.dvc("push", "--quiet", *round_.pointers)
        state = distribute(str(tree), return_state=True)
    else:
        state = reproduce(str(tree), concurrency, return_state=True)
    if not state.is_completed():
        return Failed(message=f"round {inputs[:12]}: {state.message}")
    if concurrency is None:
        round_.dvc("pull", "--quiet", *ask(tree, "gate", "--reads"))
    gate: Bounds = ask(tree, "gate")
    verdict = "refused" if unmet(gate) else "promoted"
    commit = round_.commit_lock(f"retraining: challenger {verdict}")
    round_.publish()
    tags = {
        "git.commit": commit,
        "prefopt.code": round_.code,
        "prefopt.flow_run": str(flow_run.id),
        "prefopt.start": champion["dvc.md5"] if made["start"] else "sft",
        "prefopt.gate": "; ".join(unmet(gate)) or "holds",
    }
    proposal = {
        "challenger": version(round_, made["run"], tags | {"prefopt.data": data}),
        "first": version(round_, "sft", {"git.commit": commit, "prefopt.data": "none"}),
        "promote": not unmet(gate),
    }
    held = ask(tree, "registry", "decide", json.dumps(proposal))
    number = held["challenger" if unmet(gate) else "champion"]["version"]
    report = f"`dvc get . artefacts/report --rev {commit}` brings the report."
    told = tell(f"{held['name']} version {number} is {verdict}", gate, report)
    return Completed(name=REFUSED if unmet(gate) else None, message=told)


def version(round_: Round, run: str, tags: Mapping[str, str]) -> dict[str, Any]:
    """A model of a round for the registry: where it is, and what it is known by."""
    path = model_path(run)
    return {
        "source": f"dvc://{round_.root.name}@{tags['git.commit']}:{path}",
        "tags": {**tags, "prefopt.run": run, "dvc.path": path, "dvc.md5": round_.made(run)},
    }


def is_of(version: Mapping[str, Any] | None, data: str, code: str) -> bool:
    """Whether a version came of these data and this code."""
    tags = version["tags"] if version else {}
    return (tags.get("prefopt.data"), tags.get("prefopt.code")) == (data, code)


def unmet(bounds: Bounds) -> list[str]:
    """What does not hold, in words."""
    return [
        f"{each['what']} {each['value']:g}, not {each['relation']} {each['bound']:g}"
        for each in bounds
        if not each["holds"]
    ]


def tell(outcome: str, bounds: Bounds, more: str = "") -> str:
    """Show what was measured as an artifact of the flow's run, and say the outcome with why."""
    rows = [
        f"| {each['what']} | {each['value']:g} | {each['relation']} {each['bound']:g} | "
        f"{'yes' if each['holds'] else '**no**'} |"
        for each in bounds
    ]
    table = "\n".join(["| measured | value | bound | holds |", "| --- | --- | --- | --- |", *rows])
    try:
        create_markdown_artifact(f"{outcome}\n\n{table}\n\n{more}\n", key="retraining")
    except UNREACHABLE as error:
        get_run_logger().warning("artifacts: Prefect's server did not take them, got %s", error)
    return ": ".join([outcome, *(["; ".join(unmet(bounds))] if unmet(bounds) else [])])


def later_round() -> str | None:
    """A round that began after the time that this one was scheduled for, if there is one.

    Rounds that were missed, because no worker was there, all come when one is: the first of them
    does what they were for.
    """
    with get_client(sync_client=True) as client:
        this = client.read_flow_run(flow_run.id)
        ours = this.deployment_id
        if not this.auto_scheduled or this.expected_start_time is None or ours is None:
            return None
        found = client.read_flow_runs(
            deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[ours])),
            flow_run_filter=FlowRunFilter(
                start_time=FlowRunFilterStartTime(after_=this.expected_start_time)
            ),
        )
    return next((run.name for run in found if run.id != this.id and stands_for(run)), None)


def stands_for(run: FlowRun) -> bool:
    """Whether a round is under way, or was played to its end."""
    state = run.state
    return state is not None and (
        state.is_running() or (state.is_completed() and state.name != CAUGHT_UP)
    )


@flow(name="prefopt-watch", persist_result=False)
def watch(root: str = ".") -> State[None]:
    """Look at the source of new preferences; if it changed since the last look, emit an event.

    Args:
        root: of the repository whose params.yaml names the source.
    """
    folder = Path(root).resolve()
    state = ask(folder, "pull", "--state", "--root", str(folder))
    seen = folder / SCRATCH / "source"
    if seen.exists() and seen.read_text() == state:
        return Completed(message="the source is as it was")
    emit_event(ARRIVED, resource={"prefect.resource.id": f"prefopt.source.{folder.name}"})
    seen.parent.mkdir(exist_ok=True)
    seen.write_text(state)
    return Completed(message="new data: an event was emitted")

"""What people see of a flow's run in Prefect: results, report, progress, and its runs in MLflow.

All of it is read from files that stages leave. A server that does not take it costs a line in the
log and nothing else.
"""

import contextvars
import json
import re
import sys
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from prefect import get_run_logger
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    update_progress_artifact,
)
from prefect.exceptions import PrefectHTTPStatusError
from prefect.runtime import flow_run, task_run
from prefect.utilities.urls import url_for

from flows.clones import is_worktree
from flows.supervise import Supervisor

# Paths in a workspace, as stages leave them.
RESULTS = "artefacts/report/results.md"
REPORT = "artefacts/report/index.html"
LINKS = ".prefopt/mlflow.jsonl"
PROGRESS = ".prefopt/progress"
TRACKING = ".prefopt/tracking"
POLL_SECONDS = 5.0
UNREACHABLE = (httpx.HTTPError, PrefectHTTPStatusError)


def identity() -> dict[str, str]:
    """What the stage of this task is told of it, for the tags of its run in MLflow."""
    ids = {"flow": str(flow_run.id), "task": str(task_run.id)}
    urls = {kind: url_for(f"{kind}-run", name) for kind, name in ids.items()}
    told = {f"PREFOPT_{kind.upper()}_RUN_ID": name for kind, name in ids.items()}
    return told | {f"PREFOPT_{kind.upper()}_RUN_URL": url for kind, url in urls.items() if url}


@contextmanager
def progress(stage: str, root: Path) -> Generator[None, None, None]:
    """Show, while the block runs, how far a training of the workspace `root` has come."""
    ended = threading.Event()
    # The artifact belongs to the task, which a thread does not know of by itself.
    follow = contextvars.copy_context().run
    thread = threading.Thread(target=follow, args=(_follow, stage, root, ended))
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def publish(
    root: Path, supervisor: Supervisor, environment: Mapping[str, str], *, whole: bool
) -> None:
    """Show what a flow's run has led to, when MLflow has what there was for it.

    Args:
        root: the workspace.
        supervisor: runs the courier to MLflow.
        environment: of the courier.
        whole: nothing failed, so that the report is of this state. It is linked where it stays.
    """
    if (root / TRACKING).exists():
        deliver = [sys.executable, "-m", "stages.tracking"]
        supervisor.run(deliver, environment, get_run_logger().info, folder=root)
    try:
        if whole and (root / RESULTS).exists():
            create_markdown_artifact((root / RESULTS).read_text(), key="results")
        if whole and (root / REPORT).exists() and not is_worktree(root):
            link = (root / REPORT).resolve().as_uri()
            create_link_artifact(link, link_text="report", key="report")
        if table := mlflow_table(root, str(flow_run.id)):
            create_markdown_artifact(table, key="mlflow-runs")
    except UNREACHABLE as error:
        get_run_logger().warning("artifacts: Prefect's server did not take them, got %s", error)


def show_results(root: Path) -> None:
    """Show the results that stages elsewhere have led to, from DVC's cache or its remote."""
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        if not repo.dvcfs.isfile(RESULTS):
            return
        results = repo.dvcfs.read_text(RESULTS)
    try:
        create_markdown_artifact(results, key="results")
    except UNREACHABLE as error:
        get_run_logger().warning("artifacts: Prefect's server did not take them, got %s", error)


def mlflow_table(root: Path, flow_run_id: str) -> str:
    """The trainings of a flow's run, as MLflow's runs, in markdown; empty if there are none."""
    path = root / LINKS
    lines = path.read_text().splitlines() if path.exists() else []
    links: list[dict[str, Any]] = [json.loads(line) for line in lines]
    cells = {
        link["mlflow_run"]: f"[{link['mlflow_run']}]({link['url']})"
        if link["url"]
        else link["mlflow_run"]
        for link in links
    }
    rows = {
        link["mlflow_run"]: f"| {link['run']} | {cells[link['mlflow_run']]} |"
        for link in links
        if link["flow_run"] == flow_run_id
    }
    return "\n".join(["| run | in MLflow |", "| --- | --- |", *rows.values()]) if rows else ""


def _follow(stage: str, root: Path, ended: threading.Event) -> None:
    """Show what the stage says of its progress, until the end."""
    key = "progress-" + re.sub(r"[^a-z0-9]+", "-", stage.lower())
    path = root / PROGRESS / f"{stage}.json"
    artifact: Any = None
    shown = ""
    while not ended.wait(POLL_SECONDS):
        try:
            said = json.loads(path.read_text())
        except FileNotFoundError:
            continue  # Not a training, or not yet, or no longer.
        text = f"{stage}: step {said['step']} of {said['steps']}"
        percent = 100.0 * said["step"] / said["steps"]
        try:
            if artifact is None:
                artifact = create_progress_artifact(percent, key=key, description=text)
            elif text != shown:
                update_progress_artifact(artifact, percent, description=text)
        except UNREACHABLE:
            continue  # The next one says it all.
        shown = text

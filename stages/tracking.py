"""MLflow behind journals: `python -m stages.tracking` delivers what has not been delivered.

A training never speaks to MLflow. It appends to a journal of its own and holds a lock on it; a
courier, one process for all trainings, reads the journals and logs them in batches. MLflow slow or
down therefore costs a training nothing, and the next command delivers what is left. A journal
without an end whose lock is free belongs to a dead process: its MLflow run ends as FAILED.
"""

import argparse
import csv
import fcntl
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from tqdm import tqdm

from stages.artefacts import WORK, digest, is_first, logratios_of

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

JOURNALS = WORK / "tracking"
DELIVERED = JOURNALS / "delivered"
DEFAULT_URI = "sqlite:///mlflow.db"
BATCH = 1000  # metrics a call, MLflow's maximum
SECONDS_BETWEEN_DELIVERIES = 5.0
SECONDS_BETWEEN_TELLING = 1.0
PROGRESS = WORK / "progress"
# Of each training that was delivered whole: the flow's run that made it, and MLflow's of it.
LINKS = WORK / "mlflow.jsonl"

# Short, because what fails now is delivered by the next command; quiet, and silent to the outside.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
}

Event = dict[str, Any]


class Journal:
    """An append-only file of events, one JSON object a line, locked while its writer lives."""

    def __init__(self, name: str, directory: Path = JOURNALS) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / f"{time.time_ns()}-{name}.jsonl"
        # Locked before it has its name, so that a courier never sees it without its writer.
        unnamed = self.path.with_suffix(".new")
        self._file = open(unnamed, "a")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        unnamed.rename(self.path)

    def write(self, event: Event) -> None:
        line = {"time": time.time_ns() // 1_000_000, **event}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


@contextmanager
def track(
    run: str, *, recipe: str, params: dict[str, Any], datasets: dict[str, str]
) -> Generator[Journal, None, None]:
    """Journal one training; what is raised inside ends it as FAILED.

    Of several processes the first one's journal is kept.
    """
    if not is_first():
        with tempfile.TemporaryDirectory() as thrown_away:
            yield Journal(run, Path(thrown_away))
        return
    journal = Journal(run)
    journal.write(
        {
            "kind": "training",
            "run": run,
            "recipe": recipe,
            "params": {key: str(value) for key, value in params.items()},
            "datasets": datasets,
            "tags": _provenance(),
        }
    )
    _start_courier()
    end: Event = {"end": "FAILED"}
    try:
        yield journal
        end = {"end": "FINISHED"}
    finally:
        journal.write(end)
        journal.close()


def track_evaluation(
    run: str,
    *,
    recipe: str,
    metrics: dict[str, float],
    by_step: Sequence[tuple[int, dict[str, float]]] = (),
) -> None:
    """Journal a run's evaluation, for the MLflow run of the training that it evaluates."""
    journal = Journal(run)
    journal.write(
        {
            "kind": "evaluation",
            "run": run,
            "recipe": recipe,
            "logratios": digest(logratios_of(run)),
            "metrics": metrics,
            "by_step": by_step,
            "tags": _provenance(),
        }
    )
    journal.write({"end": "FINISHED"})
    journal.close()


def track_comparison(*, recipe: str, metrics: dict[str, float], files: dict[str, str]) -> None:
    """Journal what runs are together: an MLflow run of its own, with small text files."""
    journal = Journal("comparison")
    journal.write(
        {
            "kind": "comparison",
            "run": "comparison",
            "recipe": recipe,
            "params": {},
            "datasets": {},
            "tags": _provenance(),
            "files": files,
        }
    )
    journal.write({"step": 0, "metrics": metrics})
    journal.write({"end": "FINISHED"})
    journal.close()


class Curve(AbstractContextManager["Curve"]):
    """A training's metrics by step: a CSV file, a progress bar, and the journal if there is one.

    How far it has come is in a file of `.prefopt/progress` as long as it is under way.

    Rates are of the machine and of the hour. They go to the bar and to MLflow's system metrics,
    and never into the file, which is the same in every run.
    """

    def __init__(
        self, path: Path, name: str, num_steps: int, journal: Journal | None = None
    ) -> None:
        self._file: TextIO = open(path, "w", newline="")
        self._columns: list[str] = []
        self._rows: list[dict[str, float]] = []
        self._journal = journal
        self._bar = tqdm(total=num_steps, desc=name, unit="step", mininterval=5)
        self._progress = PROGRESS / f"{name}.json"
        self._num_steps = num_steps
        self._told = -SECONDS_BETWEEN_TELLING

    def log(self, metrics: dict[str, float], rates: dict[str, float] | None = None) -> None:
        """Write a step down.

        Args:
            metrics: of the step.
            rates: tokens_per_second, and mfu where it is known; None if it was replayed from a
                checkpoint.
        """
        self._rows.append(metrics)
        new = [name for name in metrics if name not in self._columns]
        if new:
            # The first step's, and later the first look's: the file gets them from its head on.
            self._columns += new
            self._file.seek(0)
            self._write([dict(zip(self._columns, self._columns, strict=True)), *self._rows])
        else:
            self._write([metrics])
        if self._journal is not None:
            step = int(metrics["step"])
            values = {key: value for key, value in metrics.items() if key != "step"}
            values |= {f"system/{name}": rate for name, rate in (rates or {}).items()}
            self._journal.write({"step": step, "metrics": values})
        if is_first() and time.monotonic() - self._told >= SECONDS_BETWEEN_TELLING:
            self._told = time.monotonic()
            self._tell()
        if rates is None:
            # The time left is reckoned from steps that were computed here.
            self._bar.initial = self._bar.last_print_n = self._bar.n = self._bar.n + 1
            return
        mfu = f", mfu={rates['mfu']:.0%}" if "mfu" in rates else ""
        self._bar.set_postfix_str(
            f"loss={metrics['loss']:.4f}, {rates['tokens_per_second']:.0f} tokens/s{mfu}",
            refresh=False,
        )
        self._bar.update()

    def _tell(self) -> None:
        PROGRESS.mkdir(parents=True, exist_ok=True)
        told = {"step": len(self._rows), "steps": self._num_steps}
        whole = self._progress.with_suffix(".new")
        whole.write_text(json.dumps(told))
        whole.replace(self._progress)

    def _write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        writer = csv.DictWriter(self._file, self._columns, lineterminator="\n")
        writer.writerows(rows)
        self._file.flush()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.close()
        self._file.close()
        if is_first():
            self._progress.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--follow", action="store_true", help="stay until no journal is open")
    follow = parser.parse_args().follow
    JOURNALS.mkdir(parents=True, exist_ok=True)
    with open(JOURNALS / "courier.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (fcntl.LOCK_NB if follow else 0))
        except BlockingIOError:
            return  # Another courier is on its way.
        left = deliver_all()
        while follow and left:
            time.sleep(SECONDS_BETWEEN_DELIVERIES)
            left = deliver_all()
    if left:
        sys.stderr.write(f"tracking: {left} journals are still open in {JOURNALS}\n")


def deliver_all() -> int:
    """Deliver what the journals hold; returns how many are still being written.

    What MLflow does not take stays where it is, for the next time.
    """
    pending = sorted(JOURNALS.glob("*.jsonl"))
    if not pending:
        return 0
    client = connect()
    from mlflow.exceptions import MlflowException

    still_open = 0
    for path in pending:
        try:
            ended = _deliver(client, path)
        except (MlflowException, OSError) as error:
            sys.stderr.write(
                f"tracking: {path.name} was not delivered, got {_without_secrets(str(error))}; "
                "`python -m stages.tracking` tries again\n"
            )
            return sum(map(_is_locked, pending))
        if ended:
            DELIVERED.mkdir(exist_ok=True)
            path.rename(DELIVERED / path.name)
        else:
            still_open += 1
    return still_open


def connect() -> "MlflowClient":
    """MLflow as the environment names it, else its file here."""
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    import logging

    logging.getLogger("alembic").setLevel(logging.WARNING)
    from mlflow import MlflowClient

    return MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", DEFAULT_URI))


def _deliver(client: "MlflowClient", path: Path) -> bool:
    """Log a journal; returns whether it has ended. Logging a journal twice changes nothing."""
    alive = _is_locked(path)
    # A line without its newline is still being written, or was when its writer died.
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    events: list[Event] = [json.loads(line) for line in lines]
    if not events:
        return not alive
    head, rest = events[0], events[1:]
    if head["kind"] == "evaluation":
        _deliver_evaluation(client, head)
        return True
    run = find(client, head["recipe"], {"prefopt.journal": path.stem}) or _create(
        client, path, head
    )
    for name, text in head.get("files", {}).items():
        client.log_text(run.info.run_id, text, name)
    _log_metrics(client, run.info.run_id, rest)
    end = next((event for event in rest if "end" in event), None)
    if end is None and alive:
        return False
    for event in rest:
        if "logratios" in event:
            client.set_tag(run.info.run_id, "prefopt.logratios", event["logratios"])
        if "audit" in event:
            client.set_tag(run.info.run_id, "prefopt.reference_audit", event["audit"])
        if "kept" in event:
            client.set_tag(run.info.run_id, "prefopt.kept", event["kept"])
    status = "FAILED" if end is None else end["end"]
    last = events[-1]["time"]
    client.set_terminated(run.info.run_id, status=status, end_time=last)
    _write_link(run, head)
    return True


def _write_link(run: "Run", head: Event) -> None:
    uri = os.environ.get("MLFLOW_TRACKING_URI", DEFAULT_URI)
    where = f"/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
    link = {
        "run": head["run"],
        "flow_run": head["tags"]["prefect.flow_run_id"],
        "mlflow_run": run.info.run_id,
        "url": _without_secrets(uri.rstrip("/")) + where if uri.startswith("http") else None,
    }
    with open(LINKS, "a") as file:
        file.write(json.dumps(link) + "\n")


def _without_secrets(text: str) -> str:
    """Without the user and the password that an address may hold."""
    return re.sub(r"//[^/\s]*@", "//", text)


def _create(client: "MlflowClient", path: Path, head: Event) -> "Run":
    from mlflow.entities import Dataset, DatasetInput, InputTag, Param

    tags = {
        **head["tags"],
        "mlflow.runName": head["run"],
        "prefopt.run": head["run"],
        "prefopt.journal": path.stem,
    }
    run = client.create_run(
        _experiment(client, head["recipe"]),
        start_time=head["time"],
        tags=tags,
        run_name=head["run"],
    )
    client.log_batch(run.info.run_id, params=[Param(k, v) for k, v in head["params"].items()])
    client.log_inputs(
        run.info.run_id,
        [
            # MLflow takes digests of at most 36 characters.
            DatasetInput(
                Dataset(name, sha256[:36], "local", f"artefacts/{name}.parquet"),
                [InputTag("mlflow.data.context", "training")],
            )
            for name, sha256 in head["datasets"].items()
        ],
    )
    return run


def _deliver_evaluation(client: "MlflowClient", head: Event) -> None:
    # Runs that train nothing have the same log-ratios.
    tags = {"prefopt.logratios": head["logratios"], "prefopt.run": head["run"]}
    run = find(client, head["recipe"], tags)
    if run is None:
        # The training was restored from DVC's cache, made by another machine's MLflow.
        tags |= {**head["tags"], "mlflow.runName": head["run"]}
        experiment = _experiment(client, head["recipe"])
        run = client.create_run(experiment, start_time=head["time"], tags=tags)
        client.set_terminated(run.info.run_id, end_time=head["time"])
    later = [
        {"time": head["time"], "step": step, "metrics": metrics}
        for step, metrics in head.get("by_step", [])
    ]
    _log_metrics(client, run.info.run_id, [{**head, "step": 0}, *later])


def _log_metrics(client: "MlflowClient", run_id: str, events: list[Event]) -> None:
    from mlflow.entities import Metric

    metrics = [
        Metric(key, value, event["time"], event["step"])
        for event in events
        if "metrics" in event
        for key, value in event["metrics"].items()
    ]
    for start in range(0, len(metrics), BATCH):
        client.log_batch(run_id, metrics=metrics[start : start + BATCH])


def _experiment(client: "MlflowClient", recipe: str) -> str:
    found = client.get_experiment_by_name(recipe)
    return found.experiment_id if found else client.create_experiment(recipe)


def find(client: "MlflowClient", recipe: str, tags: dict[str, str]) -> "Run | None":
    """The latest run of a recipe that has these tags."""
    runs = client.search_runs(
        [_experiment(client, recipe)],
        " AND ".join(f"tags.`{tag}` = '{value}'" for tag, value in tags.items()),
        max_results=1,
        order_by=["attributes.start_time DESC"],
    )
    return runs[0] if runs else None


def _is_locked(path: Path) -> bool:
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def _start_courier() -> None:
    with open(JOURNALS / "courier.log", "a") as log:
        subprocess.Popen(
            [sys.executable, "-m", "stages.tracking", "--follow"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _provenance() -> dict[str, str]:
    """Tags that tie a record to the commit, the DVC stage and the flow run that made it."""
    git = ["git", "-c", "core.quotepath=off"]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    # What DVC itself writes while it runs does not make a tree dirty.
    status = subprocess.run(
        [*git, "status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)dvc.lock"],
        capture_output=True,
        text=True,
    )
    flow = {
        f"prefect.{name}": os.environ[f"PREFOPT_{name.upper()}"]
        for name in ("flow_run_url", "task_run_id", "task_run_url")
        if f"PREFOPT_{name.upper()}" in os.environ
    }
    return flow | {
        "git.commit": commit.stdout.strip() or "none",
        "git.dirty": str(bool(status.stdout.strip())).lower(),
        "dvc.stage": os.environ.get("DVC_STAGE", "none"),
        "prefect.flow_run_id": os.environ.get("PREFOPT_FLOW_RUN_ID", "none"),
    }


if __name__ == "__main__":
    main()

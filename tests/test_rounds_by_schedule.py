"""Rounds of retraining that a schedule starts while another is under way."""

import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forks import launched
from processes import wait_until
from retraining import Project, never, preferences

from flows.locks import hold_gpus

PERIOD = 15.0  # seconds from one round to the next


@pytest.fixture
def project(server: str, tmp_path: Path) -> Iterator[Project]:
    with launched(tmp_path / "forks") as launcher:
        project = Project(tmp_path, server, launcher)
        project.environment["TMPDIR"] = str(tmp_path)  # With GPUs of its own.
        yield project


def fire(project: Project, deployed: dict[str, Any]) -> None:
    """Have the schedule start three rounds, PERIOD apart."""
    one = f"deployments/{deployed['id']}"
    now = time.time()
    begin = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now + 2))
    rule = f"DTSTART:{begin}\nRRULE:FREQ=SECONDLY;INTERVAL={PERIOD:.0f};COUNT=3"
    (schedule,) = deployed["schedules"]
    changes = {"active": True, "schedule": {"rrule": rule, "timezone": "UTC"}}
    project.api(f"{one}/schedules/{schedule['id']}", "PATCH", **changes)
    # The server would look at schedules once a minute by itself.
    project.api(f"{one}/schedule", start_time=stamp(now), end_time=stamp(now + 4 * PERIOD))


def stamp(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def test_rounds_that_a_schedule_starts_meanwhile_wait_and_are_caught_up_once(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    project.offer("1.jsonl", preferences(0, 100, flipped=never))
    deployed = project.deploy()

    def rounds() -> list[dict[str, Any]]:
        of = {"deployments": {"id": {"any_": [deployed["id"]]}}, "sort": "EXPECTED_START_TIME_ASC"}
        return project.api("flow_runs/filter", **of)

    def are(*names: str) -> bool:
        return [one["state_name"] for one in rounds()] == [*names]

    worker = project.start("-m", "flows.cli", "worker", "retrain", "--at-once", "3")
    try:
        with hold_gpus(1, lambda: False):  # No stage that trains can begin.
            fire(project, deployed)
            waiting = ["AwaitingConcurrencySlot"] * 2
            wait_until(lambda: are("Running", *waiting), 300)
            # The first is killed, and its place is the next one's.
            (process,) = (tag for tag in rounds()[0]["tags"] if tag.startswith("process:"))
            os.kill(int(process.split(":")[2]), signal.SIGKILL)
            wait_until(lambda: are("Crashed", "Running", waiting[0]), 300)
        wait_until(lambda: are("Crashed", "Completed", "CaughtUp"), 300)
    finally:
        worker.terminate()
        worker.communicate()
    first, second, third = rounds()
    assert first["end_time"] < second["start_time"] < second["end_time"] < third["end_time"]
    assert project.aliases() == {"champion": "2", "previous": "1", "challenger": None}

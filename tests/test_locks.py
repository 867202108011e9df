"""Locks that no process outlives: GPUs of a machine, and the workspace."""

import itertools
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import PROJECT
from processes import wait_until
from test_flows import new_project, run

from flows.clones import worktree
from flows.locks import hold_gpus

# A stage that says when it held which GPUs; its supervisor holds them for it.
STAGE = """\
import os, sys, time
start = time.time()
time.sleep(float(sys.argv[1]))
print(start, time.time(), os.environ["CUDA_VISIBLE_DEVICES"], file=open(sys.argv[2], "w"))
"""
HOLDER = """\
import os, sys
from flows.clones import worktree
from flows.locks import hold_gpus
from flows.supervise import Supervisor
count, *command = sys.argv[1:]
with Supervisor() as supervisor, hold_gpus(int(count), lambda: False) as slots:
    supervisor.run(command, {**os.environ, **slots.environment}, print, locks=slots.locks)
"""


def start(folder: Path, name: str, *, gpus: int, seconds: float) -> subprocess.Popen[bytes]:
    """A process of its own that runs a stage on so many of this machine's two GPUs."""
    command = [sys.executable, "-c", STAGE, str(seconds), str(folder / name)]
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(gpus), *command],
        env={
            **os.environ,
            "PYTHONPATH": str(PROJECT),
            "TMPDIR": str(folder),
            "CUDA_VISIBLE_DEVICES": "0,1",
        },
    )


def held(folder: Path, name: str) -> tuple[float, float, set[str]]:
    begin, end, devices = (folder / name).read_text().split()
    return float(begin), float(end), set(devices.split(","))


def test_six_runs_on_two_gpus_are_two_at_once_and_no_gpu_idles(tmp_path: Path) -> None:
    runs = [start(tmp_path, f"run-{i}", gpus=1, seconds=0.7) for i in range(6)]
    assert [one.wait(60) for one in runs] == [0] * 6
    times = [held(tmp_path, f"run-{i}") for i in range(6)]
    for gpu in ("0", "1"):
        mine = sorted((begin, end) for begin, end, devices in times if devices == {gpu})
        assert len(mine) == 3
        for (_, end), (begin, _) in itertools.pairwise(mine):
            # One after another, with no more than a process's start between.
            assert 0 < begin - end < 0.7


def test_a_stage_that_asks_for_two_gpus_gets_both_alone_and_is_not_passed_by(
    tmp_path: Path,
) -> None:
    first = start(tmp_path, "first", gpus=1, seconds=1.5)
    time.sleep(1)
    both = start(tmp_path, "both", gpus=2, seconds=0.3)
    time.sleep(1)
    last = start(tmp_path, "last", gpus=1, seconds=0.3)
    assert [one.wait(60) for one in (first, both, last)] == [0] * 3
    assert held(tmp_path, "both")[2] == {"0", "1"}
    assert held(tmp_path, "first")[1] < held(tmp_path, "both")[0]
    assert held(tmp_path, "both")[1] < held(tmp_path, "last")[0]


def test_a_gpu_of_a_killed_flow_is_free_when_the_stage_has_ended_and_not_before(
    tmp_path: Path,
) -> None:
    stubborn = "trap '' TERM; echo $$ > pid; while true; do sleep 0.1; done"
    environment = {"TMPDIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": "0"}
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, "1", "sh", "-c", stubborn],
        cwd=tmp_path,
        env={**os.environ, **environment, "PYTHONPATH": str(PROJECT)},
    ) as flow:
        wait_until(lambda: (tmp_path / "pid").exists() and bool((tmp_path / "pid").read_text()))
        stage = psutil.Process(int((tmp_path / "pid").read_text()))
        flow.kill()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(tmp_path))
        patch.setenv("CUDA_VISIBLE_DEVICES", "0")
        with hold_gpus(1, lambda: False) as slots:
            assert slots.devices == ("0",)
            assert not stage.is_running()


def test_a_worktree_that_a_killed_run_left_is_swept_and_one_in_use_is_not(tmp_path: Path) -> None:
    project = new_project(tmp_path / "project", b="1")
    run(project, "git", "add", ".")
    run(
        project, "git", *("-c", "user.name=t", "-c", "user.email=t@localhost"), "commit", "-qm", "1"
    )
    program = (
        "import pathlib, sys, time; from flows.clones import worktree\n"
        "with worktree(pathlib.Path(), 'HEAD', sys.argv[1]): time.sleep(600)"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", program, name],
            cwd=project,
            env={**os.environ, "PYTHONPATH": str(PROJECT)},
        )
        for name in ("killed", "living")
    ]
    trees = project / ".prefopt/worktrees"
    wait_until(
        lambda: all((trees / n / ".dvc/config.local").exists() for n in ("killed", "living")), 60
    )
    both[0].kill()
    both[0].wait()
    with worktree(project, "HEAD", "next") as tree:
        assert (tree / "dvc.yaml").exists()
        assert (trees / "living/dvc.yaml").exists()
        assert not (trees / "killed").exists()
    both[1].kill()
    both[1].wait()


def test_more_gpus_than_are_seen_are_refused_and_none_are_asked_of_a_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with (
        pytest.raises(ValueError, match=r"meta.gpus: .* got 2 of 1"),
        hold_gpus(2, lambda: False),
    ):
        pass
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with hold_gpus(2, lambda: False) as slots:
        assert slots.environment == {}


def test_of_two_runs_in_one_workspace_the_second_waits_says_so_and_finds_all_done(
    tmp_path: Path,
) -> None:
    project = new_project(tmp_path / "project", b="1")
    repro = "import sys; from flows.cli import dvc_repro; sys.exit(dvc_repro())"
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "DVC_NO_ANALYTICS": "1"}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", repro],
            cwd=project,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for _ in range(2)
    ]
    said = sorted((one.communicate(timeout=120)[0] for one in both), key=len)
    assert [one.returncode for one in both] == [0, 0]
    # Whoever came a moment later cannot know more than that somebody has the lock.
    assert re.search(r"at work in this workspace, (process \d+ of|just started;)", said[0])
    assert "Running stage" not in said[0]
    executed = (project / ".dvc/tmp/executed").read_text().split()
    assert sorted(executed) == sorted(set(executed))
    assert run(project, sys.executable, "-m", "dvc", "status", "--quiet").returncode == 0

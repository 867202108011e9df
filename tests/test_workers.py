"""Workers on many machines: clones that share git, an S3 bucket, and a Prefect server.

Everything is real: workers, server, git, DVC and moto's S3 server, on the loopback. A machine's
loss is a SIGKILL of all that a worker started.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import psutil
import pytest
from conftest import PROJECT
from moto.server import ThreadedMotoServer
from prefect.client.schemas.objects import FlowRun
from processes import wait_until
from test_flows import api, cancel, last_flow_run, run

from flows import pools
from flows.clones import IDENTITY, git
from flows.graph import LOCK, Demands

DVC_YAML = """\
stages:
  prepare:
    cmd: python stage.py prepare data.txt prepared.txt
    deps: [data.txt, stage.py]
    outs: [prepared.txt]
  train:
    foreach: ${runs}
    do:
      cmd: python stage.py train-${key} prepared.txt models/${key}.txt
      params: ["runs.${key}"]
      meta: {gpus: 1}
      deps: [prepared.txt]
      outs: ["models/${key}.txt"]
  report:
    cmd: python stage.py report models report.txt
    deps: [models]
    meta: {pool: cpu}
    outs: [report.txt]
"""

# Ten steps, each a checkpoint; FAULTS is a folder that says which stage is to be slow.
STAGE = """\
import os, pathlib, shutil, sys, time
name, source, target = sys.argv[1:]
faults = pathlib.Path(os.environ["FAULTS"])
checkpoints = pathlib.Path(".prefopt/stages") / name
checkpoints.mkdir(parents=True, exist_ok=True)
with open(faults / "log", "a") as log:
    for step in range(max((int(path.name) for path in checkpoints.iterdir()), default=0), 10):
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or None
        print(name, step, gpus, os.getcwd(), file=log, flush=True)
        (checkpoints / f"{step + 1}").touch()
        while (faults / f"{name}-{step}").exists():
            time.sleep(0.1)
shutil.rmtree(checkpoints)
path = pathlib.Path(source)
files = sorted(path.iterdir()) if path.is_dir() else [path]
pathlib.Path(target).parent.mkdir(exist_ok=True)
pathlib.Path(target).write_text("".join(file.read_text() for file in files) + name + "\\n")
"""


class Machines:
    """A workspace, its bare origin, and the clones of workers."""

    def __init__(self, folder: Path, server: str, bucket: ThreadedMotoServer) -> None:
        self.folder, self.server, self.bucket = folder, server, bucket
        self.workspace, self.faults = folder / "workspace", folder / "faults"
        self.faults.mkdir()
        (self.faults / "log").touch()
        (folder / "tmp").mkdir()
        self.environment = {
            "PYTHONPATH": str(PROJECT),
            "PREFECT_API_URL": server,
            "PREFECT_HOME": str(folder / "home"),
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PREFECT_WORKER_HEARTBEAT_SECONDS": "5",
            "FAULTS": str(self.faults),
            "TMPDIR": str(folder / "tmp"),
            "AWS_ACCESS_KEY_ID": "x",
            "AWS_SECRET_ACCESS_KEY": "x",
        }
        host, port = bucket.get_host_and_port()
        self._create(f"http://{host}:{port}")

    def _create(self, endpoint: str) -> None:
        self.workspace.mkdir()
        (self.workspace / "dvc.yaml").write_text(DVC_YAML)
        (self.workspace / "stage.py").write_text(STAGE)
        (self.workspace / "data.txt").write_text("data\n")
        (self.workspace / ".gitignore").write_text("models/\n.prefopt\n/*.txt\n!data.txt\n")
        self.git("init", "--quiet")
        self.dvc("init", "--quiet")
        self.dvc("remote", "add", "--default", "store", "s3://bucket/store")
        self.dvc("remote", "modify", "store", "endpointurl", endpoint)
        self.git("init", "--quiet", "--bare", str(self.folder / "origin"))
        self.git("remote", "add", "origin", str(self.folder / "origin"))
        self.commit(a=1, b=1)

    def commit(self, **runs: int) -> None:
        """New parameters of the runs."""
        lines = [f"  {name}: {value}\n" for name, value in runs.items()]
        (self.workspace / "params.yaml").write_text("runs:\n" + "".join(lines))
        self.git("add", ".")
        self.git(*("-c", "user.name=t", "-c", "user.email=t@localhost"), "commit", "-qm", "runs")
        self.git("push", "--quiet", "origin", "HEAD")

    def git(self, *arguments: str) -> str:
        done = run(self.workspace, "git", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def dvc(self, *arguments: str) -> str:
        done = run(self.workspace, sys.executable, "-m", "dvc", *arguments, **self.environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @contextmanager
    def worker(
        self, pool: str, clone: str, gpus: str = "", at_once: int = 1
    ) -> Generator[psutil.Process, None, None]:
        """`prefopt worker`, as a person would start it on a machine."""
        command = [sys.executable, "-m", "flows.cli", "worker", pool, "--at-once", str(at_once)]
        with open(self.folder / f"{clone}-{pool}.log", "w") as log:
            process = psutil.Popen(
                [*command, "--clone", str(self.folder / clone)],
                cwd=self.folder,
                env={**os.environ, **self.environment, "CUDA_VISIBLE_DEVICES": gpus},
                stdout=log,
                stderr=log,
            )
            try:
                yield process
            finally:
                process.terminate()
                process.wait(30)

    def lose(self, worker: psutil.Process) -> None:
        """Kill a worker and all that it started, if that is not done yet."""
        with suppress(psutil.NoSuchProcess):
            for process in [worker, *worker.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):  # Some end by themselves, their parent gone.
                    process.kill()

    @contextmanager
    def coordinator(self) -> Generator[subprocess.Popen[bytes], None, None]:
        command = [sys.executable, "-m", "flows.pipeline", "--pools"]
        environment = {**os.environ, **self.environment}
        with (
            open(self.folder / "coordinator.log", "w") as log,
            subprocess.Popen(
                command, cwd=self.workspace, env=environment, stdout=log, stderr=log
            ) as process,
        ):
            try:
                yield process
            finally:
                process.terminate()

    def run_to_the_end(self) -> None:
        with self.coordinator() as process:
            self.expect(process, 0)

    def expect(self, coordinator: subprocess.Popen[bytes], status: int) -> str:
        """Wait for the end of a coordinator; gives what it said."""
        ended = coordinator.wait(600)
        said = (self.folder / "coordinator.log").read_text()
        assert ended == status, said[-4000:]
        return said

    def logs(self) -> str:
        return "".join(path.read_text() for path in self.folder.glob("*.log"))

    def steps(self, stage: str) -> list[tuple[int, str, str]]:
        """Of what was executed of a stage: step, GPUs, machine."""
        lines = [line.split() for line in (self.faults / "log").read_text().splitlines()]
        return [
            (int(step), gpus, Path(folder).relative_to(self.folder).parts[0])
            for name, step, gpus, folder in lines
            if name == stage
        ]

    def shown_running(self) -> list[str]:
        """What the server says is running."""
        of_type = {"state": {"type": {"any_": ["RUNNING"]}}}
        kinds = ("flow_runs", "task_runs")
        return [one["name"] for kind in kinds for one in api(self.server, kind, **{kind: of_type})]

    def state(self, flow_run: str) -> str:
        """The type of a flow run's state."""
        (found,) = api(self.server, "flow_runs", flow_runs={"id": {"any_": [flow_run]}})
        return found["state_type"]

    def left_of(self, stage: str) -> list[str]:
        """The checkpoints of a stage that the bucket has."""
        host, port = self.bucket.get_host_and_port()
        where = {"list-type": "2", "prefix": f"store/checkpoints/{stage}/"}
        found = httpx.get(f"http://{host}:{port}/bucket", params=where, trust_env=False)
        return re.findall(rf"<Key>{where['prefix']}(.*?)</Key>", found.text)

    def serial_lock(self) -> bytes:
        """What one machine's `dvc repro` makes of the workspace as it was committed."""
        serial = Path(shutil.copytree(self.workspace, self.folder / f"serial-{time.time_ns()}"))
        faults = self.folder / "none"
        faults.mkdir(exist_ok=True)
        done = run(serial, sys.executable, "-m", "dvc", "repro", FAULTS=str(faults))
        assert done.returncode == 0, done.stderr
        return (serial / "dvc.lock").read_bytes()


def server_of_s3() -> ThreadedMotoServer:
    """Moto's; what it stores stays in this process when it stops."""
    return ThreadedMotoServer("127.0.0.1", free_port(), verbose=False)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def machines(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    bucket = server_of_s3()
    with ExitStack() as stack:
        bucket.start()
        stack.callback(bucket.stop)
        host, port = bucket.get_host_and_port()
        created = httpx.put(f"http://{host}:{port}/bucket", trust_env=False)
        assert created.status_code == 200
        machines = Machines(tmp_path_factory.mktemp("machines"), server, bucket)
        deployed = run(PROJECT, sys.executable, "-m", "flows.cli", "deploy", **machines.environment)
        assert deployed.returncode == 0, deployed.stderr
        stack.enter_context(machines.worker("cpu", "one"))
        machines.gpu_worker = stack.enter_context(machines.worker("gpu", "two", "1"))
        yield machines


def test_workers_in_two_clones_leave_the_lock_that_one_machine_leaves(machines: Machines) -> None:
    serial = machines.serial_lock()

    machines.run_to_the_end()

    assert (machines.workspace / "dvc.lock").read_bytes() == serial
    # Each stage went to its pool, was executed once, and saw the GPU of its worker alone.
    assert machines.steps("prepare") == [(step, "None", "one") for step in range(10)]
    assert machines.steps("train-a") == [(step, "1", "two") for step in range(10)]
    assert machines.steps("report") == [(step, "None", "one") for step in range(10)]
    machines.dvc("pull")
    assert (machines.workspace / "report.txt").read_text().endswith("report\n")
    # Nothing of the run is left behind.
    assert machines.git("ls-remote", "origin", "refs/prefopt/*") == ""
    assert [*(machines.folder / "two/.prefopt/worktrees").iterdir()] == []
    assert machines.git("status", "--porcelain", "--untracked-files=no") == ""


def slow(machines: Machines, stage: str, step: int) -> Path:
    """Have a stage stay at a step until what is returned is removed."""
    fault = machines.faults / f"{stage}-{step}"
    fault.touch()
    return fault


def test_a_stage_finds_its_commit_though_the_run_has_gone_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, clone = tmp_path / "workspace", tmp_path / "clone"
    git(tmp_path, "init", "--quiet", str(workspace))
    git(workspace, "commit", "--quiet", "--allow-empty", "--message", "a revision", **IDENTITY)
    told: list[str] = []

    def record(_name: str, *, parameters: dict[str, Any], **_: Any) -> FlowRun:
        told.append(parameters["commit"])
        return FlowRun(flow_id=uuid4())

    monkeypatch.setattr(pools, "run_deployment", record)
    coordinator = pools.Coordinator(workspace, str(workspace), "run")
    for stage in ("first", "second", "third"):
        (workspace / LOCK).write_text(f"as the {stage} finds it\n")
        coordinator.start(stage, [], Demands())
    # As over a network: by itself git would copy all objects of a folder that is near.
    git(tmp_path, "clone", "--quiet", "--no-local", str(workspace), str(clone))
    git(clone, "fetch", "--quiet", "origin", coordinator.ref)  # What a worker asks for, so late.
    locks = [git(clone, "show", f"{commit}:{LOCK}") for commit in told]
    assert locks == [f"as the {stage} finds it" for stage in ("first", "second", "third")]


def test_a_remote_that_is_away_during_the_push_is_tried_again(machines: Machines) -> None:
    machines.commit(a=3, b=1)
    before = len(machines.steps("train-a"))
    fault = slow(machines, "train-a", 9)
    with machines.coordinator() as coordinator:
        wait_until(lambda: [s for s, *_ in machines.steps("train-a")[before:]][-1:] == [9], 300)
        machines.bucket.stop()
        fault.unlink()
        wait_until(lambda: "`dvc push" in machines.logs(), 300)
        machines.bucket.start()
        machines.expect(coordinator, 0)
    # The stage itself was executed once.
    assert [step for step, *_ in machines.steps("train-a")[before:]] == list(range(10))
    assert (machines.workspace / "dvc.lock").read_bytes() == machines.serial_lock()


def test_a_run_that_is_cancelled_ends_its_stages_and_the_next_goes_on(machines: Machines) -> None:
    machines.commit(a=3, b=2)
    before = len(machines.steps("train-b"))
    fault = slow(machines, "train-b", 3)
    with machines.coordinator() as coordinator:
        wait_until(lambda: [s for s, *_ in machines.steps("train-b")[before:]][-1:] == [3], 300)
        status = (sys.executable, "-m", "flows.cli", "status")
        told = run(machines.workspace, *status, **machines.environment).stdout
        assert f"running: train@b by {socket.gethostname()}-two-gpu-1\n" in told
        cancel(machines.server, last_flow_run(machines.server, "prefopt-pools")["id"])
        machines.expect(coordinator, 1)
    assert last_flow_run(machines.server, "prefopt-pools")["state_type"] == "CANCELLED"
    wait_until(
        lambda: last_flow_run(machines.server, "prefopt-stage")["state_type"] == "CANCELLED", 120
    )
    fault.unlink()
    machines.run_to_the_end()
    # It went on where the cancelled one was.
    assert [step for step, *_ in machines.steps("train-b")[before:]] == list(range(10))
    assert (machines.workspace / "dvc.lock").read_bytes() == machines.serial_lock()


def test_a_lost_machines_stage_goes_to_another_and_on_from_its_checkpoint(
    machines: Machines,
) -> None:
    machines.commit(a=3, b=2)
    machines.run_to_the_end()  # So that one stage alone is new below.
    machines.commit(a=4, b=2)
    serial = machines.serial_lock()
    before = len(machines.steps("train-a"))
    fault = slow(machines, "train-a", 4)
    with machines.coordinator() as coordinator:
        wait_until(lambda: machines.steps("train-a")[before:][-1:] == [(4, "1", "two")], 300)
        wait_until(lambda: "5" in machines.left_of("train-a"), 60)  # Where the others see it.
        with machines.worker("gpu", "three", "0"):
            machines.lose(machines.gpu_worker)
            fault.unlink()
            said = machines.expect(coordinator, 0)
    assert "fell silent; the stage goes to another worker" in said
    steps = machines.steps("train-a")[before:]
    assert steps == [
        *((step, "1", "two") for step in range(5)),
        *((step, "0", "three") for step in range(5, 10)),
    ]
    assert (machines.workspace / "dvc.lock").read_bytes() == serial
    assert machines.left_of("train-a") == []
    assert machines.shown_running() == []


def test_a_killed_coordinator_is_seen_by_the_next_which_ends_what_it_left(
    machines: Machines,
) -> None:
    machines.commit(a=5, b=2)
    before = len(machines.steps("train-a"))
    status = (sys.executable, "-m", "flows.cli", "status")
    fault = slow(machines, "train-a", 3)
    with machines.worker("gpu", "four", "0"):
        with machines.coordinator() as coordinator:
            wait_until(lambda: [s for s, *_ in machines.steps("train-a")[before:]][-1:] == [3], 300)
            coordinator.kill()
            coordinator.wait()
        killed = last_flow_run(machines.server, "prefopt-pools")
        child = last_flow_run(machines.server, "prefopt-stage")
        assert killed["state_type"] == "RUNNING"  # Nobody could tell the server.
        told = run(machines.workspace, *status, **machines.environment).stdout
        assert f"killed: flow run {killed['name']}; " in told
        with machines.coordinator() as coordinator:
            wait_until(lambda: machines.state(killed["id"]) == "CRASHED", 120)
            # Its stage is ended too; until then it would go on.
            wait_until(lambda: machines.state(child["id"]) == "CANCELLED", 120)
            fault.unlink()
            machines.expect(coordinator, 0)
    # The stage went on; nothing is left of the first run, neither at the server nor at the origin.
    assert [step for step, *_ in machines.steps("train-a")[before:]] == list(range(10))
    assert machines.shown_running() == []
    assert machines.git("ls-remote", "origin", "refs/prefopt/*") == ""
    assert (machines.workspace / "dvc.lock").read_bytes() == machines.serial_lock()


def test_six_runs_have_two_gpus_one_each_and_what_asks_for_both_has_both(
    machines: Machines,
) -> None:
    machines.lose(machines.gpu_worker)
    pipeline = machines.workspace / "dvc.yaml"
    pipeline.write_text(DVC_YAML.replace("meta: {pool: cpu}", "meta: {pool: gpu, gpus: 2}"))
    runs = list("cdefgh")
    machines.commit(**dict.fromkeys(runs, 1))
    faults = {name: slow(machines, f"train-{name}", 5) for name in runs}

    def begun() -> dict[str, str]:
        """The runs that have begun, and on which GPUs."""
        steps = {name: machines.steps(f"train-{name}") for name in runs}
        return {name: gpus for name, ((_, gpus, _), *_) in ((n, s) for n, s in steps.items() if s)}

    with machines.worker("gpu", "five", "0,1", at_once=6), machines.coordinator() as coordinator:
        ended: set[str] = set()
        while len(ended) < len(runs):
            wanted = min(2, len(runs) - len(ended))
            wait_until(lambda: len(begun()) == min(len(ended) + 2, len(runs)), 300)
            time.sleep(2)  # In which another would begin, if it could.
            at_work = {name: gpus for name, gpus in begun().items() if name not in ended}
            assert sorted(at_work.values()) in (["0", "1"], ["0"], ["1"])
            assert len(at_work) == wanted
            # One is let go; its GPU is the next one's, while the other is still at work.
            name = min(at_work)
            faults[name].unlink()
            ended.add(name)
        machines.expect(coordinator, 0)
    assert {gpus for _, gpus, _ in machines.steps("report")[-10:]} == {"0,1"}
    assert (machines.workspace / "dvc.lock").read_bytes() == machines.serial_lock()


def test_the_cluster_to_try_it_comes_up_and_ends_without_a_trace(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if "PREFECT" not in key}
    home = {"PREFECT_HOME": str(tmp_path / "home"), "PYTHONPATH": str(PROJECT)}
    with open(tmp_path / "log", "w") as log:
        cluster = psutil.Popen(
            [sys.executable, "-m", "flows.cli", "cluster"],
            cwd=tmp_path,
            env=environment | home,
            stdout=log,
            stderr=log,
        )
        wait_until(lambda: (tmp_path / "log").read_text().count("started!") == 2, 300)
        said = (tmp_path / "log").read_text()
        started = cluster.children(recursive=True)
        cluster.terminate()
        assert cluster.wait(60) == 0
    assert "python -m flows.pipeline --pools --only cpu" in said
    assert len(started) >= 6  # A server and two workers, each with its keeper.
    assert not any(process.is_running() for process in started)

"""The flow against a real server and real projects of DVC: it is `dvc repro`, run otherwise."""

import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from processes import FAMILY, family, is_alive, wait_until

from flows.graph import read_plan
from flows.supervise import Supervisor, last_state

PROJECT = Path(__file__).parents[1]
RUNS = ("a", "b", "c")

DVC_YAML = """\
stages:
  prepare:
    cmd: python stage.py prepare data.txt prepared.txt
    deps: [data.txt, stage.py]
    outs: [prepared.txt]
  train:
    foreach: ${runs}
    do:
      cmd: python stage.py train@${key} prepared.txt models/${key}.txt
      params: ["runs.${key}"]
      deps:
        - prepared.txt
      outs:
        - models/${key}.txt
  evaluate:
    foreach: ${runs}
    do:
      cmd: python stage.py evaluate@${key} models/${key}.txt metrics/${key}.txt
      deps:
        - models/${key}.txt
      outs:
        - metrics/${key}.txt
  report:
    cmd: python stage.py report metrics/a.txt report.txt
    deps: [metrics]
    outs: [report.txt]
"""

# The earlier of two runs takes longer, so that the flow ends them in another order than DVC.
STAGE = """\
import pathlib, sys, time
name, source, target = sys.argv[1:]
with open(".dvc/tmp/executed", "a") as file:
    file.write(name + "\\n")
sys.stderr.write("0 of 2\\r1 of 2\\r2 of 2\\n")
if name == "train@a":
    time.sleep(5)
text = pathlib.Path(source).read_text()
params = pathlib.Path("params.yaml").read_text()
if name.startswith("train") and f"{name[-1]}: fail" in params:
    sys.exit("the loss is not finite")
pathlib.Path(target).parent.mkdir(exist_ok=True)
pathlib.Path(target).write_text(text + name + "\\n")
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return new_project(tmp_path / "flow", b="1")


def new_project(directory: Path, *, b: str) -> Path:
    directory.mkdir()
    (directory / "dvc.yaml").write_text(DVC_YAML)
    (directory / "stage.py").write_text(STAGE)
    (directory / "data.txt").write_text("data\n")
    (directory / "params.yaml").write_text(f"runs:\n  a: 1\n  b: {b}\n  c: 1\n")
    # As in this project: else DVC lists outputs in metrics/.gitignore in the order of their ends,
    # and that file would count as part of the report's input `metrics`.
    (directory / ".gitignore").write_text("models/\nmetrics/\n")
    run(directory, "git", "init", "--quiet")
    run(directory, sys.executable, "-m", "dvc", "init", "--quiet")
    return directory


def run(directory: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
    return subprocess.run(
        command,
        cwd=directory,
        env={**kept, "PATH": path, "DVC_NO_ANALYTICS": "1", "DO_NOT_TRACK": "true", **environment},
        capture_output=True,
        text=True,
    )


def run_flow(directory: Path, server: str, *options: str) -> subprocess.CompletedProcess[str]:
    return run(
        directory,
        *(sys.executable, "-m", "flows.pipeline", *options),
        PYTHONPATH=str(PROJECT),
        PREFECT_API_URL=server,
        PREFECT_HOME=str(directory.parent / "home"),
    )


def executed(directory: Path) -> list[str]:
    return (directory / ".dvc/tmp/executed").read_text().split()


def api(server: str, what: str, **body: Any) -> list[dict[str, Any]]:
    import httpx

    answer = httpx.post(f"{server}/{what}/filter", json=body, trust_env=False)
    answer.raise_for_status()
    return answer.json()


def last_flow_run(server: str, flow: str = "prefopt-pipeline") -> dict[str, Any]:
    named = {"name": {"any_": [flow]}}
    return api(server, "flow_runs", flows=named, sort="START_TIME_DESC", limit=1)[0]


def task_runs(server: str) -> dict[str, dict[str, Any]]:
    ids = {"id": {"any_": [last_flow_run(server)["id"]]}}
    return {one["name"]: one for one in api(server, "task_runs", flow_runs=ids)}


def log_of(server: str, task_run: str) -> list[str]:
    """The messages of a task run; the server may lag behind the flow's end."""
    where = {"task_run_id": {"any_": [task_run]}}
    deadline = time.monotonic() + 30
    while not (lines := api(server, "logs", logs=where, sort="TIMESTAMP_ASC")):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    return [line["message"] for line in lines]


def test_the_flow_leaves_the_lock_that_dvc_repro_leaves_and_then_has_nothing_to_do(
    tmp_path: Path, project: Path, server: str
) -> None:
    serial = Path(shutil.copytree(project, tmp_path / "serial"))
    assert run(serial, sys.executable, "-m", "dvc", "repro").returncode == 0

    flow = run_flow(project, server)

    assert flow.returncode == 0, flow.stderr
    assert (project / "dvc.lock").read_bytes() == (serial / "dvc.lock").read_bytes()
    assert (project / "report.txt").read_text() == (serial / "report.txt").read_text()
    assert sorted(executed(project)) == sorted(executed(serial))
    # The order of the ends was not the serial one, or the test would show nothing.
    assert executed(project).index("train@b") < executed(project).index("evaluate@a")
    first = last_flow_run(server)
    runs = task_runs(server)
    assert set(runs) == set(executed(project))
    lines = log_of(server, runs["train@b"]["id"])
    assert "Running stage 'train@b':" in lines
    assert "2 of 2" in lines
    assert "0 of 2" not in "".join(lines)

    again = run_flow(project, server)

    assert again.returncode == 0, again.stderr
    assert sorted(executed(project)) == sorted(executed(serial))
    assert again.stdout == "all 8 stages are current\n"
    assert last_flow_run(server) == first  # None was started.
    assert (project / "dvc.lock").read_bytes() == (serial / "dvc.lock").read_bytes()


def test_a_failing_run_stops_only_what_depends_on_it(tmp_path: Path, server: str) -> None:
    project = new_project(tmp_path / "flow", b="fail")
    serial = Path(shutil.copytree(project, tmp_path / "serial"))
    run(serial, sys.executable, "-m", "dvc", "repro", "--keep-going")

    flow = run_flow(project, server)

    assert flow.returncode == 1, flow.stderr
    state = last_flow_run(server)["state"]
    assert state["type"] == "FAILED"
    assert state["message"] == "failed: train@b; not reached: evaluate@b, report"
    runs = task_runs(server)
    assert {name for name, one in runs.items() if one["state_type"] == "COMPLETED"} == {
        *("prepare", "train@a", "evaluate@a", "train@c", "evaluate@c")
    }
    assert runs["train@b"]["run_count"] == 1  # No retry: it would fail again.
    assert "the loss is not finite" in log_of(server, runs["train@b"]["id"])
    assert (project / "dvc.lock").read_bytes() == (serial / "dvc.lock").read_bytes()
    assert (project / "metrics/c.txt").exists()


# DVC, by way of pygtrie.
@pytest.mark.filterwarnings("ignore:_NoneStep.value:DeprecationWarning")
def test_the_plan_goes_as_dvc_goes(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    plan = read_plan(Path())
    assert plan.outdated == set(plan.order)
    assert plan.needs["report"] == {f"evaluate@{run}" for run in RUNS}
    assert plan.ready(plan.outdated, []) == ["prepare"]
    assert plan.ready(plan.outdated - {"prepare"}, ["prepare"]) == [f"train@{r}" for r in RUNS]


def test_the_end_of_a_supervisor_ends_the_whole_group_of_its_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with Supervisor() as supervisor:
        process = supervisor.start(["sh", "-c", FAMILY], os.environ, subprocess.DEVNULL)
        members = family(tmp_path)
        assert all(is_alive(member) for member in members)
    assert process.returncode is not None
    assert not any(is_alive(member) for member in members)


def test_the_end_of_a_command_ends_what_it_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines: list[str] = []
    orphaning = FAMILY.replace("wait; true", "echo done; exit 3")
    with Supervisor() as supervisor:
        status = supervisor.run(["sh", "-c", orphaning], os.environ, lines.append)
    assert status == 3
    assert lines == ["done"]
    assert not any(is_alive(member) for member in family(tmp_path))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of the death")
def test_a_killed_supervisor_takes_its_commands_with_it(tmp_path: Path) -> None:
    program = (
        "import os, sys; from flows.supervise import Supervisor; "
        "Supervisor().run(['sh', '-c', sys.argv[1]], os.environ, str)"
    )
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    with subprocess.Popen(
        [sys.executable, "-c", program, FAMILY], cwd=tmp_path, env=environment
    ) as flow:
        members = family(tmp_path)
        flow.kill()
    wait_until(lambda: not any(is_alive(member) for member in members))


def test_a_progress_bar_is_logged_as_its_last_state() -> None:
    assert last_state(b"  0%|  \r 50%|# \r100%|##\r\n") == "100%|##"
    assert last_state(b"a line\n") == "a line"
    assert last_state(b"\n") == ""


def test_a_commit_is_run_in_a_worktree_while_this_one_is_edited_and_then_restored(
    tmp_path: Path, project: Path, server: str
) -> None:
    run(project, "git", "add", ".")
    run(
        project, "git", *("-c", "user.name=t", "-c", "user.email=t@localhost"), "commit", "-qm", "1"
    )
    (project / "stage.py").write_text("an edit that is not ready")

    flow = run_flow(project, server, "--at", "HEAD")

    assert flow.returncode == 0, flow.stdout + flow.stderr
    assert not (project / "dvc.lock").exists()
    assert len(run(project, "git", "worktree", "list").stdout.splitlines()) == 1
    run(project, "git", "checkout", "stage.py")
    restored = run(project, sys.executable, "-m", "dvc", "repro")
    assert restored.stdout.count("is cached - skipping run") == 8
    assert "Running stage" not in restored.stdout


API_YAML = """\
stages:
  judge:
    foreach: [a, b, c, d]
    do:
      cmd: python judge.py ${item}.txt
      meta: {pool: api}
      outs: ["${item}.txt"]
"""

# A line where it starts and one where it ends, each written whole.
JUDGE = """\
import os, pathlib, sys, time
log = os.open(".dvc/tmp/judging", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
os.write(log, b"+1\\n")
time.sleep(3)
pathlib.Path(sys.argv[1]).write_text("a verdict")
os.write(log, b"-1\\n")
"""


def test_no_more_stages_ask_apis_at_once_than_the_server_allows(
    tmp_path: Path, server: str
) -> None:
    import httpx

    project = tmp_path / "flow"
    project.mkdir()
    (project / "dvc.yaml").write_text(API_YAML)
    (project / "judge.py").write_text(JUDGE)
    run(project, "git", "init", "--quiet")
    run(project, sys.executable, "-m", "dvc", "init", "--quiet")
    limits = f"{server}/v2/concurrency_limits/"
    with httpx.Client(trust_env=False) as client:
        client.delete(f"{limits}prefopt-api")  # Of a deployment at the same server.
        client.post(limits, json={"name": "prefopt-api", "limit": 2}).raise_for_status()
        try:
            flow = run_flow(project, server, "--concurrency", "4")
        finally:
            client.delete(f"{limits}prefopt-api").raise_for_status()

    assert flow.returncode == 0, flow.stderr
    changes = map(int, (project / ".dvc/tmp/judging").read_text().split())
    at_once = list(itertools.accumulate(changes))
    assert len(at_once) == 8
    assert max(at_once) == 2  # With four allowed by the flow, and the limit used.


FAULTY_YAML = """\
stages:
  flaky:
    cmd: python faulty.py flaky flaky.txt
    deps: [faulty.py]
    meta: {retries: 2}
    outs: [flaky.txt]
  large:
    cmd: python faulty.py large large.txt
    deps: [faulty.py]
    outs: [large.txt]
  slow:
    cmd: python faulty.py slow slow.txt
    deps: [faulty.py]
    outs: [slow.txt]
"""

# Published as the project's own stages publish. What is wrong is said by files that are no inputs.
# The disk is full where a stage writes: a small one of its own, or where that is not allowed, files
# of limited size.
FAULTY = """\
import os, pathlib, resource, subprocess, sys, time
from stages.artefacts import stage
name, output = sys.argv[1], pathlib.Path(sys.argv[2])
if name == "large" and pathlib.Path("full").exists() and "SMALL" not in os.environ:
    alone = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec"]
    mount = "mount -t tmpfs -o size=100k none .prefopt; "
    if subprocess.run([*alone, mount]).returncode == 0:
        again = f"exec {sys.executable} {' '.join(sys.argv)}"
        os.execvpe(alone[0], [*alone, mount + again], {**os.environ, "SMALL": "disk"})
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
with open(f".dvc/tmp/{name}.tries", "a") as file:
    file.write(f"{os.getpid()}\\n")
with stage(name, inputs=[pathlib.Path("faulty.py")], outputs=[output], params={}) as workspace:
    tries = len(pathlib.Path(f".dvc/tmp/{name}.tries").read_text().split())
    if name == "flaky" and tries < 3:
        sys.exit("by chance")
    while pathlib.Path("wait").exists() and name == "slow":
        time.sleep(0.1)
    workspace.partial(output).write_text("x" * 1_000_000)
"""


def faulty_project(directory: Path, *, full: bool, wait: bool) -> Path:
    directory.mkdir()
    (directory / "dvc.yaml").write_text(FAULTY_YAML)
    (directory / "faulty.py").write_text(FAULTY)
    (directory / ".gitignore").write_text(".prefopt\n")
    for name, wanted in {"full": full, "wait": wait}.items():
        if wanted:
            (directory / name).touch()
    run(directory, "git", "init", "--quiet")
    run(directory, sys.executable, "-m", "dvc", "init", "--quiet")
    return directory


def tries(project: Path, stage: str) -> list[int]:
    """Process ids of a stage's tries."""
    path = project / f".dvc/tmp/{stage}.tries"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def start_flow(project: Path, server: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "flows.pipeline", "--concurrency", "3"],
        cwd=project,
        env={
            **os.environ,
            "PYTHONPATH": str(PROJECT),
            "PREFECT_API_URL": server,
            "DVC_NO_ANALYTICS": "1",
        },
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def test_a_stage_that_fails_by_chance_is_tried_again_and_a_full_disk_leaves_nothing_half(
    tmp_path: Path, server: str
) -> None:
    project = faulty_project(tmp_path / "flow", full=True, wait=False)

    flow = run_flow(project, server)

    assert flow.returncode == 1, flow.stderr
    assert last_flow_run(server)["state"]["message"] == "failed: large; not reached: none"
    runs = task_runs(server)
    assert runs["flaky"]["run_count"] == len(tries(project, "flaky")) == 3
    assert runs["large"]["run_count"] == len(tries(project, "large")) == 1
    said = "\n".join(log_of(server, runs["large"]["id"]))
    assert re.search("No space left on device|File too large", said)
    assert not (project / "large.txt").exists()

    (project / "full").unlink()
    assert run_flow(project, server).returncode == 0
    assert (project / "large.txt").stat().st_size == 1_000_000
    assert len(tries(project, "flaky")) == 3  # It was not run again.


def test_a_run_that_is_cancelled_in_the_ui_leaves_no_process_and_the_next_goes_on(
    tmp_path: Path, server: str
) -> None:
    project = faulty_project(tmp_path / "flow", full=False, wait=True)
    with start_flow(project, server) as flow:
        wait_until(lambda: tries(project, "slow") != [], 120)
        cancel(server, last_flow_run(server)["id"])
        said, _ = flow.communicate(timeout=120)
    assert flow.returncode == 1, said
    assert last_flow_run(server)["state_type"] == "CANCELLED"
    assert not is_alive(tries(project, "slow")[0])
    (project / "wait").unlink()
    assert run_flow(project, server).returncode == 0


def test_a_server_that_goes_away_and_comes_back_stops_nothing(tmp_path: Path) -> None:
    from flows.server import own_server

    project = faulty_project(tmp_path / "flow", full=False, wait=True)
    with own_server(tmp_path / "home") as url:
        flow = start_flow(project, url)
        wait_until(lambda: tries(project, "slow") != [], 120)
    time.sleep(60)
    (project / "wait").unlink()  # The stage ends while nobody can be told.
    wait_until(lambda: (project / "slow.txt").exists(), 60)
    with own_server(tmp_path / "home", int(url.split(":")[2].split("/")[0])):
        said, _ = flow.communicate(timeout=180)
        assert flow.returncode == 0, said[-3000:]
        assert last_flow_run(url)["state_type"] == "COMPLETED"
        assert {one["state_type"] for one in task_runs(url).values()} == {"COMPLETED"}
    assert tries(project, "slow") == tries(project, "slow")[:1]


def cancel(server: str, flow_run: str) -> None:
    """As the button of the UI does."""
    import httpx

    state = {"state": {"type": "CANCELLING"}}
    url = f"{server}/flow_runs/{flow_run}/set_state"
    httpx.post(url, json=state, trust_env=False).raise_for_status()

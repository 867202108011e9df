"""Laws of `prefopt status`: each state of a workspace is told, with why and what repairs it."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import PROJECT

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
      deps: [prepared.txt]
      outs: ["models/${key}.txt"]
  report:
    cmd: python stage.py report models/a.txt report.txt
    deps: [models]
    outs: [report.txt]
"""

# A stage as this project's are. What it does is said by params.yaml.
STAGE = """\
import sys, time
from pathlib import Path
from stages.artefacts import program, stage
from stages.tracking import Curve

name, source, target = sys.argv[1:]

def main():
    inputs, outputs = [Path(source)], [Path(target)]
    if "refused: " + name in Path("params.yaml").read_text():
        raise ValueError("params.yaml: no such loss, got 'dop'; did you mean 'dpo'?")
    with stage(name, inputs=inputs, outputs=outputs, params={}) as work:
        with Curve(work.partial(Path("curve")), name, 40, None) as curve:
            curve.log({"step": 0, "loss": 1.0})
            deed = Path("deed").read_text() if Path("deed").exists() else ""
            if deed == name + " fails":
                raise FloatingPointError("the loss is not finite")
            while deed == name + " waits":
                time.sleep(0.1)
        work.partial(Path(target)).write_text(name)

program(main)
"""


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace where all is up to date."""
    project = tmp_path_factory.mktemp("status") / "project"
    project.mkdir()
    (project / "dvc.yaml").write_text(DVC_YAML)
    (project / "stage.py").write_text(STAGE)
    (project / "data.txt").write_text("data\n")
    (project / "params.yaml").write_text("runs:\n  a: 1\n  b: 1\n  c: 1\n")
    (project / ".gitignore").write_text("models/\n")
    run(project, "git", "init", "--quiet")
    run(project, sys.executable, "-m", "dvc", "init", "--quiet")
    assert repro(project).returncode == 0
    return project


@pytest.fixture
def project(reproduced: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(reproduced, tmp_path / "project", symlinks=True))


def run(project: Path, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=project, env=own(**more), capture_output=True, text=True)


def own(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
    return {**kept, "PATH": path, "PYTHONPATH": str(PROJECT), "DVC_NO_ANALYTICS": "1", **more}


def repro(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(project, sys.executable, "-m", "dvc", "repro", *arguments)


def status(project: Path, **more: str) -> list[str]:
    said = run(project, sys.executable, "-m", "flows.cli", "status", **more)
    assert said.returncode == 0, said.stderr
    return said.stdout.splitlines()


def section(lines: list[str], title: str) -> list[str]:
    """The lines of a section, without their margin; none if it is not there."""
    found = False
    section: list[str] = []
    for line in lines:
        found = line.startswith(f"{title} ") or (found and line.startswith(" " * 12))
        section += [line[12:]] if found else []
    return section


def test_where_all_is_up_to_date_there_is_nothing_to_do(project: Path) -> None:
    assert status(project) == [
        "up to date  5 of 5 stages",
        "next        nothing to do; `report/index.html` is the report",
    ]


def test_a_workspace_that_never_ran_says_so_in_a_line(project: Path) -> None:
    (project / "dvc.lock").unlink()
    lines = status(project)
    assert section(lines, "stale") == ["prepare, train@{a,b,c}, report: it has not run yet"]
    assert section(lines, "next") == ["`prefopt repro`"]


def test_an_edit_is_named_and_what_follows_it_is_apart(project: Path) -> None:
    (project / "params.yaml").write_text("runs:\n  a: 1\n  b: 2\n  c: 2\n")
    lines = status(project)
    assert section(lines, "stale") == [
        "train@{b,c}: runs.RUN changed in params.yaml",
        "report: after these",
    ]
    assert section(lines, "up to date") == ["2 of 5 stages"]
    assert section(lines, "next") == ["`prefopt repro`"]


def test_data_and_commands_that_changed_are_told_apart(project: Path) -> None:
    (project / "data.txt").write_text("other\n")
    text = (project / "dvc.yaml").read_text()
    (project / "dvc.yaml").write_text(
        text.replace("python stage.py report", "python  stage.py report")
    )
    assert section(status(project), "stale") == [
        "prepare: data.txt changed",
        "report: its command changed",
        "train@{a,b,c}: after these",
    ]


def test_outputs_that_the_cache_has_need_a_checkout_alone(project: Path) -> None:
    (project / "models/a.txt").unlink()
    lines = status(project)
    assert section(lines, "stale")[0] == "train@a: models/a.txt missing"
    assert section(lines, "next") == ["`dvc checkout`; all of it is in DVC's cache"]
    assert run(project, sys.executable, "-m", "dvc", "checkout").returncode == 0
    assert section(status(project), "up to date") == ["5 of 5 stages"]


def test_a_stage_that_failed_is_told_with_its_last_words_until_it_succeeds(
    project: Path,
) -> None:
    (project / "params.yaml").write_text("runs:\n  a: 1\n  b: 2\n  c: 1\n")
    (project / "deed").write_text("train@b fails")
    assert repro(project).returncode != 0
    lines = status(project)
    (failed,) = section(lines, "failed")
    assert failed.startswith("train@b: ")
    assert failed.endswith(" ago: FloatingPointError: the loss is not finite")
    assert "`prefopt repro`" in section(lines, "next")[0]
    assert section(lines, "stale") == ["report: after these"]
    (project / "deed").unlink()
    assert repro(project).returncode == 0
    assert section(status(project), "failed") == []


def test_a_refusal_before_the_stage_began_is_told_too(project: Path) -> None:
    (project / "params.yaml").write_text("runs:\n  a: 2\n  b: 1\n  c: 1\n# refused: train@a\n")
    assert repro(project).returncode != 0
    (failed,) = section(status(project), "failed")
    assert failed.endswith("params.yaml: no such loss, got 'dop'; did you mean 'dpo'?")


@contextmanager
def running(project: Path) -> Iterator[None]:
    """While train@b is at work."""
    (project / "params.yaml").write_text("runs:\n  a: 1\n  b: 2\n  c: 1\n")
    (project / "deed").write_text("train@b waits")
    with subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro"],
        cwd=project,
        env=own(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as dvc:
        try:
            deadline = time.monotonic() + 60
            while not (project / ".prefopt/progress/train@b.json").exists():
                assert time.monotonic() < deadline
                time.sleep(0.1)
            yield
        finally:
            os.killpg(dvc.pid, signal.SIGKILL)


def test_a_stage_that_runs_is_told_with_its_process_and_its_progress(project: Path) -> None:
    with running(project):
        lines = status(project)
        (told,) = section(lines, "running")
        name, process, progress = told.split(", ", 1)[0], told, told.rpartition(", ")[2]
        assert name.startswith("train@b: process ")
        assert "of this machine, for " in process
        assert progress == "step 1 of 40"
        assert section(lines, "stale") == ["report: after these"]
        assert section(lines, "next") == ["wait; a second `prefopt repro` would wait too"]
    assert "ended without a word" in section(status(project), "failed")[0]


def test_journals_that_mlflow_has_not_taken_are_counted(project: Path) -> None:
    (project / ".prefopt/tracking").mkdir()
    (project / ".prefopt/tracking/1-dpo.jsonl").touch()
    (told,) = section(status(project), "MLflow")
    assert told.startswith("1 journals are not delivered yet")


def test_a_server_that_does_not_answer_costs_a_line_and_no_more(project: Path) -> None:
    url = "http://user:secret@127.0.0.1:1/api"
    (told,) = section(status(project, PREFECT_API_URL=url), "Prefect")
    assert told.startswith("http://127.0.0.1:1/api does not answer")


def test_outside_of_a_workspace_it_is_refused_in_a_line(tmp_path: Path) -> None:
    refused = run(tmp_path, sys.executable, "-m", "flows.cli", "status")
    assert refused.returncode == 1
    assert "stand where dvc.yaml is" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


def test_the_shipped_recipe_is_told_in_seconds_and_without_torch() -> None:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = (
        "import sys; from flows.status import report; report(); "
        "print({'torch', 'mlflow', 'prefect'} & set(sys.modules))"
    )
    told = run(PROJECT, sys.executable, "-B", "-c", code)
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert told.stdout.strip() == "set()", told.stderr
    # One and a half on a quiet machine; the clock would count what else the machine does.
    assert now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime < 4

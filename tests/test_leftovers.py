"""A dropped run leaves nothing that those who read a folder would read."""

import shutil
import sys
from pathlib import Path

import pytest
from conftest import PROJECT
from test_flows import executed, new_project, run, run_flow

from flows.graph import read_entries
from flows.leftovers import remove_leftovers

LEFT = ("metrics/c.txt", "models/c.txt")
# DVC, by way of pygtrie.
pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep.value:DeprecationWarning")


def set_runs(project: Path, *runs: str) -> None:
    (project / "params.yaml").write_text("runs:\n" + "".join(f"  {run}: 1\n" for run in runs))


def repro(project: Path) -> str:
    """`prefopt repro`, without what it shows in the end; what it says."""
    command = "import sys; from flows.cli import dvc_repro; sys.exit(dvc_repro())"
    done = run(project, sys.executable, "-c", command, PYTHONPATH=str(PROJECT))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    project = new_project(tmp_path_factory.mktemp("leftovers") / "project", b="1")
    repro(project)
    return project


@pytest.fixture
def project(reproduced: Path, tmp_path: Path) -> Path:
    """A project that once had three runs, and is to have two."""
    project = Path(shutil.copytree(reproduced, tmp_path / "project"))
    set_runs(project, "a", "b")
    return project


def test_a_dropped_runs_outputs_go_and_come_back_from_the_cache(
    project: Path, tmp_path: Path
) -> None:
    never = new_project(tmp_path / "never", b="1")
    set_runs(never, "a", "b")
    repro(never)

    said = repro(project)

    assert f"DVC's cache keeps it: {', '.join(LEFT)}\n" in said
    assert not any((project / path).exists() for path in LEFT)
    assert read_entries(project)["report"] == read_entries(never)["report"]
    assert "removed" not in repro(project)

    set_runs(project, "a", "b", "c")
    before = executed(project)
    repro(project)
    assert all((project / path).exists() for path in LEFT)
    assert executed(project) == before  # Not even the report, which once read all three.


def test_what_the_cache_does_not_keep_stays_and_is_named(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "metrics/c.txt").chmod(0o644)
    (project / "metrics/c.txt").write_text("edited\n")
    shutil.rmtree(project / ".dvc/cache")
    (project / "metrics/d.txt").write_text("nobody's\n")
    said: list[str] = []
    monkeypatch.chdir(project)
    remove_leftovers(Path(), said.append)
    (line,) = said
    assert line.startswith("left, ")
    assert f": {', '.join(LEFT)}; remove it" in line
    assert (project / "metrics/c.txt").read_text() == "edited\n"
    assert (project / "metrics/d.txt").exists()


def test_a_file_that_another_stage_makes_now_is_not_a_leftover(project: Path) -> None:
    pipeline = project / "dvc.yaml"
    renamed = (
        "  other:\n    cmd: python stage.py other data.txt models/c.txt\n    outs: [models/c.txt]\n"
    )
    pipeline.write_text(pipeline.read_text() + renamed)
    said: list[str] = []
    remove_leftovers(project, said.append)
    assert (project / "models/c.txt").exists()
    assert not (project / "metrics/c.txt").exists()


def test_a_broken_pipeline_is_left_to_dvc(project: Path) -> None:
    (project / "params.yaml").write_text("runs: [\n")
    remove_leftovers(project, pytest.fail)
    assert all((project / path).exists() for path in LEFT)


def test_the_flow_removes_them_too(project: Path, server: str) -> None:
    flow = run_flow(project, server)
    assert flow.returncode == 0, flow.stderr
    assert not any((project / path).exists() for path in LEFT)
    assert (deps := read_entries(project)["report"]["deps"])
    assert deps[0]["nfiles"] == 2

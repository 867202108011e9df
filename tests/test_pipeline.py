"""The whole pipeline, small: real model, real text, real DVC.

It runs once as a person would have it; after that its stages are forks of one process.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import PROJECT
from forks import python_of_forks

PROGRAMS = [str(Path(sys.executable).parent)]  # before PATH
SMALL = {
    "data": {"num_train": 160, "num_validation": 24, "num_test": 40},
    "sample": {"num_prompts": 48, "num_completions": 3, "num_validation_prompts": 8},
    "evaluation": {"num_resamples": 500},
    "runs": {
        "dpo": {"loss": "dpo", "beta": 0.1},
        "squared": {"loss": "f_dpo", "beta": 0.1, "divergence": "squared_log"},
    },
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the project with small numbers, its pipeline run once."""
    copy = copied(tmp_path_factory.mktemp("pipeline") / "project")
    repro(copy)
    # Later tests add entries to the lock, and DVC never removes one.
    shutil.copyfile(copy / "dvc.lock", copy.parent / "first.lock")
    with python_of_forks(copy.parent / "forks") as programs, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "PROGRAMS", [str(programs), *PROGRAMS])
        yield copy
    shutil.rmtree(copy.parent)


def copied(to: Path) -> Path:
    """What git would clone, the working tree's state, with small parameters."""
    files = git(PROJECT, "ls-files", "--cached", "--others", "--exclude-standard").splitlines()
    for name in files:
        if (PROJECT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(PROJECT / name, to / name)
    (to / "dvc.lock").unlink(missing_ok=True)
    git(to, "init", "--quiet")
    edit(to, SMALL)
    git(to, "add", ".")
    git(to, "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "--quiet", "-m", "small")
    return to


def git(project: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=project, check=True, capture_output=True, text=True
    ).stdout


def edit(project: Path, changes: dict[str, object]) -> None:
    path = project / "params.yaml"
    params = yaml.safe_load(path.read_text())
    for section, values in changes.items():
        if section == "runs" or not isinstance(values, dict):
            params[section] = values
        else:
            params[section] = params[section] | values
    path.write_text(yaml.safe_dump(params, sort_keys=False))


def run(project: Path, *module: str) -> subprocess.CompletedProcess[str]:
    """`python -m MODULE ...` as a person with the environment active would."""
    environment = os.environ | {
        "PATH": os.pathsep.join([*PROGRAMS, os.environ["PATH"]]),
        "OMP_NUM_THREADS": "1",
        "TQDM_DISABLE": "1",
        "MLFLOW_TRACKING_URI": f"sqlite:///{project}/mlflow.db",
        "PREFECT_HOME": str(project.parent / "prefect"),
    }
    command = [sys.executable, "-m", *module]
    return subprocess.run(
        command, cwd=project, env=environment, capture_output=True, text=True, check=False
    )


def dvc(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(project, "dvc", *arguments)


def repro(project: Path, *arguments: str) -> list[str]:
    """Run `dvc repro`; returns the stages that were executed, not skipped or restored."""
    done = dvc(project, "repro", *arguments)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    # DVC announces every stage that it runs, with its name in quotes.
    return [
        line.split("'")[1] for line in done.stdout.splitlines() if line.startswith("Running stage")
    ]


def test_every_artefact_of_the_pipeline_is_there_and_locked(project: Path) -> None:
    locked = yaml.safe_load((project / "dvc.lock").read_text())["stages"]
    assert {"sft", "reference", "train@dpo", "evaluate@squared", "compare", "report"} <= set(locked)
    metrics = json.loads((project / "artefacts/metrics/dpo.json").read_text())
    for opponent in ("sft", "gold"):
        for judge in ("vader", "textblob"):
            rate = metrics["win_rate"][opponent][judge]
            assert rate["low"] <= rate["value"] <= rate["high"]
            assert rate["policy"] + rate["opponent"] + rate["tie"] == 40
    page = (project / "artefacts/report/index.html").read_text()
    assert "squared" in page
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?https?:""", page)
    shown = dvc(project, "metrics", "show", "--json")
    assert "artefacts/metrics/squared.json" in shown.stdout


def test_a_second_repro_executes_nothing(project: Path) -> None:
    assert repro(project) == []


def test_changing_one_run_runs_its_four_stages_the_comparison_and_the_report(project: Path) -> None:
    changed = SMALL["runs"] | {"dpo": {"loss": "dpo", "beta": 0.2}}
    edit(project, {"runs": changed})
    try:
        executed = repro(project)
    finally:
        edit(project, {"runs": SMALL["runs"]})
        repro(project)
    runs = ["train@dpo", "complete@dpo", "judge@dpo", "evaluate@dpo"]
    assert sorted(executed) == sorted(["check", *runs, "compare", "report"])


def test_adding_a_run_trains_only_it(project: Path) -> None:
    edit(project, {"runs": SMALL["runs"] | {"more": {"loss": "ipo", "tau": 0.1}}})
    try:
        executed = repro(project)
    finally:
        edit(project, {"runs": SMALL["runs"]})
        repro(project)
    runs = ["train@more", "complete@more", "judge@more", "evaluate@more"]
    assert sorted(executed) == sorted(["check", *runs, "compare", "report"])


def test_another_clone_run_as_a_flow_gives_the_same_lock(project: Path, tmp_path: Path) -> None:
    clone = copied(tmp_path / "clone")
    done = run(clone, "flows.pipeline")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (clone / "dvc.lock").read_bytes() == (project.parent / "first.lock").read_bytes()
    shutil.rmtree(clone)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runs": {"dpo": {"loss": "dpo"}}}, "runs.dpo.beta: is missing"),
        ({"runs": {"dpo": {"loss": "dpi", "beta": 1.0}}}, "Did you mean 'dpo'?"),
        ({"train": {"bacth_size": 3}}, "train.bacth_size: no such key"),
        ({"base": "data/nothing"}, "base: 'data/nothing' is no model directory"),
        ({"data": {"source": "nothing.jsonl"}}, "data.source: no such file, got 'nothing.jsonl'"),
    ],
    ids=["missing", "loss", "key", "model", "data"],
)
def test_bad_input_stops_before_any_training_and_harms_nothing(
    project: Path, changes: dict[str, object], message: str
) -> None:
    before = (project / "params.yaml").read_text()
    metrics = (project / "artefacts/metrics/dpo.json").read_bytes()
    edit(project, changes)
    try:
        done = dvc(project, "repro")
    finally:
        (project / "params.yaml").write_text(before)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert "train@" not in done.stdout
    repro(project)
    assert (project / "artefacts/metrics/dpo.json").read_bytes() == metrics

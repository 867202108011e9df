"""A finished pipeline, small and real: real model, text, judges, DVC, git and MLflow.

Its stages run in forks of one process that has imported what is heavy, so that it takes seconds;
`dvc commit` then writes the lock that `dvc repro` would have written.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from conftest import PROJECT

SMALL: dict[str, Any] = {
    "data": {"num_train": 96, "num_validation": 12, "num_test": 16, "max_completion_tokens": 12},
    "sample": {"num_prompts": 24, "num_completions": 3, "num_validation_prompts": 4},
    "watch": {"every": None},
    "evaluation": {"num_resamples": 100},
    "exam": {"num_items": 8},
}
RUNS = {
    "dpo": {"loss": "dpo", "beta": 0.1, "lora": {"rank": 2, "alpha": 4, "targets": "all-linear"}},
    "squared": {"loss": "f_dpo", "beta": 0.1, "divergence": "squared_log"},
}
# One interpreter for all stages: what they import of others is imported once.
RUN_EACH = """
import os, runpy, sys
sys.path.insert(0, "")
import jinja2, matplotlib.pyplot, peft, pyarrow.parquet, scipy.special, torch, transformers
import transformers.modeling_utils
for line in sys.stdin:
    os.environ["DVC_STAGE"], _, _, module, *arguments = line.split()
    if os.fork() == 0:
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        sys.stdout.flush()
        os._exit(0)
    assert os.wait()[1] == 0, line
"""


def finished_pipeline(directory: Path) -> Path:
    """Make it there: committed, with its cache and MLflow's records."""
    for name in git(PROJECT, "ls-files", "--cached", "--others", "--exclude-standard").splitlines():
        if (PROJECT / name).is_file() and not name.startswith(("tests/", "benchmarks/")):
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(PROJECT / name, directory / name)
    (directory / "dvc.lock").unlink()
    params = yaml.safe_load((directory / "params.yaml").read_text())
    for section, values in SMALL.items():
        params[section] |= values
    params["runs"] = RUNS
    (directory / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    git(directory, "init", "--quiet")
    commit(directory, "small")
    run(directory, "-c", RUN_EACH, said="\n".join(commands(directory)))
    run(directory, "-m", "dvc", "commit", "--force", "--quiet")
    run(directory, "-m", "stages.tracking")  # Delivers what the trainings' courier has not.
    commit(directory, "finished")
    run(directory, "-m", "stages.report", "--publish")
    return directory


def commands(directory: Path) -> list[str]:
    """Names and commands of the stages of dvc.yaml, in their order."""
    read = "import pathlib; from flows.graph import read_plan; plan = read_plan(pathlib.Path())"
    said = run(directory, "-c", f"{read}; print(*plan.order)")
    stages = yaml.safe_load((directory / "dvc.yaml").read_text())["stages"]
    found: list[str] = []
    for name in said.split():
        stage, _, key = name.partition("@")
        command = stages[stage].get("do", stages[stage])["cmd"]
        found.append(f"{name} " + command.replace("${key}", key).replace("${item}", key))
    return found


def run(directory: Path, *arguments: str, said: str | None = None) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=directory,
        env=environment(),
        input=said,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    path = os.pathsep.join([str(Path(sys.executable).parent), kept["PATH"]])
    return kept | {"PATH": path, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}


def git(directory: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
    return subprocess.run(
        ["git", *identity, *arguments], cwd=directory, check=True, capture_output=True, text=True
    ).stdout


def commit(directory: Path, message: str) -> None:
    git(directory, "add", ".")
    git(directory, "commit", "--quiet", "-m", message)

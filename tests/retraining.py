"""A small project that is retrained, and the preferences that it is offered."""

import os
import random
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import httpx
import yaml
from conftest import PROJECT, write_jsonl
from test_pipeline import copied, edit, git

from stages import registry
from stages.sources import read_sentences

Row = dict[str, str]

SMALL: dict[str, Any] = {
    "data": {
        "num_train": None,
        "num_validation": 8,
        "num_test": 48,
        "split_by": "digest",
        "max_completion_tokens": 10,
    },
    "sft": {"num_epochs": 0},  # So that the reference stays what it is.
    "sample": {"num_prompts": 2, "num_completions": 2, "num_validation_prompts": 0},
    "label": {"method": "given"},
    "train": {"batch_size": 16, "learning_rate": 0.001, "num_epochs": 2},
    "watch": {"every": None},
    "runs": {"dpo": {"loss": "dpo", "beta": 0.1}},
    "exam": {"num_items": 60},
    "evaluation": {"num_resamples": 500, "judges": ["vader"]},
    "retrain": {"source": "incoming"},
}
GOOD = ["wonderful", "charming", "great", "brilliant", "beautiful", "delightful", "lovely"]
BAD = ["awful", "boring", "terrible", "dull", "horrible", "stupid", "ugly"]


def preferences(first: int, last: int, *, flipped: Callable[[int], bool]) -> list[Row]:
    """Pairs of prompts by their numbers; of those that are flipped the bad text is chosen."""
    found = list(dict.fromkeys(t.prompt for t in read_sentences(PROJECT / "data/reviews.json", 4)))
    draw = random.Random(first)
    rows: list[Row] = []
    for number in range(first, last):
        texts = [f" is {draw.choice(words)} and {draw.choice(words)} ." for words in (GOOD, BAD)]
        chosen, rejected = texts[::-1] if flipped(number) else texts
        rows.append({"prompt": found[number], "chosen": chosen, "rejected": rejected})
    return rows


class Project:
    """A project that is retrained, and the commands that a person gives there."""

    def __init__(self, folder: Path, server: str, launcher: str) -> None:
        self.folder = copied(folder / "project")
        self.server = server
        self.environment = {
            **{key: value for key, value in os.environ.items() if "PREFECT_" not in key},
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PREFECT_API_URL": server,
            "PREFECT_HOME": str(folder / "home"),
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "CUDA_VISIBLE_DEVICES": "0",  # A worker's GPU, whether or not there is one.
            "MLFLOW_TRACKING_URI": f"sqlite:///{self.folder}/mlflow.db",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(self.folder),  # As if it were installed, for the worker.
        }
        edit(self.folder, {key: value for key, value in SMALL.items() if key != "retrain"})
        pipeline = self.folder / "dvc.yaml"
        pipeline.write_text(pipeline.read_text().replace("python -m", launcher))
        (self.folder / "incoming").mkdir()
        self.set_retrain(source="incoming")

    def set_retrain(self, **changes: Any) -> None:
        """New parameters of `retrain`, committed."""
        params = yaml.safe_load((self.folder / "params.yaml").read_text())
        params["retrain"] |= changes
        params["retrain"]["gate"]["max_kl"] = 200.0
        edit(self.folder, {"retrain": params["retrain"]})
        git(self.folder, "add", "--update")
        git(self.folder, "-c", "user.name=t", "-c", "user.email=t@l", "commit", "-qm", "parameters")

    def offer(self, name: str, rows: list[Row]) -> None:
        """Put a file of preferences where the source is."""
        write_jsonl(self.folder / "incoming" / name, rows)

    def start(
        self, *command: str, output: int | IO[str] = subprocess.PIPE
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-B", *command],
            cwd=self.folder,
            env=self.environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *command: str, status: int = 0) -> str:
        """What a command says, which is to end with this status."""
        with self.start(*command) as process:
            said, _ = process.communicate()
        assert process.returncode == status, said[-4000:]
        return said

    def deploy(self) -> dict[str, Any]:
        """`prefopt deploy`, where no rounds of others are left; gives the deployment of rounds."""
        named = {"deployments": {"name": {"any_": ["retrain", "watch"]}}}
        for others in self.api("deployments/filter", **named):
            self.api(f"deployments/{others['id']}", "DELETE")
        self.run("-m", "flows.cli", "deploy")
        return self.api("deployments/name/prefopt-retrain/retrain", "GET")

    def retrain(self, *, status: int = 0) -> str:
        """A round, and how it ended."""
        return self.run("-m", "flows.cli", "retrain", status=status).splitlines()[-1]

    def registry(self) -> Any:
        from mlflow import MlflowClient

        uri = self.environment["MLFLOW_TRACKING_URI"]
        return MlflowClient(uri, uri)

    def held(self) -> dict[str, Any]:
        """What the registry shows."""
        return registry.shown(self.registry(), "reviews")

    def aliases(self) -> dict[str, str | None]:
        held = self.held()
        return {name: held[name] and held[name]["version"] for name in registry.ALIASES}

    def at(self, path: str, revision: str = "retrain") -> Any:
        """A file of YAML at a revision."""
        return yaml.safe_load(git(self.folder, "show", f"{revision}:{path}"))

    def scored(self) -> dict[bytes, int]:
        """Prompts of the reference's store, and when each was written, as a number."""
        (file,) = (self.folder / ".prefopt/reference").glob("*.sqlite")
        with sqlite3.connect(file) as database:
            return dict(database.execute("SELECT digest, rowid FROM records"))

    def holds(self, stage: str) -> bool:
        """Whether DVC's cache here has all that a stage of the last round left."""
        cache = self.folder / ".dvc/cache/files/md5"
        digests = [out["md5"] for out in self.at("dvc.lock")["stages"][stage]["outs"]]
        return all((cache / digest[:2] / digest[2:]).exists() for digest in digests)

    def api(self, path: str, method: str = "POST", **body: Any) -> Any:
        answer = httpx.request(method, f"{self.server}/{path}", json=body, trust_env=False)
        answer.raise_for_status()
        return answer.json() if answer.content else None


def worktrees(project: Path) -> str:
    return git(project, "worktree", "list")


def never(_number: int) -> bool:
    return False


def version(run: str, data: str, md5: str) -> dict[str, Any]:
    """A model of a round, for the registry."""
    tags = {"prefopt.run": run, "prefopt.data": data, "dvc.md5": md5}
    return {"source": f"dvc://project@{md5}:artefacts/models/{run}", "tags": tags}

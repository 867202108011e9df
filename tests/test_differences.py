"""What differs between two results: the planted cause is found, and the first one is named."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from finished import commit, git

from flows.differences import as_text, differences, side
from flows.impact import impact
from flows.lineage import read_lineage

MODEL = b"\0weights"


@dataclass
class Pipeline:
    """A pipeline whose outputs are digests of all that they come from, the machine included."""

    data: list[str] = field(default_factory=lambda: [f'{{"prompt": "p{i}"}}' for i in range(9)])
    base: bytes = MODEL
    template: str = "Better:\n"
    code: dict[str, str] = field(
        default_factory=lambda: {
            f"stages/{name}.py": f"LIMIT = 1\nprint('{name}')\n"
            for name in ("prepare", "sft", "label", "train", "judge", "evaluate", "shared")
        }
    )
    params: dict[str, Any] = field(
        default_factory=lambda: {
            "seed": 0,
            "data": {"num_test": 8},
            "sft": {"learning_rate": 0.1},
            "label": {"reward": "vader"},
            "runs": {"dpo": {"beta": 0.1}, "ipo": {"tau": 0.1}},
            "evaluation": {"judges": ["vader"]},
        }
    )
    packages: str = "torch==2.13.0\nnumpy==2.4.0\n"
    machine: str = "one"
    sensitive: str = "sft"  # the stage whose bits depend on machine and packages

    def write(self, folder: Path) -> Path:
        """Run it: files and dvc.lock."""
        files = {"data.jsonl": "\n".join(self.data), "revision.txt": self.template, **self.code}
        files |= {"requirements.lock": self.packages, "params.yaml": yaml.safe_dump(self.params)}
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        (folder / "base.bin").write_bytes(self.base)
        self.made: dict[str, str] = {}
        self.folder = folder
        self.entries: dict[str, Any] = {}
        stage = self.stage
        stage("prepare", ["data.jsonl", "revision.txt"], ["data", "seed"], ["prompts"])
        stage("sft", ["base.bin", "prompts"], ["sft", "seed"], ["models/sft"])
        stage("label", ["prompts", "models/sft"], ["label"], ["pairs"])
        for run in self.params["runs"]:
            stage(f"train@{run}", ["pairs", "models/sft"], [f"runs.{run}"], [f"models/{run}"])
            stage(f"judge@{run}", [f"models/{run}"], ["evaluation"], [f"judgements/{run}"])
            stage(f"evaluate@{run}", [f"judgements/{run}"], ["seed"], [f"metrics/{run}.json"])
        stage("compare", ["judgements"], ["runs"], ["comparison"])
        (folder / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": self.entries}))
        return folder

    def stage(self, name: str, inputs: list[str], params: list[str], outputs: list[str]) -> None:
        program = name.partition("@")[0]
        own = f"stages/{program}.py"
        inputs = [*inputs, "stages/shared.py", *([own] if own in self.code else [])]
        digests = {path: self.digest(path) for path in inputs}
        values = {key: self.value(key) for key in params}
        known = [digests, values]
        if program == self.sensitive:
            known += [self.machine, self.packages]
        made = hashlib.md5(json.dumps(known, sort_keys=True).encode()).hexdigest()
        self.made |= dict.fromkeys(outputs, made)
        self.entries[name] = {
            "cmd": f"python -m stages.{name.replace('@', ' ')}",
            "deps": [{"path": path, "md5": digest} for path, digest in digests.items()],
            "params": {"params.yaml": values},
            "outs": [{"path": path, "md5": made} for path in outputs],
        }

    def digest(self, path: str) -> str:
        if (self.folder / path).is_file():
            return hashlib.md5((self.folder / path).read_bytes()).hexdigest()
        under = {name: made for name, made in self.made.items() if name.startswith(path)}
        return self.made.get(path) or hashlib.md5(json.dumps(under).encode()).hexdigest() + ".dir"

    def value(self, key: str) -> Any:
        found: Any = self.params
        for part in key.split("."):
            found = found[part]
        return found


def param(name: str, value: Any) -> Callable[[Pipeline], None]:
    def plant(pipeline: Pipeline) -> None:
        *parents, last = name.split(".")
        node = pipeline.params
        for parent in parents:
            node = node[parent]
        node[last] = value

    return plant


def code(name: str) -> Callable[[Pipeline], None]:
    def plant(pipeline: Pipeline) -> None:
        path = f"stages/{name}.py"
        pipeline.code[path] = pipeline.code[path].replace("LIMIT = 1", "LIMIT = 2")

    return plant


def value(name: str, planted: Any) -> Callable[[Pipeline], None]:
    return lambda pipeline: setattr(pipeline, name, planted)


def machine(stage: str) -> Callable[[Pipeline], None]:
    def plant(pipeline: Pipeline) -> None:
        pipeline.machine, pipeline.sensitive = "another", stage

    return plant


def packages(text: str) -> Callable[[Pipeline], None]:
    return value("packages", text)


ROWS = Pipeline().data
# What was planted -> how, and what is said to be the first cause and the stage that it reaches.
PLANTED: dict[str, tuple[Callable[[Pipeline], None], str, str, str]] = {
    "edited row": (value("data", [*ROWS[:-1], "{}"]), "data", "data.jsonl", "prepare"),
    "row more": (value("data", [*ROWS, "{}"]), "data", "data.jsonl", "prepare"),
    "row less": (value("data", ROWS[1:]), "data", "data.jsonl", "prepare"),
    "rows in another order": (value("data", ROWS[::-1]), "data", "data.jsonl", "prepare"),
    "base model": (value("base", b"\0other"), "data", "base.bin", "sft"),
    "template": (value("template", "Worse:\n"), "data", "revision.txt", "prepare"),
    "code of prepare": (code("prepare"), "code", "stages/prepare.py", "prepare"),
    "code of sft": (code("sft"), "code", "stages/sft.py", "sft"),
    "code of label": (code("label"), "code", "stages/label.py", "label"),
    "code of train": (code("train"), "code", "stages/train.py", "train@dpo"),
    "code of judge": (code("judge"), "code", "stages/judge.py", "judge@dpo"),
    "code of evaluate": (code("evaluate"), "code", "stages/evaluate.py", "evaluate@dpo"),
    "code of all": (code("shared"), "code", "stages/shared.py", "prepare"),
    "seed": (param("seed", 1), "parameter", "seed", "prepare"),
    "size of the test": (param("data.num_test", 9), "parameter", "data.num_test", "prepare"),
    "learning rate": (param("sft.learning_rate", 1), "parameter", "sft.learning_rate", "sft"),
    "reward": (param("label.reward", "length"), "parameter", "label.reward", "label"),
    "beta": (param("runs.dpo.beta", 0.5), "parameter", "runs.dpo.beta", "train@dpo"),
    "judges": (param("evaluation.judges", []), "parameter", "evaluation.judges", "judge@dpo"),
    "run more": (param("runs.nca", {"beta": 1}), "stage", "train@nca", "train@nca"),
    "torch": (
        packages("torch==2.14.0\nnumpy==2.4.0\n"),
        *("environment", "torch", "sft"),
    ),
    "package more": (
        packages("torch==2.13.0\nnumpy==2.4.0\nnumba==1.0\n"),
        *("environment", "numba", "sft"),
    ),
    "machine": (machine("sft"), "machine", "hardware, or what no lock lists", "sft"),
}


@pytest.fixture
def first(tmp_path: Path) -> Path:
    return Pipeline().write(tmp_path / "first")


@pytest.mark.parametrize("name", PLANTED)
def test_the_planted_cause_is_the_first(name: str, first: Path, tmp_path: Path) -> None:
    plant, kind, what, stage = PLANTED[name]
    second = Pipeline()
    plant(second)
    second.write(tmp_path / "second")
    found = differences(side(str(first)), side(str(tmp_path / "second")))
    assert found.first is not None
    assert (found.first.kind, found.first.what, found.first.changed[0]) == (kind, what, stage)
    effective = [cause for cause in found.causes if cause.changed and cause.kind != "stage"]
    assert len(effective) <= 2, "consequences are no causes"


def test_nothing_differs_between_equals(first: Path, tmp_path: Path) -> None:
    again = Pipeline().write(tmp_path / "again")
    found = differences(side(str(first)), side(str(again / "dvc.lock")))
    assert (found.causes, found.changed, found.first) == ([], [], None)
    digests = [read_lineage((each / "dvc.lock").read_text()).digests for each in (first, again)]
    assert digests[0] == digests[1]


def test_the_changed_row_is_shown(first: Path, tmp_path: Path) -> None:
    second = Pipeline()
    second.data[3] = '{"prompt": "another"}'
    second.write(tmp_path / "second")
    said = as_text(differences(side(str(first)), side(str(tmp_path / "second"))))
    assert said.startswith("first cause: data data.jsonl: ")
    assert '    -{"prompt": "p3"}\n    +{"prompt": "another"}\n' in said


def test_one_stage_is_compared_alone(first: Path, tmp_path: Path) -> None:
    second = Pipeline()
    param("runs.dpo.beta", 0.5)(second)
    second.write(tmp_path / "second")
    sides = side(str(first)), side(str(tmp_path / "second"))
    assert differences(*sides, "evaluate@ipo").first is None
    assert differences(*sides, "evaluate@dpo").changed == [
        *("train@dpo", "judge@dpo", "evaluate@dpo")
    ]
    with pytest.raises(ValueError, match="--stage: no such stage, got 'nothing'"):
        differences(*sides, "nothing")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two commits: the second has another beta."""
    folder = Pipeline().write(tmp_path / "repository")
    git(folder, "init", "--quiet")
    commit(folder, "first")
    second = Pipeline()
    param("runs.dpo.beta", 0.5)(second)
    second.write(folder)
    commit(folder, "second")
    monkeypatch.chdir(folder)
    return folder


def test_revisions_are_compared(repository: Path) -> None:
    found = differences(side("HEAD~1"), side("HEAD"))
    assert str(found.first) == "parameter runs.dpo.beta: 0.1 -> 0.5 (by train@dpo)"
    with pytest.raises(ValueError, match="no such commit, got 'nowhere'"):
        side("nowhere")


def test_a_commit_a_source_and_an_artefact_touch_what_came_of_them(repository: Path) -> None:
    of_commit = impact("HEAD")
    assert of_commit.stages == ["train@dpo", "judge@dpo", "evaluate@dpo", "compare"]
    assert set(impact("stages/judge.py").outputs) == {
        *("judgements/dpo", "judgements/ipo", "metrics/dpo.json", "metrics/ipo.json"),
        "comparison",
    }
    assert "models/ipo" in impact("data.jsonl").outputs
    assert impact("models/ipo").stages[0] == "train@ipo"


def test_a_lock_with_a_cycle_is_refused(repository: Path) -> None:
    lock = yaml.safe_load(Path("dvc.lock").read_text())
    lock["stages"]["prepare"]["deps"].append({"path": "comparison", "md5": "0" * 32})
    with pytest.raises(ValueError, match="its stages need each other"):
        read_lineage(yaml.safe_dump(lock))


def test_git_is_asked_for_a_commit_and_not_for_an_option(repository: Path) -> None:
    with pytest.raises(ValueError, match="no such commit, got '--all'"):
        side("--all")

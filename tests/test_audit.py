"""An audit of a finished pipeline: sound it holds, and every single change is named."""

import hashlib
import io
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, redirect_stdout
from pathlib import Path
from typing import Any

import finished
import pyarrow.parquet as pq
import pytest
from conftest import PROJECT
from finished import commit, finished_pipeline, git

from flows import audit as auditing
from flows.audit import Audit, audit
from flows.lineage import Snapshot, snapshot
from stages import claims, records, traces
from stages.params import load_params

DPO = "artefacts/models/dpo"
SQUARED = "artefacts/models/squared"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("audited")
    yield finished_pipeline(folder / "project")
    shutil.rmtree(folder)


class InThisProcess:
    """The same programs, without an interpreter for each; unchanged files, unchanged answers."""

    known: dict[tuple[Any, ...], tuple[Any, str]] = {}  # noqa: RUF012

    def __init__(self, _wanted: bool) -> None:
        read = [Path("params.yaml"), Path("dvc.lock"), Path("mlflow.db")]
        read += sorted(file for root in ("artefacts", "report") for file in Path(root).rglob("*"))
        stats = [(file.as_posix(), file.stat()) for file in read if file.is_file()]
        self.state = tuple((name, stat.st_mtime_ns, stat.st_size) for name, stat in stats)

    def answer(self, module: str) -> tuple[Any, str]:
        key = (module, self.state)
        if key not in self.known:
            self.known[key] = answered(module)
        return self.known[key]


def answered(module: str) -> tuple[Any, str]:
    said = io.StringIO()
    try:
        with redirect_stdout(said):
            {"claims": claims, "records": records}[module].main()
    except ValueError as error:
        return None, str(error)
    return json.loads(said.getvalue()), ""


@pytest.fixture
def project(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The finished pipeline as the working directory, audited by this process."""
    monkeypatch.chdir(made)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(sys, "argv", ["records"])
    monkeypatch.setattr(auditing, "Speakers", InThisProcess)
    monkeypatch.setattr(auditing, "snapshot", remembered)
    return made


SNAPSHOTS: dict[str, Snapshot] = {}


def remembered(repo: Any, revision: str | None) -> Snapshot:
    """A commit never changes, so that it is read once."""
    if revision is None:
        return snapshot(repo, None)
    if revision not in SNAPSHOTS:
        SNAPSHOTS[revision] = snapshot(repo, revision)
    return SNAPSHOTS[revision]


class Undo:
    """Keeps files as they are, times included, to put them back."""

    def __init__(self, folder: Path) -> None:
        self._kept = folder
        self._files: dict[Path, Path | None] = {}

    def keep(self, path: Path) -> Path:
        """A file that is going to be changed, or made."""
        if path not in self._files:
            copy = self._kept / str(len(self._files))
            self._files[path] = Path(shutil.copy2(path, copy)) if path.exists() else None
        if path.exists():
            path.chmod(0o644)
        return path

    def undo(self) -> None:
        for path, copy in self._files.items():
            if copy is None:
                path.unlink(missing_ok=True)
            elif path.suffix == ".db":
                # Through SQLite, so that MLflow's open connections see it.
                with (
                    closing(sqlite3.connect(copy)) as before,
                    closing(sqlite3.connect(path)) as now,
                ):
                    before.backup(now)
                shutil.copystat(copy, path)
            else:
                path.unlink(missing_ok=True)
                shutil.copy2(copy, path)


@pytest.fixture
def undo(project: Path, tmp_path: Path) -> Iterator[Undo]:
    head = git(project, "rev-parse", "HEAD").strip()
    kept = Undo(tmp_path)
    yield kept
    kept.undo()
    if git(project, "rev-parse", "HEAD").strip() != head:
        git(project, "reset", "--quiet", "--mixed", head)


Tamper = Callable[[Undo], None]


def flip(path: str, at: int = -9) -> Tamper:
    """Change one bit."""

    def tamper(undo: Undo) -> None:
        file = undo.keep(Path(path))
        content = bytearray(file.read_bytes())
        content[at] ^= 1
        file.write_bytes(content)

    return tamper


def replace(path: str, old: str, new: str, *, committed: bool = False) -> Tamper:
    """Change a text in one place."""

    def tamper(undo: Undo) -> None:
        file = undo.keep(Path(path))
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new, 1))
        if committed:
            commit(Path.cwd(), "tampered")

    return tamper


def copy(source: str, target: str) -> Tamper:
    """Put one artefact in another's place."""

    def tamper(undo: Undo) -> None:
        shutil.copyfile(source, undo.keep(Path(target)))

    return tamper


def add(path: str) -> Tamper:
    def tamper(undo: Undo) -> None:
        undo.keep(Path(path)).write_text("planted\n")

    return tamper


def remove(path: str) -> Tamper:
    def tamper(undo: Undo) -> None:
        undo.keep(Path(path)).unlink()

    return tamper


def cell(path: str, column: str, row: int, change: Callable[[Any], Any]) -> Tamper:
    """Change one value of a table."""

    def tamper(undo: Undo) -> None:
        file = undo.keep(Path(path))
        table = pq.read_table(file)
        columns = table.to_pydict()
        columns[column][row] = change(columns[column][row])
        pq.write_table(table.from_pydict(columns, table.schema), file, write_page_checksum=True)

    return tamper


def lock(name: str, change: Callable[[dict[str, Any]], None]) -> Tamper:
    """Change one stage's entry of dvc.lock."""

    def tamper(undo: Undo) -> None:
        rewrite_lock(undo, lambda stages: change(stages[name]))

    return tamper


def rewrite_lock(undo: Undo, change: Callable[[dict[str, Any]], object]) -> None:
    from dvc.utils.serialize import dump_yaml, load_yaml

    file = undo.keep(Path("dvc.lock"))
    tree = load_yaml(file)
    change(tree["stages"])
    dump_yaml(file, tree)


def entry(stage: dict[str, Any], kind: str, path: str) -> dict[str, Any]:
    return next(each for each in stage[kind] if each["path"] == path)


def drop_entry(undo: Undo) -> None:
    rewrite_lock(undo, lambda stages: stages.pop("evaluate@dpo"))


def cached(path: str, tamper: Callable[[str], Tamper]) -> Tamper:
    """Tamper with the object that DVC's cache holds of an output; of a folder with its list."""

    def tampered(undo: Undo) -> None:
        stages = auditing.resolve("").lineage.stages.values()
        (digest,) = {d for stage in stages for made, d in stage.outputs.items() if made == path}
        tamper(object_of(digest).as_posix())(undo)

    return tampered


def object_of(digest: str) -> Path:
    return Path(".dvc/cache/files/md5") / digest[:2] / digest[2:]


def forged(path: str, tamper: Tamper) -> Tamper:
    """Tamper, and write dvc.lock and the cache so that they agree with what was changed."""

    def tampered(undo: Undo) -> None:
        before = hashlib.md5(Path(path).read_bytes()).hexdigest()
        tamper(undo)
        after = hashlib.md5(Path(path).read_bytes()).hexdigest()
        lock_file = undo.keep(Path("dvc.lock"))
        lock_file.write_text(lock_file.read_text().replace(before, after))
        held = object_of(after)
        held.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, undo.keep(held))

    return tampered


OF_DPO = "run_uuid = (select run_uuid from runs where name = 'dpo')"


def in_mlflow(statement: str) -> Tamper:
    """Change one row of MLflow's records."""

    def tamper(undo: Undo) -> None:
        with closing(sqlite3.connect(undo.keep(Path("mlflow.db")))) as database, database:
            assert database.execute(statement).rowcount == 1

    return tamper


def tag(key: str, value: str) -> Tamper:
    return in_mlflow(f"update tags set value = '{value}' where key = '{key}' and {OF_DPO}")


def tag_of_first_commit(undo: Undo) -> None:
    """A commit that is there, and held other code."""
    replace("stages/train.py", "NUM_AUDITED = 8", "NUM_AUDITED = 9", committed=True)(undo)
    other = git(Path.cwd(), "rev-parse", "HEAD").strip()
    git(Path.cwd(), "reset", "--quiet", "--hard", "HEAD~1")
    tag("git.commit", other)(undo)


def amend(undo: Undo) -> None:
    """Write history anew: the commit of the results now says other parameters."""
    replace("params.yaml", "beta: 0.1", "beta: 0.5")(undo)
    git(Path.cwd(), "commit", "--quiet", "--amend", "--all", "--no-edit")


def swap_pair(undo: Undo) -> None:
    file = undo.keep(Path("artefacts/pairs.parquet"))
    table = pq.read_table(file)
    columns = table.to_pydict()
    columns["chosen"][0], columns["rejected"][0] = columns["rejected"][0], columns["chosen"][0]
    pq.write_table(table.from_pydict(columns, table.schema), file, write_page_checksum=True)


def leak_prompt(undo: Undo) -> None:
    """A test prompt becomes a training prompt."""
    file = undo.keep(Path("artefacts/prompts.parquet"))
    table = pq.read_table(file)
    columns = table.to_pydict()
    columns["text"][columns["split"].index("test")] = columns["text"][0].upper()
    pq.write_table(table.from_pydict(columns, table.schema), file, write_page_checksum=True)


METRICS = "artefacts/metrics/dpo.json"
RATE = "win_rate/sft/vader/value"
SFT = "artefacts/models/sft"
REFERENCE = "artefacts/reference.parquet"
CANDIDATES = "artefacts/candidates.parquet"
LOGRATIOS = "artefacts/logratios/dpo.parquet"
JUDGEMENTS = "artefacts/judgements/dpo.parquet"
SAMPLES = "artefacts/samples/dpo.parquet"
REPORT = "artefacts/report"
PROMPTS = "artefacts/prompts.parquet"
BETA = ("beta: 0.1", "beta: 0.5")
AUDITED = ("NUM_AUDITED = 8", "NUM_AUDITED = 9")
other_digest = "0" * 32


def overturned(verdict: str) -> str:
    return "tie" if verdict != "tie" else "policy"


def shouted(text: str) -> str:
    return f"{text}!"


# What is changed -> the change, and of the finding that names it: severity, check, artefact.
TAMPERS: dict[str, tuple[Tamper, str, str, str]] = {
    "weights": (
        flip(f"{SQUARED}/model.safetensors"),
        "failed",
        "bytes",
        f"{SQUARED}/model.safetensors",
    ),
    "adapters": (
        flip(f"{DPO}/adapter_model.safetensors"),
        "failed",
        "bytes",
        f"{DPO}/adapter_model.safetensors",
    ),
    "reference weights": (
        flip(f"{SFT}/model.safetensors"),
        "failed",
        "bytes",
        f"{SFT}/model.safetensors",
    ),
    "swapped reference": (
        copy(f"{SQUARED}/model.safetensors", f"{SFT}/model.safetensors"),
        "failed",
        "adapted weights",
        f"{DPO}/adapted.json",
    ),
    "config": (
        replace(f"{SQUARED}/config.json", "llama", "Llama"),
        "failed",
        "bytes",
        f"{SQUARED}/config.json",
    ),
    "tokenizer": (
        flip(f"{SQUARED}/tokenizer.json", 50),
        "failed",
        "bytes",
        f"{SQUARED}/tokenizer.json",
    ),
    "adapted": (
        replace(f"{DPO}/adapted.json", '"weights": "', '"weights": "0'),
        "failed",
        "adapted weights",
        f"{DPO}/adapted.json",
    ),
    "a file more in a model": (
        add(f"{SQUARED}/model.bin"),
        "failed",
        "bytes",
        f"{SQUARED}/model.bin",
    ),
    "a file less in a model": (
        remove(f"{SQUARED}/config.json"),
        "failed",
        "bytes",
        f"{SQUARED}/config.json",
    ),
    "swapped generations": (
        copy("artefacts/curves/dpo.csv", "artefacts/curves/squared.csv"),
        "failed",
        "bytes",
        "artefacts/curves/squared.csv",
    ),
    "verdict": (cell(JUDGEMENTS, "verdict", 0, overturned), "failed", "bytes", JUDGEMENTS),
    "judge's words": (
        cell(JUDGEMENTS, "policy_first_reply", 0, shouted),
        "failed",
        "bytes",
        JUDGEMENTS,
    ),
    "metric": (replace(METRICS, '"value": 0.', '"value": 1.'), "failed", "bytes", METRICS),
    "comparison": (
        replace("artefacts/comparison.json", "0", "1"),
        "failed",
        "bytes",
        "artefacts/comparison.json",
    ),
    "table of the report": (
        replace(f"{REPORT}/results.md", "0.", "1."),
        "failed",
        "bytes",
        f"{REPORT}/results.md",
    ),
    "page of the report": (
        replace(f"{REPORT}/index.html", "dpo", "DPO"),
        "failed",
        "bytes",
        f"{REPORT}/index.html",
    ),
    "figure": (
        replace(f"{REPORT}/figures/win_rates.svg", "svg", "SVG"),
        "failed",
        "bytes",
        f"{REPORT}/figures/win_rates.svg",
    ),
    "published page": (
        replace("report/index.html", "dpo", "DPO"),
        "failed",
        "page",
        "report/index.html",
    ),
    "stamp": (
        replace("report/index.html", "SHA-256 of dvc.lock <code>", "SHA-256 of dvc.lock <code>0"),
        "unknown",
        "stamp",
        "report/index.html",
    ),
    "label": (swap_pair, "failed", "bytes", "artefacts/pairs.parquet"),
    "split": (cell(PROMPTS, "split", -1, lambda _: "train"), "failed", "rows of train", PROMPTS),
    "reference log-probability": (
        cell(REFERENCE, "logps", 0, lambda it: [0.0, *it[1:]]),
        "failed",
        "bytes",
        REFERENCE,
    ),
    "candidate": (cell(CANDIDATES, "text", 0, shouted), "failed", "bytes", CANDIDATES),
    "sample": (cell(SAMPLES, "text", 0, shouted), "failed", "bytes", SAMPLES),
    "log-ratio": (cell(LOGRATIOS, "chosen", 0, lambda it: it + 1), "failed", "bytes", LOGRATIOS),
    "report card": (
        replace("artefacts/cards/vader.json", ":", " :"),
        "failed",
        "bytes",
        "artefacts/cards/vader.json",
    ),
    "template": (
        flip("artefacts/templates.json", 5),
        "failed",
        "bytes",
        "artefacts/templates.json",
    ),
    "lost artefact": (remove(SAMPLES), "unknown", "bytes", SAMPLES),
    "model of nobody": (
        add("artefacts/models/best.safetensors"),
        "unknown",
        "origin",
        "artefacts/models/best.safetensors",
    ),
    "verdicts of nobody": (
        add("artefacts/judgements/best.parquet"),
        "unknown",
        "origin",
        "artefacts/judgements/best.parquet",
    ),
    "lock: output": (
        lock("evaluate@dpo", lambda it: entry(it, "outs", METRICS).update(md5=other_digest)),
        "failed",
        "bytes",
        METRICS,
    ),
    "lock: input": (
        lock("evaluate@dpo", lambda it: entry(it, "deps", SAMPLES).update(md5=other_digest)),
        "failed",
        "chain",
        SAMPLES,
    ),
    "lock: stale reference": (
        lock("reference", lambda it: entry(it, "deps", SFT).update(md5=f"{other_digest}.dir")),
        "failed",
        "chain",
        SFT,
    ),
    "lock: folder": (
        lock(
            "compare",
            lambda it: entry(it, "deps", "artefacts/judgements").update(md5=f"{other_digest}.dir"),
        ),
        "failed",
        "chain",
        "artefacts/judgements",
    ),
    "lock: code": (
        lock("train@dpo", lambda it: entry(it, "deps", "stages/train.py").update(md5=other_digest)),
        "failed",
        "source",
        "stages/train.py",
    ),
    "lock: base model": (
        lock("sft", lambda it: entry(it, "deps", "data/base").update(md5=f"{other_digest}.dir")),
        "failed",
        "source",
        "data/base",
    ),
    "lock: parameter": (
        lock("train@dpo", lambda it: it["params"]["params.yaml"]["runs.dpo"].update(beta=0.5)),
        "failed",
        "parameter params.yaml:runs.dpo",
        "train@dpo",
    ),
    "lock: seed": (
        lock("sft", lambda it: it["params"]["params.yaml"]["compute"].update(seed=7)),
        "failed",
        "parameter params.yaml:compute",
        "sft",
    ),
    "lock: command": (
        lock("train@dpo", lambda it: it.update(cmd="python -m stages.train squared")),
        "failed",
        "command",
        "train@dpo",
    ),
    "lock: input left out": (
        lock("train@dpo", lambda it: it["deps"].pop(0)),
        "failed",
        "inputs",
        "train@dpo",
    ),
    "lock: output left out": (
        lock("train@dpo", lambda it: it["outs"].pop(0)),
        "failed",
        "outputs",
        "train@dpo",
    ),
    "lock: entry left out": (drop_entry, "failed", "run", "evaluate@dpo"),
    "lock: not committed": (
        replace("dvc.lock", "stages:\n", "stages:\n\n"),
        "unknown",
        "committed",
        "dvc.lock",
    ),
    "edited parameter": (replace("params.yaml", *BETA), "unknown", "committed", "params.yaml"),
    "edited code": (
        replace("stages/train.py", *AUDITED),
        "unknown",
        "committed",
        "stages/train.py",
    ),
    "edited pipeline": (
        replace("dvc.yaml", "desc: One page", "desc: A page"),
        "unknown",
        "committed",
        "dvc.yaml",
    ),
    "edited base model": (
        flip("data/base/model.safetensors"),
        "unknown",
        "committed",
        "data/base/model.safetensors",
    ),
    "committed parameter": (
        replace("params.yaml", *BETA, committed=True),
        "failed",
        "parameter params.yaml:runs.dpo",
        "train@dpo",
    ),
    "committed code": (
        replace("stages/train.py", *AUDITED, committed=True),
        "failed",
        "source",
        "stages/train.py",
    ),
    "committed data": (
        replace("data/reviews.json", "{", "{ ", committed=True),
        "failed",
        "source",
        "data/reviews.json",
    ),
    "committed command": (
        replace(
            "dvc.yaml", "cmd: python -m stages.sft", "cmd: python -m  stages.sft", committed=True
        ),
        "failed",
        "command",
        "sft",
    ),
    "rewritten commit": (amend, "failed", "parameter params.yaml:runs.dpo", "train@dpo"),
    "cached object": (cached(METRICS, flip), "failed", "cache", METRICS),
    "lost cached object": (cached(METRICS, remove), "unknown", "cache", METRICS),
    "cached list": (cached(SQUARED, lambda path: flip(path, 15)), "failed", "cache", SQUARED),
    "lost cached list": (cached(SQUARED, remove), "unknown", "cache", SQUARED),
    "forged metric": (
        forged(METRICS, replace(METRICS, '"policy": ', '"policy": 1')),
        "failed",
        "win_rate/sft/vader/policy",
        METRICS,
    ),
    "forged verdict": (
        forged(JUDGEMENTS, cell(JUDGEMENTS, "verdict", 0, overturned)),
        "failed",
        "win_rate/sft/vader/",
        METRICS,
    ),
    "forged overlap": (forged(PROMPTS, leak_prompt), "failed", "overlap", PROMPTS),
    "forged seed": (
        forged(SAMPLES, cell(SAMPLES, "seed", 0, lambda seed: seed + 1)),
        "failed",
        "seeds",
        SAMPLES,
    ),
    "MLflow: parameter": (
        in_mlflow(f"update params set value = '0.5' where key = 'beta' and {OF_DPO}"),
        "failed",
        "MLflow parameter beta",
        "train@dpo",
    ),
    "MLflow: metric": (
        in_mlflow(f"update latest_metrics set value = 0.99 where key = '{RATE}' and {OF_DPO}"),
        "failed",
        f"MLflow metric {RATE}",
        "train@dpo",
    ),
    "MLflow: data set": (
        in_mlflow("update datasets set digest = '0' || substr(digest, 2, 34) where name = 'pairs'"),
        "failed",
        "MLflow digest of pairs",
        "train@dpo",
    ),
    "MLflow: status": (
        in_mlflow("update runs set status = 'FAILED' where name = 'dpo'"),
        "failed",
        "MLflow status",
        "train@dpo",
    ),
    "MLflow: log-ratios": (
        tag("prefopt.logratios", "0" * 64),
        "failed",
        "MLflow tag prefopt.logratios",
        "train@dpo",
    ),
    "MLflow: stage": (
        tag("dvc.stage", "train@squared"),
        "failed",
        "MLflow tag dvc.stage",
        "train@dpo",
    ),
    "MLflow: unknown commit": (
        tag("git.commit", "0" * 40),
        "unknown",
        "MLflow tag git.commit",
        "train@dpo",
    ),
    "MLflow: another commit": (
        tag_of_first_commit,
        "failed",
        "MLflow tag git.commit: stages/train.py",
        "train@dpo",
    ),
}


@pytest.mark.parametrize("name", TAMPERS)
def test_a_single_change_is_named(name: str, undo: Undo) -> None:
    tamper, severity, check, artefact = TAMPERS[name]
    tamper(undo)
    found = audit()
    named = [
        each.severity
        for each in found.findings
        if each.check.startswith(check) and each.artefact.split(" (")[0] == artefact
    ]
    assert severity in named, "\n".join(map(str, found.findings))
    failing = any(each.severity == "failed" for each in found.findings)
    assert found.exit_code == (1 if failing else 2)


def findings(found: Audit) -> list[tuple[str, str]]:
    return [
        (each.severity, each.artefact) for each in found.findings if each.check != "environment"
    ]


def test_an_untouched_pipeline_holds_and_only_its_labelling_judge_is_noted(project: Path) -> None:
    found = audit()
    assert found.exit_code == 0
    assert findings(found) == [("note", "artefacts/pairs.parquet")]
    assert found.num_checks > 1000
    assert found.diff == ""


def test_a_clone_that_pulled_audits_to_the_same_digest(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = audit().digest
    dvc = ["-m", "dvc"]
    finished.run(project, *dvc, "remote", "add", "--local", "store", str(tmp_path / "store"))
    finished.run(project, *dvc, "push", "--quiet", "--remote", "store")
    git(tmp_path, "clone", "--quiet", str(project), "clone")
    clone = tmp_path / "clone"
    finished.run(clone, *dvc, "remote", "add", "--local", "store", str(tmp_path / "store"))
    finished.run(clone, *dvc, "pull", "--quiet", "--remote", "store")
    monkeypatch.chdir(clone)
    found = audit()
    assert found.exit_code == 0
    assert found.digest == digest


@pytest.mark.parametrize(
    ("target", "last", "num_stages"),
    [
        ("evaluate@dpo", "evaluate@dpo", 12),
        (METRICS, "evaluate@dpo", 12),
        (f"{DPO}/adapter_model.safetensors", "train@dpo", 8),
        ("dpo", "evaluate@dpo", 12),
        ("label", "label", 5),
        ("HEAD", "report", 20),
    ],
)
def test_a_target_is_walked_back_to_the_raw_data(
    project: Path, target: str, last: str, num_stages: int
) -> None:
    found = audit(target)
    assert found.exit_code == 0
    assert (found.stages[0], found.stages[-1], len(found.stages)) == ("check", last, num_stages)
    assert "data/reviews.json" in auditing.as_text(found)
    assert set(json.loads(auditing.as_json(found))["stages"]) == set(found.stages)


def test_what_is_no_target_is_refused(project: Path) -> None:
    with pytest.raises(ValueError, match="no such target, got 'nothing'"):
        audit("nothing")


def test_an_unchanged_file_is_read_again_only_if_asked(undo: Undo) -> None:
    audit()
    file = undo.keep(Path(SQUARED) / "model.safetensors")
    before = file.stat()
    with open(file, "r+b") as stream:  # The same inode, size and time.
        stream.seek(-9, os.SEEK_END)
        stream.write(b"\1")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert audit().exit_code == 0
    assert ("failed", file.as_posix()) in findings(audit(deep=True))


def test_a_replay_makes_the_same_bytes_and_leaves_nothing(project: Path) -> None:
    journals = sorted(Path(".prefopt").rglob("*"))
    found = audit(replays=["label", "evaluate@dpo"])
    assert findings(found) == [("note", "artefacts/pairs.parquet")]
    assert sorted(Path(".prefopt").rglob("*")) == journals
    assert git(project, "worktree", "list").count("\n") == 1


def test_a_replay_finds_what_was_forged_in_lock_and_cache(undo: Undo) -> None:
    forged("artefacts/pairs.parquet", swap_pair)(undo)
    assert ("failed", "artefacts/pairs.parquet") not in findings(audit())
    assert ("failed", "artefacts/pairs.parquet") in findings(audit(replays=["label"]))


def test_a_wrong_replay_is_refused(project: Path) -> None:
    with pytest.raises(ValueError, match="--replay: neither a stage of the target nor a number"):
        audit("label", replays=["report"])


def test_the_command_says_where_an_mlflow_run_came_from(project: Path) -> None:
    with closing(sqlite3.connect("mlflow.db")) as database:
        (run,) = database.execute("select run_uuid from runs where name = 'dpo'").fetchone()
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "audit", run],
        env=finished.environment() | {"PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "train@dpo: python -m stages.train dpo\n" in done.stdout
    assert "  param runs.dpo = " in done.stdout
    assert "\n8 stages, " in done.stdout


def test_the_impact_of_a_text_is_what_its_split_can_reach(project: Path) -> None:
    table = pq.read_table(PROMPTS).to_pydict()
    rows = list(zip(table["split"], table["text"], table["gold"], strict=True))
    of_split = {split: text + gold for split, text, gold in reversed(rows)}
    trained, tested = (impact_in_process(of_split[split]) for split in ("train", "test"))
    assert trained["stages"][0] == "sft"
    assert tested["stages"] == ["opponent", "complete@dpo", "complete@squared"]
    assert impact_in_process(trained["identity"]) == trained


def impact_in_process(wanted: str) -> dict[str, Any]:
    (found,) = traces.traces(wanted, load_params())
    return found

"""Walk back from a target to the raw data, and hold all that is recorded against what is there.

Three things must agree: a commit (code, parameters, dvc.yaml), the record (dvc.lock), and bytes
(working tree, DVC's cache, and what artefacts and MLflow say of each other). What disagrees fails;
what nothing vouches for cannot be told; the rest holds.
"""

import functools
import importlib.metadata
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from flows import git
from flows.lineage import Lineage, Snapshot, read_lineage, snapshot
from flows.objects import Objects, folder_digest
from flows.programs import complaint, start
from flows.replay import NotReplayed, Replayer, chosen, replaying

Severity = Literal["failed", "unknown", "note"]
EXIT_CODES: dict[Severity, int] = {"failed": 1, "unknown": 2, "note": 0}
ENVIRONMENT = "requirements.lock"
MLFLOW_NAME = re.compile(r"[0-9a-f]{32}|models:/.+")
SHORT = 12  # characters of a digest that a person reads


@dataclass(frozen=True)
class Finding:
    """Something that does not hold, or that cannot be told."""

    severity: Severity
    check: str
    artefact: str
    expected: str
    found: str
    remedy: str

    def __str__(self) -> str:
        return (
            f"{self.severity}: {self.artefact}: {self.check}: expected {self.expected}, "
            f"got {self.found}; {self.remedy}"
        )


@dataclass
class Checks:
    """Counts what was held against what, and keeps what did not hold."""

    findings: list[Finding] = field(default_factory=list)
    count: int = 0

    def expect(self, holds: bool, otherwise: Finding) -> bool:
        self.count += 1
        if not holds:
            self.findings.append(otherwise)
        return holds


@dataclass(frozen=True)
class Audit:
    """What was audited and what was found.

    Args:
        target: as it was asked for; empty is everything.
        commit: that all of it is held against.
        diff: SHA-256 of how the working tree differs from the commit; empty if it does not.
        environment: SHA-256 of the commit's list of installed packages.
        stages: those that the target came from, makers first.
        lineage: of them and all others.
        findings: what does not hold, the gravest first.
        num_checks: how many facts were held against others.
    """

    target: str
    commit: str
    diff: str
    environment: str
    stages: list[str]
    lineage: Lineage
    findings: list[Finding]
    num_checks: int

    @property
    def exit_code(self) -> int:
        """0 if all holds, 1 if something fails, else 2 if something cannot be told."""
        codes = {EXIT_CODES[finding.severity] for finding in self.findings}
        return 1 if 1 in codes else max(codes, default=0)

    @property
    def digest(self) -> str:
        """SHA-256 of the lineage of the audited stages: the same in every clone that made it."""
        facts = {name: self.lineage.digests[name] for name in self.stages}
        return sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Target:
    """What a person asked for: stages of the lineage at a revision; None is the working tree."""

    written: str
    revision: str | None
    stages: list[str]
    lineage: Lineage


def audit(
    written: str = "",
    *,
    deep: bool = False,
    replays: Sequence[str] = (),
    say: Callable[[str], None] = lambda line: None,
) -> Audit:
    """Audit a target of the pipeline in the working directory.

    Args:
        written: a stage, a run, a path, a git revision, an MLflow run, model version or alias; or
            nothing, which is all of the pipeline.
        deep: read every byte again, also of files that DVC knows to be unchanged.
        replays: which stages to run again: `all`, a number, names.
        say: hears of each stage before it is run again.

    Raises:
        ValueError: if there is no such target, or nothing to audit.
    """
    from dvc.exceptions import NotDvcRepoError
    from dvc.repo import Repo

    try:
        repo = Repo(".")
    except NotDvcRepoError as error:
        raise ValueError(f"audit: no pipeline here, got {error}; change to its folder") from error
    with repo:
        target = resolve(written)
        in_place = target.revision is None
        speakers = Speakers(in_place)
        checks = Checks()
        commit = git.commit_of(target.revision or "HEAD")
        committed = snapshot(repo, commit)
        changed = git.changed_files() if in_place else []
        present = snapshot(repo, None) if changed else committed
        lineage, stages = _current(checks, target, committed, present)
        environment = git.text_at(commit, ENVIRONMENT) or ""
        if in_place:
            _check_lock(checks, commit)
            _check_tree(checks, lineage, stages, changed)
        _check_environment(checks, environment)
        _check_plans(checks, lineage, stages, committed, present)
        _check_sources(checks, lineage, stages, committed, present)
        objects = Objects(repo, deep=deep)
        _check_chain(checks, lineage, stages, objects, in_place)
        _check_bytes(checks, lineage, stages, objects, in_place)
        if in_place:
            _check_strangers(checks, lineage)
            _check_claims(checks, lineage, stages, speakers)
            _check_records(checks, lineage, stages, commit, speakers)
        again = chosen(replays, stages)
        if again:
            with replaying(commit, lineage, committed, objects) as replayer:
                for name in again:
                    say(name)
                    _check_replay(checks, replayer, name)
    return Audit(
        written,
        commit,
        sha256(git.diff()).hexdigest() if changed else "",
        sha256(environment.encode()).hexdigest() if environment else "",
        stages,
        lineage,
        sorted(checks.findings, key=lambda finding: list(EXIT_CODES).index(finding.severity)),
        checks.count,
    )


def resolve(written: str) -> Target:
    """Find what a person means.

    Raises:
        ValueError: if it is none of what can be audited.
    """
    lock = Path(git.LOCK)
    if not lock.is_file():
        raise ValueError(f"{lock}: no such file, got nothing to audit; run `dvc repro`")
    lineage = read_lineage(lock.read_text())
    if not written:
        return Target(written, None, list(lineage.stages), lineage)
    if names := _named(written, lineage):
        return Target(written, None, lineage.upstream(names), lineage)
    if git.is_commit(written):
        locked = git.text_at(written, git.LOCK)
        if locked is None:
            raise ValueError(
                f"{written}: a commit without {git.LOCK}, got nothing to audit; name a later one"
            )
        at_commit = read_lineage(locked)
        return Target(written, written, list(at_commit.stages), at_commit)
    record = find_record(written)
    if record is None:
        runs = sorted({name.partition("@")[2] for name in lineage.stages if "@" in name})
        raise ValueError(
            f"audit: no such target, got '{written}'; name a stage, a path that one makes, a git "
            f"revision, an MLflow run or model version, or one of {', '.join(runs)}"
        )
    stage = record["tags"].get("dvc.stage", "none")
    names = [stage] if stage in lineage.stages else _named(record["tags"]["prefopt.run"], lineage)
    return Target(written, None, lineage.upstream(names), lineage)


def _named(written: str, lineage: Lineage) -> list[str]:
    """The stages that a name of a stage, of a run or of a path stands for."""
    if written in lineage.stages:
        return [written]
    path = Path(written)
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    return lineage.makers_of(path.as_posix()) or [
        name for name in lineage.stages if name.partition("@")[2] == written
    ]


def _current(
    checks: Checks, target: Target, committed: Snapshot, present: Snapshot
) -> tuple[Lineage, list[str]]:
    """The lineage without what dvc.yaml no longer has; DVC never drops an entry of the lock."""
    known = {**committed.plans, **present.plans}
    for name in target.lineage.stages:
        checks.expect(
            name in known,
            Finding(
                "note",
                "removed",
                name,
                expected="an entry of a stage of dvc.yaml",
                found="one of a stage that is no more",
                remedy=f"take it out of {git.LOCK} if it is not wanted",
            ),
        )
    if not target.written or target.revision:
        for name in present.plans:
            checks.expect(
                name in target.lineage.stages,
                Finding(
                    "failed",
                    "run",
                    name,
                    expected=f"an entry of {git.LOCK}",
                    found="none, so it never ran",
                    remedy=f"run `dvc repro {name}`",
                ),
            )
    kept = {name: stage for name, stage in target.lineage.stages.items() if name in known}
    return Lineage(kept), [name for name in target.stages if name in known]


def _check_lock(checks: Checks, commit: str) -> None:
    committed, present = git.text_at(commit, git.LOCK) or "", Path(git.LOCK).read_text()
    checks.expect(
        committed == present,
        Finding(
            "unknown",
            "committed",
            git.LOCK,
            expected=f"{_digest(committed)} as at commit {commit[:SHORT]}",
            found=_digest(present),
            remedy=f"commit {git.LOCK} after a run of yours; else `git checkout {git.LOCK}`",
        ),
    )


def _check_tree(
    checks: Checks, lineage: Lineage, stages: Sequence[str], changed: Sequence[str]
) -> None:
    """Tracked files that differ from the commit: those that a stage reads leave it open."""
    files = {key.partition(":")[0] for name in stages for key in lineage.stages[name].params}
    for path in changed:
        read = path in files or path == "dvc.yaml" or bool(lineage.readers_of(path))
        checks.expect(
            False,
            Finding(
                "unknown" if read else "note",
                "committed",
                path,
                expected="the file of the commit",
                found="an edited one"
                + (", which stages read" if read else ", which no stage reads"),
                remedy="commit it and run `dvc repro`, or `git checkout` it",
            ),
        )


def _check_environment(checks: Checks, environment: str) -> None:
    """What is installed here is what made the artefacts only if it is what the commit lists."""
    for line in environment.splitlines():
        package, pinned, version = line.partition("==")
        if not pinned:
            continue
        installed = _installed(package)
        checks.expect(
            installed == version,
            Finding(
                "note",
                "environment",
                package,
                expected=f"{version} as in {ENVIRONMENT}",
                found=installed,
                remedy="install the lock before a replay",
            ),
        )


@functools.cache
def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _check_plans(
    checks: Checks,
    lineage: Lineage,
    stages: Sequence[str],
    committed: Snapshot,
    present: Snapshot,
) -> None:
    """Commands, parameters, and the lists of what is read and made."""
    for name in stages:
        stage = lineage.stages[name]
        plans = [each.plans[name] for each in (committed, present) if name in each.plans]
        remedy = f"run `dvc repro {name}`, or restore {git.LOCK}"
        checks.expect(
            stage.command in [plan.command for plan in plans],
            Finding(
                "failed",
                "command",
                name,
                expected=f"'{plans[0].command}' as in dvc.yaml",
                found=f"'{stage.command}' in {git.LOCK}",
                remedy=remedy,
            ),
        )
        for key in sorted({*stage.params, *plans[0].params}):
            wanted = [_written(plan.params, key) for plan in plans]
            checks.expect(
                _written(stage.params, key) in wanted,
                Finding(
                    "failed",
                    f"parameter {key}",
                    name,
                    expected=wanted[0],
                    found=f"{_written(stage.params, key)} in {git.LOCK}",
                    remedy=remedy,
                ),
            )
        for what in ("inputs", "outputs"):
            recorded = set[str](getattr(stage, what))
            wanted = [set[str](getattr(plan, what)) for plan in plans]
            checks.expect(
                recorded in wanted,
                Finding(
                    "failed",
                    what,
                    name,
                    expected=f"those of dvc.yaml, so {_listed(wanted[0] - recorded)} more",
                    found=f"{_listed(recorded - wanted[0])} instead",
                    remedy=remedy,
                ),
            )


def _check_sources(
    checks: Checks,
    lineage: Lineage,
    stages: Sequence[str],
    committed: Snapshot,
    present: Snapshot,
) -> None:
    """Code and raw data: what a stage read is what the commit holds."""
    read: dict[tuple[str, str], list[str]] = {}
    for name in stages:
        for path, digest in lineage.sources_of(name).items():
            read.setdefault((path, digest), []).append(name)
    for (path, digest), readers in read.items():
        known = [each.sources[path] for each in (committed, present) if path in each.sources]
        if not checks.expect(
            bool(known),
            Finding(
                "unknown",
                "origin",
                path,
                expected="a file that git or a .dvc file tracks",
                found=f"one of unknown origin, read by {_listed(readers)}",
                remedy=f"`git add {path}`, or `dvc add {path}`, and commit",
            ),
        ):
            continue
        checks.expect(
            digest in known,
            Finding(
                "failed",
                "source",
                path,
                expected=f"{known[0][:SHORT]} as at the commit",
                found=f"{digest[:SHORT]}, read by {_listed(readers)}",
                remedy=f"run `dvc repro {readers[0]}`, or restore {path} and {git.LOCK}",
            ),
        )


def _check_chain(
    checks: Checks, lineage: Lineage, stages: Sequence[str], objects: Objects, in_place: bool
) -> None:
    """What a stage read is what its makers wrote."""
    for name in stages:
        for path, digest in lineage.stages[name].inputs.items():
            makers = lineage.makers_of(path)
            if not makers:
                continue
            files = _made_under(path, makers, lineage, objects)
            remedy = f"run `dvc repro {name}`, or restore {git.LOCK}"
            if files is None:
                checks.expect(
                    False,
                    Finding(
                        "unknown",
                        "chain",
                        path,
                        expected=f"what {_listed(makers)} wrote",
                        found="a folder whose list the cache lacks",
                        remedy=f"run `dvc fetch {path}`",
                    ),
                )
                continue
            made = _digest_of(files, digest)
            strangers = _strangers(path, files, objects) if made != digest and in_place else {}
            if strangers and _digest_of({**files, **strangers}, digest) == digest:
                for stranger in strangers:
                    checks.expect(
                        False,
                        Finding(
                            "unknown",
                            "origin",
                            f"{path}/{stranger}",
                            expected="a file that a stage makes",
                            found=f"one of unknown origin, read by {name}",
                            remedy=f"remove it and run `dvc repro {name}`",
                        ),
                    )
                continue
            checks.expect(
                made == digest,
                Finding(
                    "failed",
                    "chain",
                    path,
                    expected=f"{made[:SHORT]} as {_listed(makers)} wrote",
                    found=f"{digest[:SHORT]}, read by {name}: stale, or another's",
                    remedy=remedy,
                ),
            )


def _made_under(
    path: str, makers: Sequence[str], lineage: Lineage, objects: Objects
) -> dict[str, str] | None:
    """Files under a path by their makers' records; None if the cache lacks a list."""
    found: dict[str, str] = {}
    for maker in makers:
        for made, digest in lineage.stages[maker].outputs.items():
            if made != path and not _inside(made, path) and not _inside(path, made):
                continue
            files = {"": digest} if made == path else objects.listed(digest)
            if files is None:
                return None
            for name, each in files.items():
                whole = f"{made}/{name}".rstrip("/")
                if whole == path or _inside(whole, path):
                    found[whole.removeprefix(path).removeprefix("/")] = each
    return found


def _digest_of(files: Mapping[str, str], like: str) -> str:
    if "" in files:
        return files[""]
    return folder_digest(files) if like.endswith(".dir") else "none"


def _strangers(path: str, files: Mapping[str, str], objects: Objects) -> dict[str, str]:
    """Files under a folder of the working tree that its makers did not write."""
    return {name: digest for name, digest in objects.at(path)[1].items() if name not in files}


def _check_bytes(
    checks: Checks, lineage: Lineage, stages: Sequence[str], objects: Objects, in_place: bool
) -> None:
    """Artefacts in the working tree and in the cache are those of the record, to the byte."""
    for name in stages:
        for path, digest in lineage.stages[name].outputs.items():
            wanted = objects.listed(digest)
            _check_cache(checks, path, digest, wanted, objects)
            if not in_place:
                continue
            got, files = objects.at(path)
            if got is None:
                checks.expect(
                    False,
                    Finding(
                        "unknown",
                        "bytes",
                        path,
                        expected=digest[:SHORT],
                        found="nothing at its place",
                        remedy=f"run `dvc checkout {path}`, or `dvc pull {path}`",
                    ),
                )
                continue
            if checks.expect(
                got == digest or wanted is not None,
                Finding(
                    "failed",
                    "bytes",
                    path,
                    expected=f"{digest[:SHORT]} as in {git.LOCK}",
                    found=got[:SHORT],
                    remedy=f"run `dvc checkout --force {path}`, or `dvc repro {name}`",
                ),
            ):
                _compare_files(checks, path, wanted or files, files, name)


def _compare_files(
    checks: Checks, path: str, wanted: Mapping[str, str], found: Mapping[str, str], maker: str
) -> None:
    for each in sorted({*wanted, *found}):
        checks.expect(
            wanted.get(each) == found.get(each),
            Finding(
                "failed",
                "bytes",
                f"{path}/{each}".rstrip("/"),
                expected=wanted.get(each, "no such file")[:SHORT],
                found=found.get(each, "nothing")[:SHORT],
                remedy=f"run `dvc checkout --force {path}`, or `dvc repro {maker}`",
            ),
        )


def _check_cache(
    checks: Checks, path: str, digest: str, files: Mapping[str, str] | None, objects: Objects
) -> None:
    """Every object by which an output can be restored is in the cache, and is sound."""
    entries = {"": digest, **(files or {})}
    for name, each in entries.items():
        held = objects.in_cache(each)
        artefact = f"{path}/{name}".rstrip("/")
        if checks.expect(
            held is not None,
            Finding(
                "unknown",
                "cache",
                artefact,
                expected=f"{each[:SHORT]} in DVC's cache",
                found="no such object",
                remedy=f"run `dvc fetch {path}`, or `dvc commit {path}` if the file is sound",
            ),
        ):
            checks.expect(
                held == each,
                Finding(
                    "failed",
                    "cache",
                    artefact,
                    expected=f"{each[:SHORT]} in {objects.path_of(each)}",
                    found=f"bytes of {str(held)[:SHORT]}",
                    remedy="remove that object, then `dvc fetch` or `dvc commit`",
                ),
            )


def _check_strangers(checks: Checks, lineage: Lineage) -> None:
    """Every file among the artefacts has a stage that made it."""
    made = [path for stage in lineage.stages.values() for path in stage.outputs]
    roots = sorted({path.split("/")[0] for path in made if "/" in path})
    for file in sorted(file for root in roots for file in Path(root).rglob("*") if file.is_file()):
        path = file.as_posix()
        checks.expect(
            bool(lineage.makers_of(path)) or file.name == ".gitignore",
            Finding(
                "unknown",
                "origin",
                path,
                expected="a file that a stage makes",
                found="one of unknown origin",
                remedy="remove it, or make it by a stage",
            ),
        )


def _check_replay(checks: Checks, replayer: Replayer, name: str) -> None:
    """A stage that is run again makes the same bytes."""
    try:
        outputs = replayer.replay(name)
    except NotReplayed as error:
        checks.expect(
            False,
            Finding(
                "unknown",
                "replay",
                name,
                expected="a stage that runs again",
                found=str(error),
                remedy="run `dvc fetch`, or mend what it says",
            ),
        )
        return
    for path, (recorded, found) in outputs.items():
        for file in sorted({*recorded, *found}):
            checks.expect(
                recorded.get(file) == found.get(file),
                Finding(
                    "failed",
                    f"replay of {name}",
                    f"{path}/{file}".rstrip("/"),
                    expected=recorded.get(file, "no such file")[:SHORT],
                    found=found.get(file, "nothing")[:SHORT],
                    remedy="compare the machine and the environment with those that made it",
                ),
            )


class Speakers:
    """Programs that read what flows do not: the artefacts' contents, and MLflow's records.

    They run beside the audit from its start.
    """

    def __init__(self, wanted: bool) -> None:
        self._started = {module: start(module) for module in ("claims", "records") if wanted}

    def answer(self, module: str) -> tuple[Any, str]:
        """What a program of stages says, and what it complained of if it failed."""
        process = self._started[module]
        said, complained = process.communicate()
        if process.returncode:
            return None, complaint(complained)
        return json.loads(said), ""


def find_record(written: str) -> dict[str, Any] | None:
    """The record of an MLflow run, or of the run behind a model version or alias."""
    if not MLFLOW_NAME.fullmatch(written):
        return None
    process = start("records", "--find", written)
    said, _ = process.communicate()
    return json.loads(said) if process.returncode == 0 else None


def _check_claims(
    checks: Checks, lineage: Lineage, stages: Sequence[str], speakers: Speakers
) -> None:
    """What artefacts say of each other: numbers of verdicts, models of references, splits."""
    claims, complaint = speakers.answer("claims")
    if not checks.expect(
        claims is not None,
        Finding(
            "unknown",
            "content",
            "artefacts",
            expected="artefacts that can be read",
            found=complaint,
            remedy="mend what is named, then audit again",
        ),
    ):
        return
    checks.count += claims["num_checks"]
    for claim in claims["findings"]:
        makers = lineage.makers_of(claim["artefact"])
        if not makers or set(makers) & set(stages):
            checks.findings.append(Finding(**claim))


def _check_records(
    checks: Checks, lineage: Lineage, stages: Sequence[str], commit: str, speakers: Speakers
) -> None:
    """MLflow's records of trainings agree with dvc.lock, the artefacts and the commits."""
    records, complaint = speakers.answer("records")
    if not checks.expect(
        records is not None,
        Finding(
            "unknown",
            "MLflow",
            "records",
            expected="a server or file that answers",
            found=complaint,
            remedy="see MLFLOW_TRACKING_URI",
        ),
    ):
        return
    blobs = git.blobs_at(commit)
    for name in stages:
        if name.startswith("train@"):
            _check_training(checks, lineage, name, records["runs"], records["digests"], blobs)


def _check_training(
    checks: Checks,
    lineage: Lineage,
    name: str,
    records: Sequence[Mapping[str, Any]],
    digests: Mapping[str, str],
    blobs: Mapping[str, str],
) -> None:
    stage, run = lineage.stages[name], name.partition("@")[2]
    own = [record for record in records if record["tags"].get("prefopt.run") == run]
    logratios = next((path for path in stage.outputs if "/logratios/" in path), "")
    if not own or logratios not in digests:
        return  # Trained elsewhere and restored by DVC: MLflow here knows nothing of it.
    wanted = digests[logratios]
    matching = [record for record in own if record["tags"].get("prefopt.logratios") == wanted]
    remedy = f"record it anew: run `dvc repro --force {name}`; and ask who changed MLflow"
    if not checks.expect(
        bool(matching),
        Finding(
            "failed",
            "MLflow tag prefopt.logratios",
            name,
            expected=f"{wanted[:SHORT]} of a training's record",
            found=_listed(str(record["tags"].get("prefopt.logratios"))[:SHORT] for record in own),
            remedy=remedy,
        ),
    ):
        return
    record = matching[0]
    who = f"{name} (MLflow run {record['run_id'][:SHORT]})"
    for check, expected, found in _facts(stage.params, digests, run, record):
        checks.expect(
            expected == found,
            Finding(
                "failed",
                f"MLflow {check}",
                who,
                expected=expected,
                found=found,
                remedy=remedy,
            ),
        )
    _check_commit(checks, lineage, name, who, record["tags"], blobs)


def _facts(
    params: Mapping[str, Any], digests: Mapping[str, str], run: str, record: Mapping[str, Any]
) -> Iterator[tuple[str, str, str]]:
    """What MLflow holds of a training: what it is, what it should be, what is found."""
    yield "status", "FINISHED", record["status"]
    yield "tag dvc.stage", f"train@{run}", record["tags"].get("dvc.stage", "none")
    yield "tag mlflow.runName", run, record["tags"].get("mlflow.runName", "none")
    written: dict[str, Any] = {}
    for section in ("compute", "train", "watch", f"runs.{run}"):
        written |= params.get(f"params.yaml:{section}", {})
    if written.get("seed") is None:  # of the run, which then has the experiment's
        written["seed"] = params.get("params.yaml:compute", {}).get("seed")
    for key, value in record["params"].items():
        if key in written and not isinstance(written[key], dict):
            yield f"parameter {key}", str(written[key]), value
    for path, digest in digests.items():
        found = record["datasets"].get(Path(path).stem)
        if Path(path).parent == Path("artefacts") and found is not None:
            yield f"digest of {Path(path).stem}", digest[: len(found)], found
    metrics = Path(f"artefacts/metrics/{run}.json")
    if metrics.is_file():
        numbers = dict(_numbers(json.loads(metrics.read_text())))
        for key, value in record["metrics"].items():
            if key in numbers:
                yield f"metric {key}", str(numbers[key]), str(value)


def _numbers(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{key}", float(value)


def _check_commit(
    checks: Checks,
    lineage: Lineage,
    name: str,
    who: str,
    tags: Mapping[str, str],
    blobs: Mapping[str, str],
) -> None:
    """The commit that a record names is there, and holds the code that the stage read."""
    commit = tags.get("git.commit", "none")
    if not checks.expect(
        git.is_commit(commit),
        Finding(
            "unknown",
            "MLflow tag git.commit",
            who,
            expected="a commit of this repository",
            found=commit[:SHORT],
            remedy="fetch the branch that held it; if history was rewritten, run it again",
        ),
    ):
        return
    if tags.get("git.dirty") == "true":
        return  # What was edited then is committed since: the sources were held against a commit.
    then = git.blobs_at(commit)
    for path in lineage.sources_of(name):
        if path in blobs:
            checks.expect(
                then.get(path) == blobs[path],
                Finding(
                    "failed",
                    f"MLflow tag git.commit: {path}",
                    who,
                    expected=f"the code of {name} at {commit[:SHORT]}",
                    found="other code there",
                    remedy="ask who changed the tag; run the training again",
                ),
            )


def _inside(path: str, folder: str) -> bool:
    return path.startswith(f"{folder}/")


def _written(params: Mapping[str, Any], key: str) -> str:
    return json.dumps(params[key], sort_keys=True) if key in params else "nothing"


def _digest(text: str) -> str:
    return f"SHA-256 {sha256(text.encode()).hexdigest()[:SHORT]}"


def _listed(names: Iterable[str], most: int = 3) -> str:
    """Names in words, the first of them."""
    found = list(names)
    shown = ", ".join(found[:most]) or "none"
    return shown + (f" and {len(found) - most} more" if len(found) > most else "")


def as_json(found: Audit) -> str:
    """All of an audit for programs."""
    tree = {
        "target": found.target,
        "commit": found.commit,
        "diff": found.diff,
        "environment": found.environment,
        "lineage_digest": found.digest,
        "exit_code": found.exit_code,
        "num_checks": found.num_checks,
        "findings": [asdict(finding) for finding in found.findings],
        "stages": {
            name: {
                **asdict(found.lineage.stages[name]),
                "from": found.lineage.needs_of(name),
                "digest": found.lineage.digests[name],
            }
            for name in found.stages
        },
    }
    return json.dumps(tree, indent=2)


def as_text(found: Audit) -> str:
    """An audit for a person: of a target the whole chain, of everything a line a stage."""
    lines = [
        f"commit       {found.commit}" + (f" with diff {found.diff[:SHORT]}" if found.diff else ""),
        f"environment  {ENVIRONMENT} {found.environment[:SHORT] or 'none'}",
        f"lineage      {found.digest[:SHORT]}",
        "",
    ]
    for name in found.stages:
        lines += _told(found, name) if found.target else [_line(found, name)]
    for finding in found.findings:
        lines += ["", str(finding)]
    counts = {
        severity: sum(finding.severity == severity for finding in found.findings)
        for severity in EXIT_CODES
    }
    lines += [
        "",
        f"{len(found.stages)} stages, {found.num_checks} checks: {counts['failed']} failed, "
        f"{counts['unknown']} cannot be told, {counts['note']} to note",
    ]
    return "\n".join(lines)


def _line(found: Audit, name: str) -> str:
    stage = found.lineage.stages[name]
    made = ", ".join(f"{path} {digest[:SHORT]}" for path, digest in stage.outputs.items())
    return f"{found.lineage.digests[name][:SHORT]}  {name:24} {made}"


def _told(found: Audit, name: str) -> list[str]:
    stage = found.lineage.stages[name]
    lines = [f"{name}: {stage.command}"]
    sources = found.lineage.sources_of(name)
    code = {path: digest for path, digest in sources.items() if path.endswith(".py")}
    for path, digest in stage.inputs.items():
        if path not in code:
            makers = found.lineage.makers_of(path)
            origin = f"by {_listed(makers)}" if makers else "source"
            lines.append(f"  read  {path} {digest[:SHORT]} ({origin})")
    together = sha256(json.dumps(code, sort_keys=True).encode()).hexdigest()
    lines.append(f"  code  {len(code)} modules {together[:SHORT]}")
    for key in stage.params:
        lines.append(f"  param {key.partition(':')[2]} = {_written(stage.params, key)}")
    for path, digest in stage.outputs.items():
        lines.append(f"  made  {path} {digest[:SHORT]}")
    return [*lines, ""]

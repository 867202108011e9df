"""Who made what of what, in in-toto's words: a statement a stage, with SLSA's provenance.

Statements follow from dvc.lock, the bytes that it names, and a commit: no time, no machine and no
run's number is in them, so that two clones of a commit write the same ones. Digests are SHA-256,
by which others verify, and MD5, by which DVC knows the file.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows import git, signing
from flows.findings import SHORT, Checks, Finding
from flows.lineage import Lineage
from flows.objects import Objects

if TYPE_CHECKING:
    from flows.signing import Key, Signer  # pyright: ignore[reportPrivateImportUsage]

STATEMENT = "https://in-toto.io/Statement/v1"
PROVENANCE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:prefopt:stage:v1"  # the parameters are those of a stage of dvc.yaml
BUILDER = "urn:prefopt:dvc"  # `dvc repro`, by whomever it was started
FOLDER = Path("provenance")
SUFFIX = ".intoto.json"
KNOWN = Path(".prefopt/sha256.json")
CHUNK = 1 << 20
MOST = 80  # characters of a fact that a person reads
REWRITE = "ask who changed it; write it anew by `prefopt provenance`"


@dataclass(frozen=True)
class File:
    """A file of an artefact."""

    path: str
    md5: str
    sha256: str

    @property
    def digest(self) -> dict[str, str]:
        return {"md5": self.md5, "sha256": self.sha256}


class Files:
    """The files behind paths of dvc.lock; a content's SHA-256 is computed once for all time.

    Args:
        objects: what lies at a path.
        deep: believe no earlier SHA-256.
    """

    def __init__(self, objects: Objects, *, deep: bool = False) -> None:
        self._objects = objects
        known = KNOWN.is_file() and not deep
        self._known: dict[str, str] = json.loads(KNOWN.read_text()) if known else {}
        self._at: dict[str, tuple[str | None, Mapping[str, str]]] = {}

    def of(self, path: str, digest: str) -> list[File]:
        """The files at a path.

        Raises:
            ValueError: if what lies there is not what has this digest.
        """
        if path not in self._at:
            self._at[path] = self._objects.at(path)
        found, files = self._at[path]
        if found != digest:
            raise _refused(path, digest, found)
        paths = {f"{path}/{name}".rstrip("/"): md5 for name, md5 in sorted(files.items())}
        return [File(each, md5, self._sha256(each, md5)) for each, md5 in paths.items()]

    def of_all(self, digests: Mapping[str, str]) -> list[File]:
        """The files at many paths, path -> digest."""
        return [file for path, digest in digests.items() for file in self.of(path, digest)]

    def remember(self) -> None:
        """Keep what was computed."""
        KNOWN.parent.mkdir(exist_ok=True)
        partial = KNOWN.with_suffix(".partial")
        partial.write_text(json.dumps(self._known))
        partial.replace(KNOWN)

    def _sha256(self, path: str, md5: str) -> str:
        if md5 not in self._known:
            digests = hashlib.md5(), hashlib.sha256()
            with open(path, "rb") as stream:
                while chunk := stream.read(CHUNK):
                    for digest in digests:
                        digest.update(chunk)
            read, self._known[md5] = (digest.hexdigest() for digest in digests)
            if read != md5:
                del self._known[md5]
                raise _refused(path, md5, read)
        return self._known[md5]


def _refused(path: str, wanted: str, found: str | None) -> ValueError:
    return ValueError(
        f"{path}: it is not what {git.LOCK} records, got {found or 'nothing'} instead of {wanted}; "
        f"run `dvc checkout {path}`"
    )


def statement(lineage: Lineage, name: str, commit: str, files: Files) -> dict[str, Any]:
    """The provenance of what a stage made.

    Args:
        lineage: of the stage.
        name: of the stage.
        commit: that holds its code, its parameters and dvc.lock.
        files: behind the paths.
    """
    stage = lineage.stages[name]
    repository = {"name": "repository", "digest": {"gitCommit": commit}}
    return {
        "_type": STATEMENT,
        "subject": _described(files.of_all(stage.outputs)),
        "predicateType": PROVENANCE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {
                    "stage": name,
                    "command": stage.command,
                    "params": dict(stage.params),
                },
                "internalParameters": {"lineage": lineage.digests[name]},
                "resolvedDependencies": [repository, *_described(files.of_all(stage.inputs))],
            },
            "runDetails": {"builder": {"id": BUILDER}},
        },
    }


def _described(files: Iterable[File]) -> list[dict[str, Any]]:
    return [{"name": file.path, "digest": file.digest} for file in files]


def as_text(tree: Mapping[str, Any]) -> str:
    return json.dumps(tree, indent=2) + "\n"


def write_statements(
    lineage: Lineage,
    names: Iterable[str],
    commit: str,
    files: Files,
    folder: Path,
    by: "Signer | None",
) -> None:
    """Write the stages' statements, in signed envelopes if there is somebody to sign them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        tree = statement(lineage, name, commit, files)
        text = as_text(signing.signed(as_text(tree), by) if by else tree)
        (folder / f"{name}{SUFFIX}").write_text(text)


@dataclass(frozen=True)
class Written:
    """A statement that lies in a folder.

    Args:
        path: of the file.
        stage: whose it is, by the file's name.
        envelope: the signed envelope, if it is in one.
        tree: what it says; None if it cannot be read.
    """

    path: Path
    stage: str
    envelope: dict[str, Any] | None
    tree: dict[str, Any] | None

    @property
    def commit(self) -> str:
        """What it says that the code is of."""
        dependencies = _at(self.tree, "predicate", "buildDefinition", "resolvedDependencies")
        found = _at(dependencies, 0, "digest", "gitCommit")
        return found if isinstance(found, str) else "none"


def read_statements(folder: Path) -> list[Written]:
    """The statements of a folder, in the order of their names."""
    return [_read(path) for path in sorted(folder.glob(f"*{SUFFIX}"))]


def _read(path: Path) -> Written:
    stage = path.name.removesuffix(SUFFIX)
    try:
        outer: dict[str, Any] = json.loads(path.read_text())
        if not signing.is_envelope(outer):
            return Written(path, stage, None, outer)
        return Written(path, stage, outer, json.loads(signing.opened(outer)))
    except (ValueError, KeyError, TypeError, AttributeError):
        return Written(path, stage, None, None)


def check_signature(checks: Checks, written: Written, key: "Key | None") -> None:
    """A statement is signed by this key."""
    where = written.path.as_posix()
    if not checks.expect(
        key is not None,
        Finding(
            "unknown",
            "signature",
            where,
            expected="a public key to verify it by",
            found="none",
            remedy=f"set {signing.PUBLIC_KEY}",
        ),
    ):
        return
    assert key is not None
    names = signing.signers(written.envelope) if written.envelope else []
    checks.expect(
        written.envelope is not None and signing.is_signed_by(written.envelope, key),
        Finding(
            "failed",
            "signature",
            where,
            expected=f"one by the key {key.keyid[:SHORT]}",
            found="one that does not verify"
            if key.keyid in names
            else f"those by {', '.join(name[:SHORT] for name in names) or 'none'}",
            remedy=REWRITE,
        ),
    )


def check_statement(checks: Checks, lineage: Lineage, written: Written, files: Files) -> bool:
    """A statement is the one that would be written now, its commit apart."""
    where = written.path.as_posix()
    known = written.stage in lineage.stages
    try:
        wanted = (
            statement(lineage, written.stage, written.commit, files) if known else "no such stage"
        )
    except ValueError as error:
        return checks.expect(
            False,
            Finding(
                "unknown",
                "statement",
                where,
                expected="artefacts to hold it against",
                found=str(error),
                remedy="mend that first",
            ),
        )
    differing = list(_differing(wanted, written.tree))
    place, expected, found = next(iter(differing), ("", "", ""))
    return checks.expect(
        not differing,
        Finding("failed", f"statement: {place}", where, expected, found, REWRITE),
    )


def _differing(wanted: Any, found: Any, place: str = "") -> Iterator[tuple[str, str, str]]:
    """Places of two trees, what one has there and what the other has."""
    match wanted, found:
        case dict(), dict():
            keys = dict.fromkeys([*wanted, *found])
        case list(), list():
            keys = range(max(len(wanted), len(found)))
        case _:
            if wanted != found:
                yield place or "all", json.dumps(wanted)[:MOST], json.dumps(found)[:MOST]
            return
    for key in keys:
        yield from _differing(_at(wanted, key), _at(found, key), f"{place}/{key}".lstrip("/"))


def _at(tree: Any, *keys: str | int) -> Any:
    """What lies at a place of a tree; None if there is no such place."""
    for key in keys:
        try:
            tree = tree[key]
        except (KeyError, IndexError, TypeError):
            return None
    return tree

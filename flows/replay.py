"""Run stages again from their recorded inputs, apart from the working tree, and compare bytes.

Each stage gets a checkout of the commit, and its inputs from DVC's cache; nothing that an earlier
run left behind. Bits are promised on one machine with one environment: elsewhere they may differ.
"""

import fcntl
import hashlib
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from flows import git
from flows.lineage import Lineage, Snapshot
from flows.objects import Files, Objects
from flows.supervise import Supervisor

WORK = Path(".prefopt")
LEDGER = "ledger"  # judges' replies, which are not paid for again
COURIER = "tracking/courier.lock"
PAID_BY = "OPENAI_API_KEY"


class NotReplayed(Exception):
    """A stage could not be run again: what is missing, or how it ended."""


def chosen(wanted: Sequence[str], stages: Sequence[str]) -> list[str]:
    """The stages that --replay means: `all`, a number of them at random, or their names.

    Raises:
        ValueError: if a name or a number is none of these.
    """
    found = set[str]()
    for word in wanted:
        if word == "all":
            found.update(stages)
        elif word in stages:
            found.add(word)
        elif word.isdecimal() and 0 < int(word) <= len(stages):
            found.update(random.SystemRandom().sample(list(stages), int(word)))
        else:
            raise ValueError(
                f"--replay: neither a stage of the target nor a number of them, got '{word}'; "
                f"take all, 1 to {len(stages)}, or one of {', '.join(stages)}"
            )
    return [name for name in stages if name in found]


class Replayer:
    """Runs stages again in a checkout of a commit that is removed in the end."""

    def __init__(
        self,
        directory: Path,
        lineage: Lineage,
        committed: Snapshot,
        objects: Objects,
    ) -> None:
        self._directory, self._lineage, self._committed = directory, lineage, committed
        self._objects = objects

    def replay(self, name: str) -> dict[str, tuple[Files, Files]]:
        """Run a stage again; returns of each output its recorded files and those made now.

        Raises:
            NotReplayed: if an input is not to be had, or the command fails.
        """
        stage = self._lineage.stages[name]
        self._clear()
        inside = {  # What .dvc files track inside of folders that git tracks.
            path: digest
            for path, digest in self._committed.sources.items()
            if any(path.startswith(f"{folder}/") for folder in stage.inputs)
        }
        for path, digest in {**stage.inputs, **inside}.items():
            if self._lineage.makers_of(path) or not (self._directory / path).exists():
                self._place(path, digest)
        with held_back(self._directory / WORK):
            said: list[str] = []
            # The commit's command, not the record's: that could be anybody's.
            command = self._committed.plans[name].command
            with Supervisor() as supervisor:
                status = supervisor.run(
                    ["env", "-C", str(self._directory), "sh", "-c", command],
                    environment(),
                    said.append,
                )
        if status:
            last = said[-1] if said else "nothing"
            raise NotReplayed(f"status {status} of `{command}`, which said: {last}")
        return {
            path: (self._objects.listed(digest) or {}, files_of(self._directory / path))
            for path, digest in stage.outputs.items()
        }

    def _clear(self) -> None:
        """Forget what the last stage read and left."""
        made = {path for stage in self._lineage.stages.values() for path in stage.outputs}
        for root in {WORK.name, *(path.split("/")[0] for path in made)}:
            shutil.rmtree(self._directory / root, ignore_errors=True)

    def _place(self, path: str, digest: str) -> None:
        files = self._objects.listed(digest)
        if files is None and (self._objects.at(path)[0] == digest):
            files = self._objects.at(path)[1]  # A folder that stages share is listed nowhere else.
        if files is None:
            raise NotReplayed(f"no list of the files of {path} {digest}")
        for name, each in files.items():
            held = Path(self._objects.path_of(each))
            if not held.is_file():
                raise NotReplayed(f"no object {each} in DVC's cache, of {path}")
            to = self._directory / path / name
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(held, to)


@contextmanager
def replaying(
    commit: str, lineage: Lineage, committed: Snapshot, objects: Objects
) -> Generator[Replayer, None, None]:
    """A replayer of a commit's stages."""
    WORK.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=WORK, prefix="replay-") as folder:
        directory = Path(folder).resolve() / "tree"
        git.add_worktree(directory, commit)
        try:
            yield Replayer(directory, lineage, committed, objects)
        finally:
            git.remove_worktree(directory)


@contextmanager
def held_back(work: Path) -> Generator[None, None, None]:
    """A workplace of its own: judges' known replies, and no courier to MLflow.

    A replay is no experiment, so nothing of it is delivered: who would deliver finds another at
    work.
    """
    (work / COURIER).parent.mkdir(parents=True)
    if (WORK / LEDGER).is_dir():
        shutil.copytree(WORK / LEDGER, work / LEDGER)
    with open(work / COURIER, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def environment() -> dict[str, str]:
    """Ours, with this Python first, and without the key that pays for judges."""
    kept = {key: value for key, value in os.environ.items() if key not in (PAID_BY, "PYTHONPATH")}
    path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", os.defpath)])
    return kept | {"PATH": path, "TQDM_DISABLE": "1"}


def files_of(path: Path) -> Files:
    """A file, or the files of a folder, by name, with their MD5."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    found: Files = {}
    for file in files:
        if file.is_file():
            with open(file, "rb") as stream:
                name = file.relative_to(path).as_posix()
                found["" if name == "." else name] = hashlib.file_digest(stream, "md5").hexdigest()
    return found

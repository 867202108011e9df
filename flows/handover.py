"""What a stage needs to go on, carried to the machine that goes on with it.

Checkpoints lie in the scratch folder of a machine. While a worker runs a stage, they are copied to
DVC's remote as well, as `checkpoints/STAGE`, and whoever is given the stage next has them first. A
stage that ended well leaves none. Either way a file is copied whole or not at all, and a checkpoint
bears digests: one of which files are lacking is passed over for the one before it.
"""

import contextvars
import os
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefect import get_run_logger

from flows.clones import SCRATCH, SHARED

SECONDS = 15.0  # between copies
PARTIAL = ".partial"  # ends the name of a file whose copy is under way


@contextmanager
def handed_over(tree: Path, stage: str) -> Generator[None, None, None]:
    """Fetch what others left of a stage, and leave others what is new while the block runs.

    A remote that does not answer costs a line in the log. Where machines share their scratch
    folder, PREFOPT_SHARED, nothing is copied.

    Args:
        tree: the worktree.
        stage: its name.
    """
    if SHARED in os.environ:
        yield
        return
    from dvc.repo import Repo

    name = stage.replace("@", "-")
    with Repo(str(tree)) as repo:
        remote = repo.cloud.get_remote()
    there = remote.fs.join(remote.path, "checkpoints", name)
    copies = _Copies(remote.fs, there, tree / SCRATCH / "stages" / name)
    copies.attempt(copies.fetch)
    ended = threading.Event()

    def follow() -> None:
        while not ended.wait(SECONDS):
            copies.attempt(copies.leave)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(follow,))
    thread.start()
    try:
        yield
    except BaseException:
        ended.set()
        thread.join()
        copies.attempt(copies.leave)
        raise
    ended.set()
    thread.join()
    copies.attempt(copies.remove)


class _Copies:
    """Of a folder here, in a folder of a remote. Files do not change, they come and go."""

    def __init__(self, fs: Any, there: str, here: Path) -> None:
        self._fs, self._there, self._here = fs, there, here

    def attempt(self, what: Callable[[], None]) -> None:
        try:
            what()
        except Exception as error:  # Each kind of remote has its own; the stage goes on without.
            get_run_logger().warning("checkpoints: the remote did not serve, got %s", error)

    def fetch(self) -> None:
        for name in filter(_is_whole, self._left()):
            path = self._here / name
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                partial = path.with_name(path.name + PARTIAL)
                self._fs.get_file(self._address(name), str(partial))
                partial.replace(path)

    def leave(self) -> None:
        left = self._left()
        files = {str(p.relative_to(self._here)) for p in self._here.rglob("*") if p.is_file()}
        made = {name for name in files if _is_whole(name) and "partial" not in Path(name).parts}
        for name in sorted(made - left):
            address = self._address(name)
            self._fs.makedirs(self._fs.parent(address), exist_ok=True)
            try:
                self._fs.put_file(str(self._here / name), address + PARTIAL)
            except FileNotFoundError:
                continue  # A later one has taken its place.
            self._fs.mv(address + PARTIAL, address)
        for name in left - made:
            self._fs.remove(self._address(name))

    def remove(self) -> None:
        for name in self._left():
            self._fs.remove(self._address(name))

    def _left(self) -> set[str]:
        if not self._fs.exists(self._there):
            return set()
        return {self._fs.relpath(path, self._there) for path in self._fs.find(self._there)}

    def _address(self, name: str) -> str:
        return self._fs.join(self._there, *Path(name).parts)


def _is_whole(name: str) -> bool:
    return not name.endswith(PARTIAL)

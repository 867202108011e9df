"""Locks of the kernel: one run of the pipeline a workspace, one stage a GPU.

A lock is held by an open file, so it is free when its holders have ended, however they ended; what
is written in the file only says to people who holds it. A supervisor hands locks on to the group of
each command (`flows.keeper`), so that no lock is free before the last process has ended.
"""

import fcntl
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

POLL_SECONDS = 0.1


class EndedError(Exception):
    """Whoever waited for a lock was told to end."""


@dataclass(frozen=True)
class Slots:
    """GPUs that are ours."""

    devices: tuple[str, ...]
    locks: tuple[int, ...]  # descriptors

    @property
    def environment(self) -> dict[str, str]:
        """What shows a program these GPUs and no other; nothing if it asked for none."""
        return {"CUDA_VISIBLE_DEVICES": ",".join(self.devices)} if self.devices else {}


@contextmanager
def hold_workspace(root: Path, say: Callable[[str], None]) -> Generator[int, None, None]:
    """Hold a workspace alone, and wait for it if need be; gives the lock's descriptor.

    Args:
        root: where dvc.yaml lies.
        say: is told, once, whom we wait for.
    """
    path = root / ".dvc/tmp/prefopt.lock"
    path.parent.mkdir(exist_ok=True)
    with _opened(path) as lock:
        if not _taken(lock):
            say(f"{path}: another run is at work in this workspace, {_holder(path)}; waiting")
            fcntl.flock(lock, fcntl.LOCK_EX)
        now = datetime.now().astimezone().isoformat(" ", "seconds")
        path.write_text(f"process {os.getpid()} of {socket.gethostname()} since {now}")
        yield lock


@contextmanager
def hold(path: Path) -> Generator[None, None, None]:
    """Hold a file's lock, and wait for it if need be."""
    with _opened(path) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def try_hold(path: Path) -> Generator[bool, None, None]:
    """Hold a file's lock, if nobody else does; gives whether we do."""
    with _opened(path) as lock:
        yield _taken(lock)


@contextmanager
def hold_gpus(count: int, ended: Callable[[], bool]) -> Generator[Slots, None, None]:
    """Hold so many of the GPUs that we may see, and wait for them if need be.

    All programs of a machine share the locks, one a GPU, by the GPU's name in CUDA_VISIBLE_DEVICES
    (or nvidia-smi's number). Who waits stands in a line: so one that asks for several gets them,
    although others ask for fewer, and no two wait for one another. Without GPUs nothing is held,
    and the stage computes on the CPU.

    Args:
        count: how many.
        ended: asked while waiting, whether to give up.

    Raises:
        ValueError: if we may see GPUs, but not so many.
        EndedError: if `ended()` while waiting.
    """
    devices = _visible_gpus() if count else []
    if devices and len(devices) < count:
        raise ValueError(
            f"meta.gpus: more than this worker may see, got {count} of {len(devices)}; start it "
            "with more devices in CUDA_VISIBLE_DEVICES, or give the stage a pool that has them"
        )
    if not devices:
        yield Slots((), ())
        return
    folder = Path(tempfile.gettempdir()) / "prefopt-gpus"
    if not folder.exists():
        folder.mkdir()
        folder.chmod(0o1777)  # as the folder that it lies in: the GPUs are everybody's
    with ExitStack() as held:
        files = {name: held.enter_context(_opened(folder / name)) for name in devices}
        mine: list[str] = []

        def enough() -> bool:
            waiting = [name for name in devices if name not in mine]
            while waiting and len(mine) < count:
                name = waiting.pop(0)
                if _taken(files[name]):
                    mine.append(name)
            return len(mine) == count

        with _opened(folder / "line") as line:
            _await(lambda: _taken(line), ended)
            _await(enough, ended)
        yield Slots(tuple(mine), tuple(files[name] for name in mine))


def _visible_gpus() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name not in ("", "-1")]
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return []
    return listed.stdout.split() if listed.returncode == 0 else []


def _await(holds: Callable[[], bool], ended: Callable[[], bool]) -> None:
    while not holds():
        if ended():
            raise EndedError("GPU: no longer waited for")
        time.sleep(POLL_SECONDS)


@contextmanager
def _opened(path: Path) -> Generator[int, None, None]:
    # In a shared folder, a file of another person's may be opened, but not with O_CREAT.
    descriptor = os.open(path, os.O_RDONLY if path.exists() else os.O_RDONLY | os.O_CREAT, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(path: Path) -> str:
    return path.read_text() or "just started"

"""Commands that cannot outlive this process: each under a keeper that ends its process group.

DVC leaves a stage running when DVC itself is killed, and the orphan keeps writing its outputs. So
each command runs in a process group of its own, as the child of a keeper (this file as a program).
The keeper ends the whole group when the command ends, when it is told to (SIGTERM), and, on Linux,
when the process that started it dies, however that dies. Whoever makes a session of its own
(`start_new_session`) leaves the group: stages' couriers to MLflow stay alive by that. Locks that
the command needs are the keeper's too, so that they are free only when the whole group has ended.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, NoReturn

GRACE_SECONDS = 10.0  # between SIGTERM and SIGKILL
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


class Supervisor(AbstractContextManager["Supervisor"]):
    """Starts commands, from any thread; its exit ends those that still run.

    Args:
        locks: descriptors of locked files, which every command's group holds until it has ended.
    """

    def __init__(self, locks: Sequence[int] = ()) -> None:
        self._locks = tuple(locks)
        self._keepers: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether its end has begun: who waits for something is to wait no longer."""
        return self._closed

    def start(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        output: int | IO[bytes] | None = subprocess.PIPE,
        *,
        folder: Path | None = None,
        locks: Sequence[int] = (),
    ) -> subprocess.Popen[bytes]:
        """Start a command; `terminate()` of what is returned ends its whole group.

        Args:
            command: the program and its arguments.
            environment: all of its environment.
            output: where both of its streams go; None leaves them ours.
            folder: where it runs; ours if None.
            locks: descriptors, beside the supervisor's, that its group holds.
        """
        # Isolated and without site: the keeper needs the standard library only, and starts sooner.
        keeper = [sys.executable, "-IS", __file__, str(os.getpid()), *command]
        with self._lock:
            if self._closed:
                raise RuntimeError(f"supervisor: it has ended, got {command}; start another")
            process = subprocess.Popen(
                keeper,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=None if output is None else subprocess.STDOUT,
                cwd=folder,
                pass_fds=[*self._locks, *locks],
                start_new_session=True,
            )
            self._keepers.add(process)
        return process

    def run(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Callable[[str], None],
        *,
        folder: Path | None = None,
        locks: Sequence[int] = (),
    ) -> int:
        """Run a command to its end, each line of its output to `log`; returns its exit status."""
        with self.start(command, environment, folder=folder, locks=locks) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if text := last_state(line):
                    log(text)
        with self._lock:
            self._keepers.remove(process)
        return process.returncode

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._closed = True
            keepers = list(self._keepers)
        for process in keepers:
            process.terminate()
        for process in keepers:
            process.wait()


def end_with_parent() -> None:
    """Be sent SIGTERM when the parent ends, however it ends; only Linux can."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def last_state(line: bytes) -> str:
    """What a terminal would show of a line in the end: a progress bar's last state."""
    return line.decode(errors="replace").rstrip().rpartition("\r")[2]


def keep(parent: int, command: Sequence[str]) -> NoReturn:
    """Run a command in a group of its own, and end that group with it, with us or our parent."""
    signal.signal(signal.SIGTERM, _stop)
    end_with_parent()
    if sys.platform == "linux":
        # Orphans of the command become our children, so that we can wait for them.
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    if os.getppid() != parent:
        _stop()  # It died before we asked to be told.
    process = subprocess.Popen(command, process_group=0)
    try:
        status = process.wait()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _end_group(process)
    sys.exit(status if status >= 0 else 128 - status)


def _stop(*_: object) -> NoReturn:
    sys.exit(128 + signal.SIGTERM)


def _end_group(leader: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + GRACE_SECONDS
    signal_group(leader.pid, signal.SIGTERM)
    while _is_alive(leader) and time.monotonic() < deadline:
        time.sleep(0.05)
    signal_group(leader.pid, signal.SIGKILL)


def signal_group(group: int, number: int) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return  # All of it has ended.


def _is_alive(leader: subprocess.Popen[bytes]) -> bool:
    """Whether the group has a member; reaps those that have ended."""
    leader.poll()
    try:
        while os.waitpid(-leader.pid, os.WNOHANG)[0]:
            continue
    except ChildProcessError:
        return False
    return True


if __name__ == "__main__":
    keep(int(sys.argv[1]), sys.argv[2:])

"""Commands that cannot outlive this process: each under a keeper that ends its process group.

Locks that a command needs are its keeper's too (`flows.keeper`), so that they are free only when
the whole group has ended.
"""

import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from os import getpid
from pathlib import Path
from typing import IO

from flows import keeper
from flows.warm import Fork, WarmDvc


class Supervisor(AbstractContextManager["Supervisor"]):
    """Starts commands, from any thread; its exit ends those that still run.

    Args:
        locks: descriptors of locked files, which every command's group holds until it has ended.
    """

    def __init__(self, locks: Sequence[int] = ()) -> None:
        self._locks = tuple(locks)
        self._keepers: set[subprocess.Popen[bytes] | Fork] = set()
        self._dvc = WarmDvc()
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
        kept = [sys.executable, "-IS", keeper.__file__, str(getpid()), *command]
        with self._lock:
            self._require_open(command)
            process = subprocess.Popen(
                kept,
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
        process = self.start(command, environment, folder=folder, locks=locks)
        return self._followed(process, log)

    def run_dvc(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        log: Callable[[str], None],
        *,
        folder: Path | None = None,
        locks: Sequence[int] = (),
    ) -> int:
        """The same of `dvc ARGUMENTS`, which is imported once for all of a supervisor's."""
        with self._lock:
            self._require_open(arguments)
            process = self._dvc.start(
                arguments, environment, folder=folder, locks=[*self._locks, *locks]
            )
            self._keepers.add(process)
        return self._followed(process, log)

    def _require_open(self, command: Sequence[str]) -> None:
        if self._closed:
            raise RuntimeError(f"supervisor: it has ended, got {command}; start another")

    def _followed(self, process: subprocess.Popen[bytes] | Fork, log: Callable[[str], None]) -> int:
        assert process.stdout is not None
        with process.stdout as output:
            for line in output:
                if text := last_state(line):
                    log(text)
        status = process.wait()
        with self._lock:
            self._keepers.remove(process)
        return status

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._closed = True
            keepers = list(self._keepers)
        for process in keepers:
            process.terminate()
        for process in keepers:
            process.wait()
        self._dvc.close()


def last_state(line: bytes) -> str:
    """What a terminal would show of a line in the end: a progress bar's last state."""
    return line.decode(errors="replace").rstrip().rpartition("\r")[2]

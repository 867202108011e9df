"""DVC's commands without DVC's start: one process imports it, and forks itself for each command.

To import DVC takes longer than to look at a stage with it. The process here has one thread, and
runs no command itself; each fork is the keeper of its command (`flows.keeper`).
"""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

from flows.keeper import keep

# What `dvc repro` imports by the time it runs a stage; what else a command needs it imports itself.
MODULES = (
    "dvc.cli.parser",
    "dvc.data_cloud",
    "dvc.lock",
    "dvc.repo.fetch",
    "dvc.repo.metrics",
    "dvc.repo.plots",
    "dvc.repo.reproduce",
    "dvc.rwlock",
    "dvc.scm",
    "dvc.utils.strictyaml",
    "dvc_data.hashfile.status",
)
NUMBER_BYTES = 8
MOST_DESCRIPTORS = 64


class Fork:
    """A command of DVC's that runs, as much like a `Popen` as a supervisor needs.

    Args:
        process: its keeper.
        stdout: what it says, both of its streams.
        ended: gives its exit status when it has ended.
    """

    def __init__(self, process: int, stdout: IO[bytes], ended: IO[bytes]) -> None:
        self.stdout = stdout
        self.returncode: int | None = None
        self._process, self._ended = process, ended
        self._lock = threading.Lock()

    def wait(self) -> int:
        """Its exit status, once its whole group has ended."""
        with self._lock:
            if self.returncode is None:
                with self._ended:
                    said = self._ended.read()
                self.returncode = int(said) if said else -signal.SIGKILL
            return self.returncode

    def terminate(self) -> None:
        """End its whole group; `wait` for it."""
        if self.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self._process, signal.SIGTERM)


class WarmDvc:
    """Starts commands of DVC's, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None

    def start(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        *,
        folder: Path | None = None,
        locks: Sequence[int] = (),
    ) -> Fork:
        """Start a command.

        Args:
            arguments: those of `dvc`.
            environment: all of its environment.
            folder: where it runs; ours if None.
            locks: descriptors that its group holds.
        """
        request = {
            "arguments": list(arguments),
            "environment": dict(environment),
            "folder": str(Path.cwd() if folder is None else folder.absolute()),
        }
        stdout, their_stdout = os.pipe()
        ended, their_ended = os.pipe()
        try:
            with self._lock:
                channel = self._warm(environment)
                _send(channel, request, [their_stdout, their_ended, *locks])
                process = _receive_number(channel)
        except BaseException:
            os.close(stdout)
            os.close(ended)
            raise
        finally:
            os.close(their_stdout)
            os.close(their_ended)
        return Fork(process, os.fdopen(stdout, "rb"), os.fdopen(ended, "rb"))

    def close(self) -> None:
        """End the process; the commands are to have ended."""
        with self._lock:
            if self._process is not None and self._channel is not None:
                self._channel.close()
                self._process.wait()
                self._process = self._channel = None

    def _warm(self, environment: Mapping[str, str]) -> socket.socket:
        """The channel to a process that has, or will soon have, imported DVC."""
        if self._channel is not None and self._process is not None:
            if self._process.poll() is None:
                return self._channel
            self._channel.close()
        self._channel, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "flows.warm", str(theirs.fileno())],
                env={**environment, "PYTHONPATH": _with_us(environment)},
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        return self._channel


@dataclass(frozen=True)
class Request:
    """A command that was asked for."""

    arguments: list[str]
    environment: dict[str, str]
    folder: str
    stdout: int
    ended: int
    locks: tuple[int, ...]


def serve(channel: socket.socket) -> None:
    """Fork for each command that is asked for, until the channel is closed.

    Which it is when the other side ends, however that ends; then we end, and so do our forks.
    """
    for module in MODULES:
        importlib.import_module(module)
    us = os.getpid()
    while request := _receive(channel):
        if (process := os.fork()) == 0:
            channel.close()
            _keep(us, request)
        channel.sendall(process.to_bytes(NUMBER_BYTES, "big"))
        for descriptor in (request.stdout, request.ended, *request.locks):
            os.close(descriptor)
        _reap()
    _reap()


def _reap() -> None:
    """Forget the forks that have ended; they told their status themselves."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            continue


def _keep(parent: int, request: Request) -> NoReturn:
    """Be the keeper of a command, in a fork; nothing of the process that was forked goes on."""
    status: Any = 1
    try:
        os.setsid()
        os.dup2(request.stdout, 1)
        os.dup2(request.stdout, 2)
        os.close(request.stdout)
        os.chdir(request.folder)
        keep(parent, lambda: _command(request))
    except SystemExit as end:
        status = end.code
    except Exception:
        traceback.print_exc()
    finally:
        os.write(request.ended, b"%d" % status)
        os._exit(status)


def _command(request: Request) -> int:
    """Fork, and run DVC there as `dvc` would; gives the process."""
    if process := os.fork():
        with suppress(PermissionError, ProcessLookupError):
            os.setpgid(process, process)  # As the fork does: whichever comes first.
        return process
    status = 1
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.close(request.ended)
        os.environ.clear()
        os.environ.update(request.environment)
        sys.argv = ["dvc", *request.arguments]
        from dvc.cli import main

        status = main(request.arguments)
        sys.stdout.flush()
        sys.stderr.flush()
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(status)


def _send(channel: socket.socket, request: Mapping[str, Any], descriptors: Sequence[int]) -> None:
    text = json.dumps(request).encode()
    socket.send_fds(channel, [len(text).to_bytes(NUMBER_BYTES, "big")], list(descriptors))
    channel.sendall(text)


def _receive(channel: socket.socket) -> Request | None:
    """The next request; none when the channel is closed."""
    head, descriptors, _, _ = socket.recv_fds(channel, NUMBER_BYTES, MOST_DESCRIPTORS)
    if not head:
        return None
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    length = int.from_bytes(head + _exactly(channel, NUMBER_BYTES - len(head)), "big")
    stdout, ended, *locks = descriptors
    asked = json.loads(_exactly(channel, length))
    return Request(**asked, stdout=stdout, ended=ended, locks=tuple(locks))


def _receive_number(channel: socket.socket) -> int:
    return int.from_bytes(_exactly(channel, NUMBER_BYTES), "big")


def _exactly(channel: socket.socket, size: int) -> bytes:
    """So many bytes.

    Raises:
        RuntimeError: if the other side ends before it has sent them.
    """
    said = b""
    while len(said) < size:
        more = channel.recv(size - len(said))
        if not more:
            raise RuntimeError("dvc: the process that runs its commands has ended; see its log")
        said += more
    return said


def _with_us(environment: Mapping[str, str]) -> str:
    """The path by which the process finds this package, wherever it starts."""
    ours = str(Path(__file__).parents[1])
    return os.pathsep.join([ours, *filter(None, [environment.get("PYTHONPATH")])])


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as ours:
        serve(ours)

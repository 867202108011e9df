"""What stands above a command, so that it cannot outlive us; started by `flows.supervise`.

DVC leaves a stage running when DVC itself is killed, and the orphan keeps writing its outputs. So
each command runs in a process group of its own, as the child of a keeper (this file as a program,
or a fork of `flows.warm`). The keeper ends the whole group when the command ends, when it is told
to (SIGTERM), and, on Linux, when the process that started it dies, however that dies. Whoever makes
a session of its own (`start_new_session`) leaves the group: stages' couriers to MLflow stay alive
by that.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NoReturn

GRACE_SECONDS = 10.0  # between SIGTERM and SIGKILL
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def keep(parent: int, start: Callable[[], int]) -> NoReturn:
    """Run a command, and end its group with it, with us or our parent; exits as the command does.

    Args:
        parent: the process that started us.
        start: starts the command as the leader of a new process group, and gives its process.
    """
    signal.signal(signal.SIGTERM, _stop)
    end_with_parent()
    if sys.platform == "linux":
        # Orphans of the command become our children, so that we can wait for them.
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    if os.getppid() != parent:
        _stop()  # It died before we asked to be told.
    leader = start()
    try:
        _, status = os.waitpid(leader, 0)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _end_group(leader)
    code = os.waitstatus_to_exitcode(status)
    sys.exit(code if code >= 0 else 128 - code)


def end_with_parent() -> None:
    """Be sent SIGTERM when the parent ends, however it ends; only Linux can."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _stop(*_: object) -> NoReturn:
    sys.exit(128 + signal.SIGTERM)


def _end_group(group: int) -> None:
    deadline = time.monotonic() + GRACE_SECONDS
    signal_group(group, signal.SIGTERM)
    while _is_alive(group) and time.monotonic() < deadline:
        time.sleep(0.05)
    signal_group(group, signal.SIGKILL)
    while _is_alive(group):  # Until then, what it held is not free.
        time.sleep(0.01)


def signal_group(group: int, number: int) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return  # All of it has ended.


def _is_alive(group: int) -> bool:
    """Whether the group has a member; reaps those that have ended."""
    try:
        while os.waitpid(-group, os.WNOHANG)[0]:
            continue
    except ChildProcessError:
        return False
    return True


def _program() -> NoReturn:
    """As a program: the process that started it, and the command."""
    parent, *command = sys.argv[1:]
    process: list[subprocess.Popen[bytes]] = []  # Popen reaps what it is forgotten with.

    def start() -> int:
        process.append(subprocess.Popen(command, process_group=0))
        return process[0].pid

    keep(int(parent), start)


if __name__ == "__main__":
    _program()

"""Names of processes, by which one can tell later whether they are there still."""

import socket
from pathlib import Path

import psutil

KIND = "process"


def name_of_process() -> str:
    """What names this process on all machines, now and later."""
    return _name(psutil.Process())


def is_gone(name: str) -> bool:
    """Whether something names a process of this machine that has ended."""
    kind, host, number, _ = (name.split(":") + [""] * 3)[:4]
    if (kind, host) != (KIND, socket.gethostname()):
        return False
    try:
        process = psutil.Process(int(number))
        return _name(process) != name or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _name(process: psutil.Process) -> str:
    return f"{KIND}:{socket.gethostname()}:{process.pid}:{_born(process)}"


def _born(process: psutil.Process) -> str:
    """When: its number is given to another some day. All who ask are to get the same answer."""
    stat = Path(f"/proc/{process.pid}/stat")
    try:
        # Ticks since the machine's start: the date of that, by which psutil would say it, wavers.
        return stat.read_text().rpartition(")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        # No such listing on this system, or no such process any more, which psutil then says.
        return str(process.create_time())

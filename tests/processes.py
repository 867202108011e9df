"""Processes that tests start, and watch the end of."""

import time
from collections.abc import Callable
from pathlib import Path

# A shell does not pass signals on: its child is told by nobody but the keeper.
FAMILY = "sleep 600 & echo $! > grandchild; echo $$ > shell; wait; true"


def family(directory: Path) -> list[int]:
    """The process ids of the shell and the grandchild, once they are there."""
    files = [directory / "shell", directory / "grandchild"]
    wait_until(lambda: all(file.exists() and file.read_text().strip() for file in files))
    return [int(file.read_text()) for file in files]


def is_alive(process: int) -> bool:
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):  # The latter if it ends while it is read.
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)

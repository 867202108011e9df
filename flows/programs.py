"""Programs of `stages` that answer in JSON what flows do not read themselves."""

import os
import subprocess
import sys
from pathlib import Path


def start(module: str, *arguments: str) -> subprocess.Popen[str]:
    """Start `stages.MODULE` in the working directory.

    Its code is of this project and not of the directory, which may be another version of it.
    """
    return subprocess.Popen(
        [sys.executable, "-P", "-m", f"stages.{module}", *arguments],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def complaint(stderr: str) -> str:
    """The last that a program said before it failed."""
    return (stderr.strip().splitlines() or ["nothing"])[-1]

"""Programs of `stages` that answer in JSON what flows do not read themselves."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


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


def ask(folder: Path, module: str, *arguments: str) -> Any:
    """What `stages.MODULE` of a workspace answers there, as its own code.

    Raises:
        ValueError: with its complaint, if it fails.
    """
    done = subprocess.run(
        [sys.executable, "-m", f"stages.{module}", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise ValueError(complaint(done.stderr).removeprefix("error: "))
    return json.loads(done.stdout)

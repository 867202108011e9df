"""What an audit costs: `python -m benchmarks.audits`; writes benchmarks/audits.md.

Files of growing size, known to DVC, are held against its cache as an audit holds them: every byte
read again (`--deep`), and after that by inode, size and time of change; beside them MD5 alone over
as many bytes. Then the whole audit of a project that is finished, both ways. CPU seconds of the
process and of those that it starts; the least of three rounds.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from flows.objects import Objects

OUT = Path(__file__).parent / "audits.md"
PROJECT = Path(__file__).parents[1]
MEGABYTES = (64, 128, 256, 512, 1024)
ROUNDS = 3
BLOCK = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.audits", description=__doc__)
    parser.add_argument("--project", type=Path, default=PROJECT, help="with nothing out of date")
    project = parser.parse_args().project
    lines = [
        "# What an audit costs",
        "",
        f"CPU seconds, the least of {ROUNDS} rounds, on {os.cpu_count()} cores beside a load of "
        f"{os.getloadavg()[0]:.1f}. A file is held against DVC's cache, which has it too: twice "
        "its bytes. `python -m benchmarks.audits` makes this page.",
        "",
        "| megabytes, with the cache's | MD5 alone | `--deep` | seconds a gigabyte | unchanged |",
        "|---:|---:|---:|---:|---:|",
    ]
    for megabytes in MEGABYTES:
        with tempfile.TemporaryDirectory() as folder:
            alone, deep, unchanged = hashing(Path(folder), megabytes)
        speed = deep / (2 * megabytes / 1024)
        lines.append(
            f"| {2 * megabytes} | {alone:.2f} | {deep:.2f} | {speed:.2f} | {unchanged:.3f} |"
        )
    lines += ["", "The whole audit of the default pipeline, its stages' processes included:", ""]
    lines += ["| | CPU seconds | wall seconds |", "|---|---:|---:|"]
    for name, options in (("unchanged", ()), ("`--deep`", ("--deep",))):
        cpu, wall = least(lambda options=options: audit(project, *options))
        lines.append(f"| {name} | {cpu:.1f} | {wall:.1f} |")
    OUT.write_text("\n".join(lines) + "\n")
    print(OUT.read_text())


def hashing(folder: Path, megabytes: int) -> tuple[float, float, float]:
    """CPU seconds: MD5 of as many bytes; an audit's reading of them; its looking at them."""
    from dvc.repo import Repo

    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    dvc = [sys.executable, "-m", "dvc"]
    subprocess.run([*dvc, "init", "--quiet"], cwd=folder, check=True)
    file = folder / "weights"
    with open(file, "wb") as out:
        for _ in range(megabytes * (1 << 20) // BLOCK):
            out.write(os.urandom(BLOCK))
    subprocess.run(
        [sys.executable, "-m", "dvc", "add", "--quiet", "weights"], cwd=folder, check=True
    )

    def alone() -> None:
        for _ in range(2):
            digest = hashlib.md5(usedforsecurity=False)
            with open(file, "rb") as read:
                while block := read.read(BLOCK):
                    digest.update(block)

    with Repo(str(folder)) as repo:

        def held(*, deep: bool) -> None:
            objects = Objects(repo, deep=deep)
            digest, _ = objects.at("weights")
            assert digest is not None
            assert objects.in_cache(digest) == digest

        held(deep=False)  # DVC now knows both files.
        read, looked = (least(lambda deep=deep: held(deep=deep))[0] for deep in (True, False))
        return least(alone)[0], read, looked


def audit(project: Path, *options: str) -> None:
    command = [sys.executable, "-m", "flows.cli", "audit", *options]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ValueError(f"{project}: its audit is not clean, got {done.stdout[-500:]}")


def least(work: Callable[[], None]) -> tuple[float, float]:
    """CPU and wall seconds, the least of each."""
    cpu, wall = list[float](), list[float]()
    for _ in range(ROUNDS):
        began, spent = time.perf_counter(), _cpu()
        work()
        cpu.append(_cpu() - spent)
        wall.append(time.perf_counter() - began)
    return min(cpu), min(wall)


def _cpu() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


if __name__ == "__main__":
    main()

"""The flow beside plain DVC: `python -m benchmarks.flows`.

Twenty stages that do nothing, in five chains of four, run by `dvc repro` and by the flow with a
server that is up; and the project itself where nothing is out of date, beside `dvc status`. Wall
time and CPU time of whole processes, imports included; rounds alternate, the least of each counts.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from flows.server import own_server

OUT = Path(__file__).parent / "results/flows-cpu.json"
PROJECT = Path(__file__).parents[1]
CHAINS, LENGTH = 5, 4
ROUNDS = 3
DVC = (sys.executable, "-m", "dvc")
FLOW = (sys.executable, "-m", "flows.pipeline")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.flows", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--project", type=Path, default=PROJECT, help="with nothing out of date")
    asked = parser.parse_args()
    rounds = asked.rounds
    with tempfile.TemporaryDirectory() as folder, own_server(Path(folder) / "home") as url:
        trivial = new_project(Path(folder) / "trivial")
        environment = {
            **os.environ,
            "PREFECT_API_URL": url,
            "PREFECT_HOME": f"{folder}/home",
            "PYTHONPATH": str(PROJECT),
            "DVC_NO_ANALYTICS": "1",
        }
        stages = least(
            {"dvc repro": (*DVC, "repro", "--quiet"), "flow": FLOW}, trivial, environment, rounds
        )
    nothing = least(
        {"dvc status": (*DVC, "status", "--quiet"), "flow": FLOW},
        asked.project,
        environment,
        rounds,
    )
    overhead = {
        kind: round((stages["flow"][kind] - stages["dvc repro"][kind]) / (CHAINS * LENGTH), 2)
        for kind in ("wall", "cpu")
    }
    result = {
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],  # beside which wall times say little
        "twenty stages, seconds": stages,
        "flow's overhead, seconds a stage": overhead,
        "nothing out of date, seconds": nothing,
    }
    OUT.write_text(json.dumps(result, indent=2) + "\n")
    print(OUT.read_text())


def new_project(directory: Path) -> Path:
    """Stages that copy a file, DVC's cache empty."""
    directory.mkdir()
    lines = ["stages:"]
    for chain in range(CHAINS):
        for link in range(LENGTH):
            source = f"{chain}-{link - 1}.txt" if link else "data.txt"
            target = f"{chain}-{link}.txt"
            lines += [
                f"  copy-{chain}-{link}:",
                f"    cmd: cp {source} {target}",
                f"    deps: [{source}]",
                f"    outs: [{target}]",
            ]
    (directory / "dvc.yaml").write_text("\n".join(lines) + "\n")
    (directory / "data.txt").write_text("data\n")
    for command in (["git", "init", "--quiet"], [*DVC, "init", "--quiet"]):
        subprocess.run(command, cwd=directory, check=True)
    return directory


def least(
    commands: Mapping[str, tuple[str, ...]],
    project: Path,
    environment: Mapping[str, str],
    rounds: int,
) -> dict[str, dict[str, float]]:
    """The least wall and CPU seconds of each command, which finds the project as it is."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for number in range(rounds):
        for name, command in commands.items():
            place = project
            if (project / "data.txt").exists():
                place = Path(shutil.copytree(project, project.parent / f"{name}-{number}"))
            found[name].append(timed_process(command, place, environment))
    return {
        name: {
            "wall": round(min(wall for wall, _ in times), 2),
            "cpu": round(min(cpu for _, cpu in times), 2),
        }
        for name, times in found.items()
    }


def timed_process(
    command: tuple[str, ...], folder: Path, environment: Mapping[str, str]
) -> tuple[float, float]:
    """Wall and CPU seconds of a process and all its children."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(command, cwd=folder, env=dict(environment), capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.monotonic() - started, cpu


if __name__ == "__main__":
    main()

"""The pipeline by one worker and by two: `python -m benchmarks.workers`.

The project as it is committed, from nothing: a clone for each worker, a bucket on the loopback for
what stages leave, and a Prefect server. Says how long each took, and of which stages dvc.lock came
back other than it is committed, which is what `dvc repro` on one machine left. What was measured
before of other numbers of workers is kept. Needs `tests/servers.lock`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from flows.graph import read_entries
from flows.server import own_server

OUT = Path(__file__).parent / "results/workers-cpu.json"
PROJECT = Path(__file__).parents[1]
PORT = 15017
FLOWS = (sys.executable, "-B", "-m")
COMMIT = ("-c", "user.name=prefopt", "-c", "user.email=prefopt@localhost", "commit", "--quiet")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.workers", description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 1])
    asked = parser.parse_args()
    found = json.loads(OUT.read_text())["workers"] if OUT.exists() else {}
    for number in asked.workers:
        with tempfile.TemporaryDirectory() as folder:
            found[str(number)] = measured(Path(folder), number)
        result = {"cores": os.cpu_count(), "workers": found}
        OUT.write_text(json.dumps(result, indent=2) + "\n")
    print(OUT.read_text())


def measured(folder: Path, number: int) -> dict[str, object]:
    """Seconds of a whole run by so many workers, and which entries of its dvc.lock are others."""
    with ExitStack() as stack:
        url = stack.enter_context(own_server(folder / "home"))
        environment = {
            **os.environ,
            "PREFECT_API_URL": url,
            "PREFECT_HOME": f"{folder}/home",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
            "AWS_ACCESS_KEY_ID": "x",
            "AWS_SECRET_ACCESS_KEY": "x",
            "PYTHONPATH": str(PROJECT),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
        }
        bucket = (sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(PORT))
        stack.enter_context(running(bucket, folder, environment))
        workspace = share(folder, environment)
        committed, lock = read_entries(workspace), workspace / "dvc.lock"
        before = lock.read_bytes()
        lock.unlink()
        git(workspace, "add", "--all")
        git(workspace, *COMMIT, "--message", "all of it is to be done")
        git(workspace, "push", "--quiet", "origin", "HEAD:main")
        subprocess.run([*FLOWS, "flows.cli", "deploy"], cwd=workspace, env=environment, check=True)
        for name in range(number):
            worker = [*FLOWS, "flows.cli", "worker", "cpu", "--clone", f"{folder}/clone-{name}"]
            stack.enter_context(running(worker, folder, environment))
        load, started = os.getloadavg()[0], time.monotonic()
        command = [*FLOWS, "flows.pipeline", "--pools", "--only", "cpu"]
        subprocess.run(command, cwd=workspace, env=environment, check=True)
        seconds = round(time.monotonic() - started)
        left = read_entries(workspace)
        other = sorted(n for n in left.keys() | committed.keys() if left.get(n) != committed.get(n))
        return {
            "seconds": seconds,
            "load before": load,
            "dvc.lock byte for byte": lock.read_bytes() == before,
            "its entries unlike the committed": other,
        }


def share(folder: Path, environment: Mapping[str, str]) -> Path:
    """A clone of the project whose origin and bucket workers can reach."""
    workspace, origin = folder / "workspace", folder / "origin"
    git(folder, "clone", "--quiet", str(PROJECT), str(workspace))
    git(workspace, "checkout", "--quiet", "-B", "main")
    git(folder, "init", "--quiet", "--bare", "--initial-branch=main", str(origin))
    git(workspace, "remote", "set-url", "origin", str(origin))
    address = f"http://127.0.0.1:{PORT}"
    create = urllib.request.Request(f"{address}/bucket", method="PUT")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + 60
    while True:
        try:
            opener.open(create).close()
            break
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
    for arguments in (
        ("remote", "add", "--default", "store", "s3://bucket/store"),
        ("remote", "modify", "store", "endpointurl", address),
    ):
        command = [sys.executable, "-m", "dvc", *arguments]
        subprocess.run(command, cwd=workspace, env=dict(environment), check=True)
    return workspace


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=folder, check=True)


@contextmanager
def running(
    command: Sequence[str], folder: Path, environment: Mapping[str, str]
) -> Generator[None, None, None]:
    """A program that is to run for the time being."""
    with open(folder / "programs.log", "ab") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=dict(environment), stdout=log, stderr=log
        )
        try:
            yield
        finally:
            process.terminate()
            process.wait()


if __name__ == "__main__":
    main()

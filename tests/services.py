"""Servers that tests start, on free ports of the loopback: PostgreSQL, S3, and those of a team."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from conftest import PROJECT

PASSWORD = "p%3A/canary-postgres"  # What addresses have to escape, it escapes.


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def process(
    command: list[str | Path], *, cwd: Path, log: Path, **options: object
) -> Iterator[subprocess.Popen[bytes]]:
    with open(log, "ab") as output:
        started = subprocess.Popen(
            command, cwd=cwd, stdout=output, stderr=output, start_new_session=True, **options
        )
    try:
        yield started
    finally:
        end(started)


def end(started: subprocess.Popen[bytes], number: int = signal.SIGTERM) -> None:
    """Signal a whole session, and wait for its leader."""
    with suppress(ProcessLookupError):
        os.killpg(started.pid, number)
    try:
        started.wait(15)
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGKILL)
        started.wait()


def python(*arguments: str) -> list[str]:
    return [sys.executable, "-B", *arguments]


def environment(**more: str) -> dict[str, str]:
    """Ours without any server's settings, with `more`."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("PREFECT_", "MLFLOW_", "AWS_"))
    }
    return kept | {"PYTHONPATH": str(PROJECT), "DO_NOT_TRACK": "true", **more}


def wait_until(condition: Callable[[], Any], seconds: float = 180) -> Any:
    """Wait for something true, and give it."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.2)
    return found


def await_answer(url: str, started: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a server answers, with whatever."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and started.poll() is None:
        try:
            opener.open(url, timeout=5).close()
            return
        except urllib.error.HTTPError as refused:
            refused.close()
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"{url} does not answer: {log.read_text()[-2000:]}")


@contextmanager
def postgres() -> Iterator[str]:
    """A PostgreSQL server with the databases `prefect` and `mlflow`; gives USER:PASSWORD@HOST."""
    # It refuses to run as root, and pytest's folders are closed to others.
    home = Path(tempfile.mkdtemp(prefix="postgres-", dir="/tmp"))
    user = {"user": "nobody"} if os.geteuid() == 0 else {}
    (home / "password").write_text(PASSWORD)
    if user:
        shutil.chown(home, "nobody")
        shutil.chown(home / "password", "nobody")
    programs = programs_of_postgres()
    data, port, log = home / "data", str(free_port()), home / "log"
    options = ["--auth", "scram-sha-256", "--pwfile", home / "password", "--no-sync"]
    command = [programs / "initdb", "-D", data, "-U", "team", *options]
    subprocess.run(command, cwd=home, check=True, capture_output=True, **user)
    command = [programs / "postgres", "-D", data, "-h", "127.0.0.1", "-p", port, "-k", home, "-F"]
    try:
        with process(command, cwd=home, log=log, **user):
            for name in ("prefect", "mlflow"):
                _create_database(name, port)
            yield f"team:{quote(PASSWORD, safe='')}@127.0.0.1:{port}"
    finally:
        shutil.rmtree(home)


def programs_of_postgres() -> Path:
    """Where `initdb` and `postgres` are: on the path, or where Debian hides them."""
    found = shutil.which("initdb")
    if found:
        return Path(found).parent
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    assert versions, "PostgreSQL's server is not installed: `apt-get install postgresql`"
    return versions[-1]


def _create_database(name: str, port: str) -> None:
    import psycopg2

    deadline = time.monotonic() + 60
    while True:
        try:
            connection = psycopg2.connect(
                host="127.0.0.1", port=port, user="team", password=PASSWORD, dbname="postgres"
            )
            break
        except psycopg2.OperationalError:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    connection.autocommit = True
    connection.cursor().execute(f"CREATE DATABASE {name}")
    connection.close()


@contextmanager
def s3(home: Path) -> Iterator[str]:
    """A server that speaks S3; gives its address. It takes any key."""
    port = free_port()
    command = python("-m", "moto.server", "-H", "127.0.0.1", "-p", str(port))
    with process(command, cwd=home, log=home / "s3.log", env=environment()) as started:
        url = f"http://127.0.0.1:{port}"
        await_answer(url, started, home / "s3.log")
        yield url

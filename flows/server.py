"""A Prefect server: the configured one, or one of our own that ends with us.

Our own is a real server with its records in `.prefopt/prefect`: Prefect's ephemeral mode failed
two of three starts on a busy machine. Nothing is sent to the outside.
"""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from flows.supervise import Supervisor

HOME = Path(".prefopt/prefect")
START_SECONDS = 180.0
QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "true",
    "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
}
# Flows go on while the server is away, and tell it afterwards: for four minutes, not for one.
PATIENT = {"PREFECT_CLIENT_MAX_RETRIES": "7"}
# Of a concurrency limit: in memory, a restart would lose who holds a place, and the place with it.
LEASES = {
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": (
        "prefect.server.concurrency.lease_storage.filesystem"
    )
}


@contextmanager
def connected() -> Generator[str, None, None]:
    """Speak to the server of PREFECT_API_URL or the profile, else to our own; gives its URL."""
    os.environ.update(QUIET | PATIENT)  # Prefect reads it when it is imported.
    from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL, temporary_settings

    configured = PREFECT_API_URL.value()
    if configured:
        yield configured
        return
    # Links lead to where its records are seen later: `PREFECT_HOME=... prefopt serve prefect`.
    later = {PREFECT_UI_URL: "http://127.0.0.1:4200"}
    with own_server(HOME) as url, temporary_settings({PREFECT_API_URL: url, **later}):
        try:
            yield url
        finally:
            _deliver()


@contextmanager
def own_server(home: Path, port: int = 0) -> Generator[str, None, None]:
    """Start a server on the loopback, and stop it at the end; gives its API's URL.

    Args:
        home: where it keeps its records and its log.
        port: 0 takes a free one.

    Raises:
        RuntimeError: if it does not come up.
    """
    home.mkdir(parents=True, exist_ok=True)
    port = port or _free_port()
    url = f"http://127.0.0.1:{port}/api"
    address = ["--host", "127.0.0.1", "--port", str(port)]
    command = [sys.executable, "-m", "prefect", "server", "start", *address]
    environment = {**os.environ, **QUIET, **LEASES, "PREFECT_HOME": str(home.resolve())}
    with Supervisor() as supervisor, open(home / "server.log", "wb") as log:
        server = supervisor.start(command, environment, log)
        _await_health(server, url, home / "server.log")
        yield url


def _deliver() -> None:
    """Send what Prefect has still to send; else it tries for a minute after the server's end."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    APILogWorker.instance().drain()
    EventsWorker.drain_all()


def _await_health(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    # A proxy of the environment is not to be asked for the loopback.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with opener.open(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.5)
    got = "no answer" if server.poll() is None else f"status {server.returncode}"
    raise RuntimeError(
        f"Prefect server: it did not come up in {START_SECONDS:.0f} s, got {got}; see {log}, "
        "or set PREFECT_API_URL to a server that runs"
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

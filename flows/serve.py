"""The stock servers with the settings that a team needs: `prefopt serve prefect`, `... mlflow`.

Serving is theirs. Ours is what they leave open: they listen on the loopback unless told otherwise,
are not told otherwise without a password, and have secrets from the environment or from files, so
that no list of processes shows one.
"""

import configparser
import ipaddress
import os
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from flows.server import QUIET

PORTS = {"prefect": 4200, "mlflow": 5000}
MIN_PASSWORD = 12  # characters, as MLflow demands

PREFECT_AUTH = "PREFECT_SERVER_API_AUTH_STRING"
MLFLOW_PASSWORD = "MLFLOW_AUTH_ADMIN_PASSWORD"
MLFLOW_DATABASE = "MLFLOW_BACKEND_STORE_URI"
MLFLOW_KEY = "MLFLOW_FLASK_SERVER_SECRET_KEY"
# Each may also be given as NAME_FILE, the path of a file that holds it.
SECRETS = (
    PREFECT_AUTH,
    "PREFECT_API_DATABASE_CONNECTION_URL",
    MLFLOW_PASSWORD,
    MLFLOW_DATABASE,
    MLFLOW_KEY,
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
)
# The default, in memory, forgets who holds a slot when the server restarts.
LEASES = "prefect.server.concurrency.lease_storage.filesystem"
PERMISSIONS = Path(".prefopt/mlflow/basic_auth.ini")


def serve(server: str, host: str, port: int | None) -> NoReturn:
    """Become the server.

    Raises:
        ValueError: if the settings are wrong, or others could reach it without a password.
    """
    if server not in PORTS:
        raise ValueError(f"serve: no such server, got '{server}'; {' or '.join(PORTS)}")
    settings = dict(os.environ) | read_secrets(os.environ) | QUIET
    number = str(port or PORTS[server])
    address = ["--host", host, "--port", number]
    if server == "prefect":
        # What notifications link to; elsewhere than on the loopback people know its name, not we.
        if _is_loopback(host):
            settings.setdefault("PREFECT_UI_URL", f"http://{host}:{number}")
        arguments, settings = ["server", "start"], _prefect(settings, host)
    else:
        # One process is enough for metrics that arrive in batches.
        arguments, settings = ["server", "--workers", "1"], _mlflow(settings, host)
        if MLFLOW_PASSWORD in settings:
            arguments += ["--app-name", "basic-auth"]
    os.execve(sys.executable, [sys.executable, "-m", server, *arguments, *address], settings)


def read_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """The secrets that the environment names a file for.

    Raises:
        ValueError: if one is given twice, or its file cannot be read.
    """
    found: dict[str, str] = {}
    for name in SECRETS:
        path = environment.get(f"{name}_FILE")
        if path is None:
            continue
        if name in environment:
            raise ValueError(f"{name}: given twice, got a value and '{path}'; unset one of them")
        try:
            found[name] = Path(path).read_text().strip()
        except OSError as error:
            raise ValueError(
                f"{name}_FILE: cannot be read, got '{path}' ({error.strerror}); "
                "name a file that holds the secret"
            ) from None
    return found


def _prefect(settings: dict[str, str], host: str) -> dict[str, str]:
    settings = settings | {"PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": LEASES}
    given = settings.get(PREFECT_AUTH)
    if given is None:
        _refuse_strangers(host, PREFECT_AUTH, "USER:PASSWORD")
        return settings
    _check_password(PREFECT_AUTH, given.partition(":")[2])
    return settings


def _mlflow(settings: dict[str, str], host: str) -> dict[str, str]:
    # Its job runner takes 2 GB and serves features that nothing here uses.
    settings = settings | {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        MLFLOW_DATABASE: settings.get(MLFLOW_DATABASE, "sqlite:///mlflow.db"),
    }
    password = settings.get(MLFLOW_PASSWORD)
    if password is None:
        _refuse_strangers(host, MLFLOW_PASSWORD, "PASSWORD")
        return settings
    _check_password(MLFLOW_PASSWORD, password)
    settings.setdefault(MLFLOW_KEY, secrets.token_hex(32))  # It signs forms, till a restart.
    if "MLFLOW_AUTH_CONFIG_PATH" not in settings:
        _write_permissions(settings[MLFLOW_DATABASE])
        settings["MLFLOW_AUTH_CONFIG_PATH"] = str(PERMISSIONS.resolve())
    return settings


def _refuse_strangers(host: str, secret: str, form: str) -> None:
    if not _is_loopback(host):
        raise ValueError(
            f"--host: others could reach it without a password, got '{host}'; set {secret} to "
            f"{form} (or {secret}_FILE to a file of it), or stay on 127.0.0.1"
        )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_password(name: str, password: str) -> None:
    if len(password) < MIN_PASSWORD:
        raise ValueError(
            f"{name}: too short a password, got {len(password)} characters; {MIN_PASSWORD} or more"
        )


def _write_permissions(database: str) -> None:
    """MLflow's own file of them: users, whom the administrator makes, read each other's runs."""
    PERMISSIONS.parent.mkdir(parents=True, exist_ok=True)
    content = configparser.ConfigParser(interpolation=None)
    content["mlflow"] = {
        "default_permission": "READ",
        "database_uri": database.replace("%", "%%"),  # MLflow interpolates.
        "admin_username": "admin",
        "authorization_function": "mlflow.server.auth:authenticate_request_basic_auth",
    }
    PERMISSIONS.unlink(missing_ok=True)
    # The address of a database holds its password.
    with open(os.open(PERMISSIONS, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600), "w") as file:
        content.write(file)

"""An audit as a flow, for a schedule: the deployment prefopt-audit/audit of prefect.yaml.

It waits until no run is at work in the workspace. Its findings are an artifact of the flow's run,
which fails unless all that was audited holds.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from prefect import flow, get_run_logger
from prefect.artifacts import create_table_artifact

from flows.locks import hold_workspace

PROJECT = Path(__file__).parents[1]
COLUMNS = ("severity", "artefact", "check", "expected", "found", "remedy")


class AuditError(Exception):
    """Something does not hold, or cannot be told."""


@flow(name="prefopt-audit", persist_result=False)
def audit_workspace(folder: str = str(PROJECT), target: str = "", deep: bool = False) -> None:
    """Audit a pipeline that lies on the worker's machine.

    Args:
        folder: of the pipeline; that of this code if none is given.
        target: as `prefopt audit` takes it; empty is everything.
        deep: read every byte again.

    Raises:
        AuditError: if something fails, cannot be told, or there is nothing to audit.
    """
    logger = get_run_logger()
    if not (Path(folder) / ".dvc").is_dir():
        raise AuditError(f"{folder}: no pipeline there, got a folder without .dvc; name its folder")
    command = [sys.executable, "-P", "-m", "flows.cli", "audit", target, "--json"]
    with hold_workspace(Path(folder), logger.info):
        done = subprocess.run(
            [*command, *(["--deep"] if deep else [])],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(PROJECT)},
            capture_output=True,
            text=True,
            check=False,
        )
    if not done.stdout:
        raise AuditError(done.stderr.strip())
    found = json.loads(done.stdout)
    findings = [{key: each[key] for key in COLUMNS} for each in found["findings"]]
    said = f"{len(found['stages'])} stages, {found['num_checks']} checks of {found['commit']}"
    create_table_artifact(findings, key="audit", description=said)
    logger.info(said)
    for each in findings:
        if each["severity"] != "note":
            logger.error("%(severity)s: %(artefact)s: %(check)s; %(remedy)s", each)
    if done.returncode:
        grave = [each for each in findings if each["severity"] != "note"]
        raise AuditError(f"{len(grave)} findings, the first of {grave[0]['artefact']}; {said}")

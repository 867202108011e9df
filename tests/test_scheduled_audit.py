"""A scheduled audit: its run ends as the audit does, and shows what was found."""

import json
import sys
from pathlib import Path

import test_audit
import yaml
from conftest import PROJECT
from test_audit import RANKED, Undo, flip
from test_flows import api, last_flow_run, run

project = test_audit.project
undo = test_audit.undo

CALL = """
import sys
from flows.scheduled_audit import audit_workspace
audit_workspace(sys.argv[1], target="train@ranked", return_state=True)
"""


def audited_by_flow(folder: Path, server: str, home: Path) -> tuple[str, list[dict[str, str]]]:
    """State of the flow's run, and the rows of its artifact."""
    done = run(
        home,
        *(sys.executable, "-c", CALL, str(folder)),
        PYTHONPATH=str(PROJECT),
        PREFECT_API_URL=server,
        PREFECT_HOME=str(home),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    last = last_flow_run(server, "prefopt-audit")
    of_run = {"flow_run_id": {"any_": [last["id"]]}, "key": {"any_": ["audit"]}}
    (artifact,) = api(server, "artifacts", artifacts=of_run)
    return last["state_type"], json.loads(artifact["data"])


def test_a_flow_fails_with_what_fails_and_lists_it(undo: Undo, server: str, tmp_path: Path) -> None:
    state, rows = audited_by_flow(Path.cwd(), server, tmp_path)
    assert state == "COMPLETED"
    assert {row["severity"] for row in rows} <= {"note"}
    flip(f"{RANKED}/model.safetensors")(undo)
    state, rows = audited_by_flow(Path.cwd(), server, tmp_path)
    assert state == "FAILED"
    artefacts = {row["artefact"]: row["remedy"] for row in rows if row["severity"] == "failed"}
    assert "dvc checkout" in artefacts[f"{RANKED}/model.safetensors"]


def test_the_deployment_is_this_flow_on_a_schedule() -> None:
    deployments = yaml.safe_load((PROJECT / "prefect.yaml").read_text())["deployments"]
    (found,) = (each for each in deployments if each["name"] == "audit")
    module, _, name = found["entrypoint"].rpartition(".")
    assert (PROJECT / f"{module.replace('.', '/')}.py").is_file()
    assert name == "audit_workspace"
    assert found["schedules"]
    assert found["concurrency_limit"] == 1

"""A whole round of retraining by the workers of the pools, its data by a server that speaks S3."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from forks import launched
from retraining import Project, never, preferences
from test_pipeline import git
from test_workers import server_of_s3

POOLS = ("cpu", "gpu", "api")


@pytest.fixture
def endpoint() -> Iterator[str]:
    """Of a bucket named `bucket`."""
    server = server_of_s3()
    server.start()
    try:
        url = "http://{}:{}".format(*server.get_host_and_port())
        httpx.put(f"{url}/bucket", trust_env=False).raise_for_status()
        yield url
    finally:
        server.stop()


@pytest.fixture
def project(server: str, tmp_path: Path) -> Iterator[Project]:
    with launched(tmp_path / "forks") as launcher:
        project = Project(tmp_path, server, launcher)
        project.environment |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
        yield project


def test_a_round_by_workers_is_kept_like_any_other(
    project: Project, endpoint: str, tmp_path: Path
) -> None:
    git(tmp_path, "init", "--quiet", "--bare", "origin")
    git(project.folder, "remote", "add", "origin", str(tmp_path / "origin"))
    remote = ("-m", "dvc", "remote")
    project.run(*remote, "add", "--quiet", "--default", "store", "s3://bucket/store")
    project.run(*remote, "modify", "store", "endpointurl", endpoint)
    project.set_retrain()  # Which commits the remote, too.
    git(project.folder, "push", "--quiet", "origin", "HEAD")
    project.offer("1.jsonl", preferences(0, 100, flipped=never))
    project.run("-m", "flows.cli", "deploy")
    with ExitStack() as stack:
        logs = [stack.enter_context(open(tmp_path / f"{pool}.log", "w+")) for pool in POOLS]
        for pool, log in zip(POOLS, logs, strict=True):
            worker = ("-m", "flows.cli", "worker", pool, "--clone", f"{tmp_path}/clone-{pool}")
            process = project.start(*worker, output=log)
            stack.callback(process.wait)
            stack.callback(process.terminate)
        try:
            said = project.run("-m", "flows.cli", "retrain", "--pools")
        except AssertionError as error:
            for log in logs:
                log.seek(0)
                error.add_note(log.read()[-8000:])
            raise
    assert said.splitlines()[-1] == "reviews version 2 is promoted"
    shown = {artifact["key"] for artifact in project.api("artifacts/filter")}
    assert {"results", "mlflow-runs", "retraining"} <= shown
    # Nothing was computed here; the branch and its data are where others look.
    assert not project.holds("train@dpo")
    tip = git(project.folder, "rev-parse", "retrain")
    assert git(tmp_path / "origin", "rev-parse", "retrain") == tip
    assert git(tmp_path / "origin", "for-each-ref", "refs/prefopt") == ""
    git(project.folder, "checkout", "--quiet", "retrain")
    project.run("-m", "dvc", "pull", "--quiet")
    project.run("-m", "flows.cli", "audit", "models:/reviews@champion")
    # One machine, which computes all of it again, leaves the lock that the workers left.
    lock = project.folder / "dvc.lock"
    left = lock.read_bytes()
    lock.unlink()
    project.run("-m", "dvc", "repro", "--quiet", "--no-run-cache", "--force")
    assert lock.read_bytes() == left

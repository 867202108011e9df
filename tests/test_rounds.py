"""Whole rounds of retraining.

They are real: model, text, judge, DVC, git, MLflow, Prefect's server and a worker.
"""

import hashlib
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forks import launched
from processes import wait_until
from retraining import Project, never, preferences, version, worktrees
from test_pipeline import git

from flows.clones import worktree
from stages import registry


@pytest.fixture
def project(server: str, tmp_path: Path) -> Iterator[Project]:
    with launched(tmp_path / "forks") as launcher:
        yield Project(tmp_path, server, launcher)


def test_rounds_promote_what_is_better_refuse_what_is_worse_and_stop_what_is_poisoned(
    project: Project,
) -> None:
    good = preferences(0, 200, flipped=never)
    project.offer("1.jsonl", good)
    lock = project.folder / ".prefopt/worktrees/round-of-retrain.lock"

    # Nobody was champion: the challenger is compared with SFT. Two rounds at once are refused.
    with project.start("-m", "flows.cli", "retrain") as first:
        wait_until(lambda: lock.exists() and "retrain" in worktrees(project.folder), 60)
        with (
            pytest.raises(ValueError, match="round-of-retrain: another run works there"),
            worktree(project.folder, "HEAD", "round-of-retrain"),
        ):
            pass
        said, _ = first.communicate()
    assert first.returncode == 0, said[-4000:]
    assert said.splitlines()[-1] == "reviews version 2 is promoted"
    assert project.aliases() == {"champion": "2", "previous": "1", "challenger": None}
    champion = project.held()["champion"]["tags"]
    locked = project.at("dvc.lock", champion["git.commit"])["stages"]["train@dpo"]["outs"]
    assert {"path": champion["dvc.path"], "md5": champion["dvc.md5"]}.items() <= next(
        out.items() for out in locked if out["path"] == "artefacts/models/dpo"
    )
    assert champion["prefopt.start"] == "sft"
    assert champion["prefopt.data"] == project.at("data/preferences.jsonl.dvc")["outs"][0]["md5"]
    assert not (project.folder / "mlruns").exists()  # No weights are copied.
    assert not (project.folder / "artefacts").exists()  # Nothing of it was done in the workspace.
    scored = project.scored()

    # New raters prefer the opposite. The challenger starts from the champion, and is worse.
    project.set_retrain(warm_start=True)
    project.offer("2.jsonl", preferences(200, 500, flipped=lambda _: True))
    said = project.retrain(status=1)
    assert said.startswith("reviews version 3 is refused: win rate above the champion's, by -0.")
    assert project.aliases() == {"champion": "2", "previous": "1", "challenger": "3"}
    challenger = project.held()["challenger"]["tags"]
    assert challenger["prefopt.start"] == champion["dvc.md5"]
    assert "not above 0" in challenger["prefopt.gate"]
    start = "data/models/champion"
    assert project.at("params.yaml")["runs"] == {
        "dpo": {"loss": "dpo", "beta": 0.1, "start": start},
        "champion": {"model": start},
    }
    assert project.at(f"{start}.dvc")["outs"][0]["md5"] == champion["dvc.md5"]
    assert len(project.scored()) > len(scored) > 100
    assert project.scored().items() >= scored.items()  # New prompts alone were scored.

    # Its lineage holds: from the registry's alias to the raw data.
    git(project.folder, "checkout", "--quiet", "retrain")
    project.run("-m", "dvc", "checkout", "--quiet")
    audited = project.run("-m", "flows.cli", "audit", "models:/reviews@challenger")
    assert f"read  {start.rpartition('/')[0]}" in audited
    git(project.folder, "checkout", "--quiet", "-")

    # A fifth of the accepted labels is flipped.
    (project.folder / "incoming/2.jsonl").unlink()
    project.offer("1.jsonl", preferences(0, 200, flipped=lambda number: number % 5 == 0))
    said = project.retrain(status=1)
    assert re.fullmatch(
        r"data \w+ are refused: share of pairs whose opposite is there too 0.2, not at most 0.01",
        said,
    )
    assert project.aliases() == {"champion": "2", "previous": "1", "challenger": "3"}
    # Asked again, it is refused again, and the branch has it once.
    tip = git(project.folder, "rev-parse", "retrain")
    assert project.retrain(status=1) == said
    assert git(project.folder, "rev-parse", "retrain") == tip
    # No link leads to a worktree that is gone.
    linked = [artifact["data"] for artifact in project.api("artifacts/filter")]
    assert not [link for link in linked if "worktrees" in str(link)]
    project.offer("1.jsonl", good)

    said = project.run("-m", "flows.cli", "rollback")
    assert said == "champion of reviews: version 1\n"
    assert project.aliases() == {"champion": "1", "previous": None, "challenger": "2"}


WATCH = """
from flows.retrain import watch
for _ in range(2):
    print(watch(return_state=True).message)
"""


def test_missed_rounds_are_caught_up_once_and_new_data_start_one(
    server: str, tmp_path: Path
) -> None:
    project = Project(tmp_path, server, "python -m")
    # A champion of these data and this code: a round that is played sees nothing new.
    project.offer("1.jsonl", preferences(0, 10, flipped=never))
    data = hashlib.md5((project.folder / "incoming/1.jsonl").read_bytes()).hexdigest()
    champion = version("dpo", data, "its model")
    champion["tags"]["prefopt.code"] = git(project.folder, "rev-parse", "HEAD^{tree}").strip()
    first = version("sft", "none", "sft")
    registry.decide(project.registry(), "reviews", challenger=champion, first=first, promote=True)

    deployed = project.deploy()
    assert deployed["parameters"]["root"] == str(project.folder)
    assert deployed["global_concurrency_limit"]["limit"] == 1
    assert deployed["concurrency_options"]["collision_strategy"] == "ENQUEUE"
    (schedule,) = deployed["schedules"]
    assert not schedule["active"]
    one = f"deployments/{deployed['id']}"
    project.api(f"{one}/schedules/{schedule['id']}", "PATCH", active=True)
    now = time.time()
    days = {"start_time": stamp(now - 3 * 86400), "end_time": stamp(now), "min_runs": 3}
    project.api(f"{one}/schedule", **days)
    project.api(f"{one}/schedules/{schedule['id']}", "PATCH", active=False)

    watched = project.run("-c", WATCH).splitlines()
    assert "new data: an event was emitted" in watched
    assert watched[-1] == "the source is as it was"

    def rounds() -> list[dict[str, Any]]:
        of = {"deployments": {"id": {"any_": [deployed["id"]]}}, "sort": "EXPECTED_START_TIME_ASC"}
        return [
            run for run in project.api("flow_runs/filter", **of)
            if run["auto_scheduled"] is False or run["expected_start_time"] < stamp(now)
        ]  # fmt: skip

    wait_until(lambda: any(not run["auto_scheduled"] for run in rounds()), 60)
    worker = project.start("-m", "flows.cli", "worker", "retrain")
    try:
        wait_until(lambda: all(run["state_type"] == "COMPLETED" for run in rounds()), 180)
    finally:
        worker.terminate()
        worker.communicate()
    missed = [run["state_name"] for run in rounds() if run["auto_scheduled"]]
    assert sorted(missed) == ["CaughtUp", "CaughtUp", "Skipped"]  # One looked, and saw no new data.
    (started,) = [run for run in rounds() if not run["auto_scheduled"]]
    assert (started["state_name"], started["created_by"]["type"]) == ("Skipped", "AUTOMATION")


def stamp(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))

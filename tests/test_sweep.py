"""A sweep writes rows, all or none, and DVC then computes what is new and nothing else."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import PROJECT
from typer.testing import CliRunner

from flows.cli import app
from stages.families import put, sweeps, without
from stages.params import Params, load_params
from stages.runs import check_runs

SHIPPED = (PROJECT / "params.yaml").read_text()


@pytest.fixture
def params(workplace: Path) -> Path:
    """The shipped params.yaml in a workplace of its own."""
    shutil.copy(PROJECT / "params.yaml", workplace)
    shutil.copy(PROJECT / "dvc.yaml", workplace)
    return workplace / "params.yaml"


def sweep(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["sweep", *arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def refused(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["sweep", *arguments])
    assert done.exit_code == 1
    return done.output.strip()


def test_rows_are_added_after_the_last_run_and_no_other_byte_changes(params: Path) -> None:
    printed = sweep("squared", "--beta", "0.01,3e-2", "--seed=1,2")
    assert "4 trainings written to params.yaml; 0 of the sweep were there." in printed
    lines = params.read_text().splitlines(keepends=True)
    new = [line for line in lines if line.startswith("  squared_beta")]
    assert new == [
        f"  squared_beta{word}_seed{seed}: "
        f"{{loss: f_dpo, beta: {beta}, divergence: squared_log, seed: {seed}}}\n"
        for word, beta in (("0p01", 0.01), ("0p03", 0.03))
        for seed in (1, 2)
    ]
    first = lines.index(new[0])
    assert lines[first : first + 4] == new
    assert lines[first - 1].startswith("  hinge: ")
    assert "".join(lines[:first] + lines[first + 4 :]) == SHIPPED
    check_runs(load_params())


def test_the_recipe_has_the_runs_that_its_commands_write(params: Path) -> None:
    text = (PROJECT / "recipes" / "frontier.yaml").read_text()
    recipe = yaml.safe_load(text)["runs"]
    params.write_text(SHIPPED.replace("\n  seed: 0\n", "\n  seed: 9\n"))  # so that all are new
    before = load_params().runs
    for command in re.findall("prefopt sweep (.*)", text):
        sweep(*command.split())
    written = {name: row for name, row in load_params().runs.items() if name not in before}
    assert written == recipe
    assert len(recipe) == 36


@pytest.mark.parametrize(
    "runs",
    [
        "runs:\n  dpo:\n    loss: dpo\n    beta: 0.1   # ours\n\n# of the next\n",
        "runs:   # ours\n    dpo: {loss: dpo,\n          beta: 0.1}\n",
    ],
)
@pytest.mark.parametrize("is_last", [False, True])
def test_however_the_runs_are_written_they_stay_so(params: Path, runs: str, is_last: bool) -> None:
    before, _, after = re.split(r"(runs:.*?\n\n)", SHIPPED, maxsplit=1, flags=re.DOTALL)
    text = before + after + runs.rstrip("\n") if is_last else before + runs + after
    params.write_text(text)
    sweep("dpo", "--beta", "0.3")
    assert list(load_params().runs) == ["dpo", "dpo_beta0p3"]
    left = re.sub(r"\n *dpo_beta0p3: .*", "", params.read_text())
    assert left.rstrip("\n") == text.rstrip("\n")


def test_a_dry_run_says_the_same_and_writes_nothing(params: Path) -> None:
    said = sweep("ipo", "--tau", "0.3,1", "--dry-run")
    assert params.read_text() == SHIPPED
    written = sweep("ipo", "--tau", "0.3,1")
    assert said.replace("would be written", "written to params.yaml") == written


def test_a_training_that_is_there_is_not_written_again_under_any_name(params: Path) -> None:
    """Else two records of one training would pass for two seeds."""
    printed = sweep("dpo", "--beta", "0.1,0.3", "--seed", "0,1")
    assert "dpo_beta0p1_seed0 is not written: run dpo is that training" in printed
    assert "3 trainings written" in printed
    text = params.read_text()
    assert "0 trainings written" in sweep("dpo", "--beta", "0.1,0.3", "--seed", "0,1")
    assert params.read_text() == text
    printed = sweep("dpo", "--beta", "0.3,1", "--seed", "1")
    assert "run dpo_beta0p3_seed1 is that training" in printed
    assert "1 training written" in printed


def test_places_within_a_row_can_be_varied_too() -> None:
    row = {"loss": "f_dpg", "target": {"reward": "vader", "beta": 0.1}}
    assert put(row, "target.beta", 0.3)["target"] == {"reward": "vader", "beta": 0.3}
    assert row["target"] == {"reward": "vader", "beta": 0.1}
    assert without(row, "target.beta", "seed", "none.such")["target"] == {"reward": "vader"}
    with pytest.raises(ValueError, match=r"loss\.x: nothing can stand in 'loss', got 'f_dpg'"):
        put(row, "loss.x", 1)


def test_the_runs_of_a_sweep_are_one_objective_by_strength(params: Path) -> None:
    sweep("dpo", "--beta", "0.3,0.01", "--seed", "0,1")
    found = sweeps(load_params().runs)
    assert found["dpo"] == {
        "beta 0.01": ["dpo_beta0p01_seed0", "dpo_beta0p01_seed1"],
        "beta 0.1": ["dpo"],
        "beta 0.3": ["dpo_beta0p3_seed0", "dpo_beta0p3_seed1"],
    }
    assert found["ipo"] == {"tau 0.1": ["ipo"]}
    assert found["f_dpo, divergence squared_log"] == {"beta 0.1": ["squared"]}
    assert len(found) == 8


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["dpoo", "--beta", "1"], "no such run or loss, got 'dpoo'"),
        (["dpo"], "nothing to vary, got no option"),
        (["dpo", "--beta"], "--beta: no values, got ''"),
        (["dpo", "0.1"], "a value without an option, got '0.1'"),
        (["--beta", "0.1", "dpo"], "a value without an option, got '0.1'"),
        (["dpo", "--beta", "0.1,0.10"], "--beta: a value twice, got 0.1"),
        (["dpo", "--beta", "1", "--beta", "2"], "--beta: given twice"),
        (["dpo", "--beta", "{a: 1"], "--beta: not valid YAML"),
        (["dpo", "--beta", "0.3,0"], "runs.dpo_beta0.beta: must be greater than 0, got 0"),
        (["dpo", "--beta", "0.3,.nan"], "runs.dpo_betanan.beta: must be a finite number"),
        (["dpo", "--bta", "1"], "no such parameter of 'dpo', got 1; it reads: beta, label_s"),
        (["dpo", "--seed", "1,-1"], "runs.dpo_seedm1.seed: must be greater than or equal to 0"),
        (["dpo", "--num-epochs", "1.5"], "num_epochs: must be a valid integer, got 1.5"),
        (["f_dpo", "--divergence", "total_variation", "--beta", "1"], "is not DPO-inducing"),
        (["dpo", "--lora", "{rank: 1},{Rank: 1}"], "runs.dpo_lora_rank_1: two rows of this sweep"),
    ],
)
def test_what_is_refused_is_said_and_nothing_is_written(
    params: Path, arguments: list[str], words: str
) -> None:
    assert words in refused(*arguments)
    assert params.read_text() == SHIPPED


def test_a_name_that_says_something_else_is_never_overwritten(params: Path) -> None:
    mine = "  dpo_beta0p3: {loss: dpo, beta: 0.3, label_smoothing: 0.2}   # mine\n"
    text = SHIPPED.replace("  hinge:", mine + "  hinge:")
    params.write_text(text)
    words = refused("dpo", "--beta", "0.2,0.3")
    assert words.startswith("runs.dpo_beta0p3: says something else already, got {'loss': 'dpo', ")
    assert params.read_text() == text
    params.write_text(re.sub(r"runs:.*?\n\n", "runs: {dpo: {loss: dpo, beta: 1}}\n", SHIPPED,
                             flags=re.DOTALL))  # fmt: skip
    assert "runs are written in braces" in refused("dpo", "--beta", "0.2")


def dvc(*arguments: str) -> str:
    environment = os.environ | {"DVC_NO_ANALYTICS": "1", "DO_NOT_TRACK": "true"}
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def outputs(stage: dict[str, Any], params: Params) -> list[str]:
    """The paths that a stage of dvc.yaml writes, its template unfolded."""
    of = stage.get("do", stage)
    paths = [
        next(iter(out)) if isinstance(out, dict) else out
        for kind in ("outs", "metrics", "plots")
        for out in of.get(kind, [])
    ]
    each: dict[str, Iterable[str]] = {
        "${runs}": params.runs,
        "${reward_models}": params.reward_models,
        "${evaluation.judges}": params.evaluation.judges,
    }
    keys = each.get(stage.get("foreach", ""), [""])
    return [re.sub(r"\$\{(key|item)\}", key, path) for key in keys for path in paths]


def test_after_a_sweep_dvc_runs_the_new_trainings_and_none_that_was_there(params: Path) -> None:
    for folder in ("data", "prefopt", "stages", "recipes"):
        shutil.copytree(PROJECT / folder, folder, ignore=shutil.ignore_patterns("__pycache__"))
    loaded = load_params()
    for stage in yaml.safe_load(Path("dvc.yaml").read_text())["stages"].values():
        for path in outputs(stage, loaded):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(f"stands for {path}\n")
    dvc("init", "--no-scm", "--quiet")
    dvc("commit", "--force", "--quiet")  # as if all of them had been run
    assert json.loads(dvc("status", "--json")) == {}
    printed = sweep("dpo", "--beta", "0.1,0.3", "--seed", "0,1")
    new = [name for name in load_params().runs if name not in loaded.runs]
    assert len(new) == 3
    # The check's output never changes, so that what reads it is not listed here and not run.
    outdated = set(json.loads(dvc("status", "--json")))
    of_each = {"train", "complete", "judge", "evaluate"}
    anew = {"check", "compare", "report"}
    assert outdated == anew | {f"{stage}@{run}" for stage in of_each for run in new}
    # And the command said so.
    (said,) = re.findall("of each new run: (.*)", printed)
    assert set(said.split(", ")) == of_each
    (said,) = re.findall("once again: (.*)", printed)
    assert set(said.split(", ")) == anew

"""Laws of tracking: MLflow hears of every training in the end, and no training waits for it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import PROJECT
from mlflow import MlflowClient
from mlflow.entities import Run

from prefopt.batches import Pairs, Scored
from stages import tracking
from stages.artefacts import LOGRATIOS_SCHEMA, digest, logratios_of, write_table
from stages.offline import pair_metrics
from stages.params import load_params
from stages.runs import bind
from stages.tracking import (
    DELIVERED,
    JOURNALS,
    deliver_all,
    track,
    track_comparison,
    track_evaluation,
)

LOGRATIOS = {f"logratios/{name}" for name in ("chosen", "rejected", "accuracies", "margins")}
TRL_NAMES = {
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
}
HEAD = {"recipe": "r", "params": {"beta": 0.1}, "datasets": {"pairs": "0" * 64}}


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables, made once because making them takes seconds."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(autouse=True)
def client(workplace: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    for key, value in tracking.ENVIRONMENT.items():
        monkeypatch.setenv(key, value)
    shutil.copy(empty_database, "mlflow.db")
    uri = f"sqlite:///{workplace}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    # A courier is a process of its own; one test lets it run.
    monkeypatch.setattr(tracking, "_start_courier", lambda: None)
    return MlflowClient(uri)


def runs_of(client: MlflowClient) -> list[Run]:
    experiment = client.get_experiment_by_name("r")
    return client.search_runs([experiment.experiment_id]) if experiment else []


def write_logratios(run: str = "dpo") -> None:
    logratios_of(run).parent.mkdir(parents=True, exist_ok=True)
    columns = {name: [1] for name in LOGRATIOS_SCHEMA.names}
    write_table(logratios_of(run), columns, LOGRATIOS_SCHEMA)


def train(run: str = "dpo", steps: int = 3) -> None:
    with track(run, **HEAD) as journal:
        for step in range(steps):
            journal.write({"step": step, "metrics": {"loss": 1.0 / (step + 1)}})


def test_a_finished_training_is_delivered_whole(client: MlflowClient) -> None:
    with track("dpo", **HEAD) as journal:
        pairs = Pairs(
            Scored(torch.tensor([-12.0]), torch.tensor([-12.5]), torch.tensor([10])),
            Scored(torch.tensor([-15.0]), torch.tensor([-14.0]), torch.tensor([12])),
            torch.ones(1),
        )
        run = bind(load_params(PROJECT / "params.yaml"), "dpo")
        metrics = pair_metrics(pairs, run, step_size=1)
        for step in range(5):
            journal.write({"step": step, "metrics": {"loss": float(step), **metrics}})
    assert deliver_all() == 0
    (run,) = runs_of(client)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "dpo"
    assert run.data.params == {"beta": "0.1"}
    assert set(run.data.metrics) == TRL_NAMES | LOGRATIOS | {"loss"}
    assert run.data.metrics["rewards/margins"] == pytest.approx(0.1 * 1.5)
    assert run.data.metrics["rewards/chosen"] == pytest.approx(0.1 * 0.5)
    assert run.data.metrics["logps/rejected"] == -15.0
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(step, float(step)) for step in range(5)]
    assert [d.dataset.name for d in run.inputs.dataset_inputs] == ["pairs"]
    assert {"git.commit", "git.dirty", "dvc.stage"} <= set(run.data.tags)
    assert [path.name for path in JOURNALS.glob("*.jsonl")] == []


def test_more_metrics_than_one_call_takes_are_delivered(client: MlflowClient) -> None:
    train(steps=tracking.BATCH + 1)
    deliver_all()
    (run,) = runs_of(client)
    assert len(client.get_metric_history(run.info.run_id, "loss")) == tracking.BATCH + 1


def test_a_training_that_raises_ends_as_failed(client: MlflowClient) -> None:
    with pytest.raises(FloatingPointError), track("dpo", **HEAD) as journal:
        journal.write({"step": 0, "metrics": {"loss": 1.0}})
        raise FloatingPointError
    deliver_all()
    (run,) = runs_of(client)
    assert run.info.status == "FAILED"
    assert run.data.metrics == {"loss": 1.0}


KILLED = """
import os, signal
from stages import tracking
tracking._start_courier = lambda: None
with tracking.track("dpo", recipe="r", params={}, datasets={}) as journal:
    journal.write({"step": 0, "metrics": {"loss": 1.0}})
    journal._file.write('{"step": 1, "metr')
    journal._file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-B", *arguments],
        env=os.environ | {"PYTHONPATH": str(PROJECT), **environment},
        capture_output=True,
    )


def test_a_training_that_was_sent_sigkill_ends_as_failed(client: MlflowClient) -> None:
    assert python("-c", KILLED).returncode == -signal.SIGKILL
    assert deliver_all() == 0
    (run,) = runs_of(client)
    assert run.info.status == "FAILED"
    assert run.data.metrics == {"loss": 1.0}


def test_a_training_under_way_is_delivered_as_far_as_it_came(client: MlflowClient) -> None:
    with track("dpo", **HEAD) as journal:
        journal.write({"step": 0, "metrics": {"loss": 1.0}})
        assert deliver_all() == 1
        (run,) = runs_of(client)
        assert run.info.status == "RUNNING"
        assert run.data.metrics == {"loss": 1.0}
        journal.write({"step": 1, "metrics": {"loss": 0.5}})
    assert deliver_all() == 0
    (run,) = runs_of(client)
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"loss": 0.5})


def test_delivering_twice_changes_nothing(client: MlflowClient) -> None:
    train()
    deliver_all()
    before = [run.to_dictionary() for run in runs_of(client)]
    (journal,) = DELIVERED.iterdir()
    journal.rename(JOURNALS / journal.name)
    deliver_all()
    assert [run.to_dictionary() for run in runs_of(client)] == before
    (run,) = runs_of(client)
    assert len(client.get_metric_history(run.info.run_id, "loss")) == 3


def test_two_trainings_of_one_run_are_two_records(client: MlflowClient) -> None:
    train()
    train()
    deliver_all()
    assert len(runs_of(client)) == 2


def test_an_unreachable_mlflow_keeps_the_journal_for_a_later_delivery(
    client: MlflowClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train()
    with monkeypatch.context() as unreachable:
        unreachable.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
        deliver_all()
    assert "was not delivered" in capsys.readouterr().err
    assert len(list(JOURNALS.glob("*.jsonl"))) == 1
    assert runs_of(client) == []
    deliver_all()
    assert [run.info.status for run in runs_of(client)] == ["FINISHED"]


def test_a_courier_stays_while_a_training_goes_on_that_it_cannot_deliver(
    client: MlflowClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with track("dpo", **HEAD) as journal, monkeypatch.context() as unreachable:
        journal.write({"step": 0, "metrics": {"loss": 1.0}})
        unreachable.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:1")
        assert deliver_all() == 1
    told = capsys.readouterr().err
    assert "127.0.0.1" in told
    assert "secret" not in told
    assert deliver_all() == 0
    assert [run.info.status for run in runs_of(client)] == ["FINISHED"]


def test_what_was_delivered_is_linked_with_the_flow_that_made_it(
    client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFOPT_FLOW_RUN_ID", "f")
    train()
    deliver_all()
    (run,) = runs_of(client)
    (line,) = tracking.LINKS.read_text().splitlines()
    assert json.loads(line) == {
        "run": "dpo",
        "flow_run": "f",
        "mlflow_run": run.info.run_id,
        "url": None,  # of a file, and of no server
    }


def evaluated_training(client: MlflowClient, *, delivered_before_publishing: bool) -> None:
    """As stages.train does it: outputs are published after the journal's end."""
    write_logratios("partial")
    with track("dpo", **HEAD) as journal:
        journal.write({"step": 0, "metrics": {"loss": 1.0}})
        journal.write({"logratios": digest(logratios_of("partial"))})
    if delivered_before_publishing:
        deliver_all()
    logratios_of("partial").rename(logratios_of("dpo"))
    track_evaluation("dpo", recipe="r", metrics={"win_rate/sft/vader/value": 0.6})
    deliver_all()


@pytest.mark.parametrize("delivered_before_publishing", [True, False])
def test_an_evaluation_lands_in_the_training_that_it_evaluates(
    client: MlflowClient, delivered_before_publishing: bool
) -> None:
    train("dpo")  # an earlier training, of other weights
    evaluated_training(client, delivered_before_publishing=delivered_before_publishing)
    newest, earlier = runs_of(client)
    assert newest.data.metrics == {"loss": 1.0, "win_rate/sft/vader/value": 0.6}
    assert "win_rate/sft/vader/value" not in earlier.data.metrics


def test_an_evaluation_without_its_training_makes_a_record_of_its_own(
    client: MlflowClient,
) -> None:
    write_logratios()
    track_evaluation("dpo", recipe="r", metrics={"kl": 0.5})
    deliver_all()
    (run,) = runs_of(client)
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"kl": 0.5})


def test_a_number_that_is_not_finite_is_refused_by_the_journal() -> None:
    with pytest.raises(ValueError, match="Out of range"), track("dpo", **HEAD) as journal:
        journal.write({"step": 0, "metrics": {"loss": float("nan")}})


TRAINS = """
from stages.tracking import track
with track("dpo", recipe="r", params={}, datasets={}) as journal:
    journal.write({"step": 0, "metrics": {"loss": 1.0}})
"""


def test_a_courier_delivers_beside_the_training_and_ends(client: MlflowClient) -> None:
    assert python("-c", TRAINS).returncode == 0
    deadline = time.monotonic() + 120
    while processes_in(Path.cwd()) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not processes_in(Path.cwd())
    (run,) = runs_of(client)
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"loss": 1.0})


def processes_in(folder: Path) -> list[str]:
    """Other processes whose working directory is `folder`."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and process.joinpath("cwd").readlink() == folder:
                found.append(process.name)
        except OSError:
            continue  # It has ended, or is another user's.
    return [number for number in found if int(number) != os.getpid()]


def test_a_curve_is_a_csv_file_and_a_journal(client: MlflowClient) -> None:
    with track("dpo", **HEAD) as journal, tracking.Curve(Path("c.csv"), "dpo", 2, journal) as curve:
        curve.log({"step": 0, "loss": 0.5, "rewards/margins": 0.25})
        curve.log({"step": 1, "loss": 0.25, "rewards/margins": 0.5})
    assert Path("c.csv").read_text() == "step,loss,rewards/margins\n0,0.5,0.25\n1,0.25,0.5\n"
    lines = [json.loads(line) for line in journal.path.read_text().splitlines()]
    assert [(event["step"], event["metrics"]) for event in lines[1:-1]] == [
        (0, {"loss": 0.5, "rewards/margins": 0.25}),
        (1, {"loss": 0.25, "rewards/margins": 0.5}),
    ]


def test_rates_go_to_the_bar_and_to_system_metrics_and_never_into_the_file(
    client: MlflowClient, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = {"tokens_per_second": 1234.5, "mfu": 0.25}
    with track("dpo", **HEAD) as journal, tracking.Curve(Path("c.csv"), "dpo", 2, journal) as curve:
        curve.log({"step": 0, "loss": 0.5}, rates)
        curve.log({"step": 1, "loss": 0.25}, rates)
    assert Path("c.csv").read_text() == "step,loss\n0,0.5\n1,0.25\n"
    assert "loss=0.2500, 1234 tokens/s, mfu=25%" in capsys.readouterr().err
    deliver_all()
    (run,) = runs_of(client)
    assert run.data.metrics == {
        "loss": 0.25,
        "system/tokens_per_second": 1234.5,
        "system/mfu": 0.25,
    }


def test_the_time_left_is_reckoned_from_steps_that_were_not_replayed() -> None:
    with tracking.Curve(Path("c.csv"), "dpo", 8) as curve:
        for step in range(4):
            curve.log({"step": step, "loss": 0.5})
        for step in range(4, 6):
            time.sleep(0.1)
            curve.log({"step": step, "loss": 0.5}, {"tokens_per_second": 1.0, "mfu": 0.1})
        shown = curve._bar.format_dict
    assert (shown["n"], shown["initial"]) == (6, 4)
    assert (shown["n"] - shown["initial"]) / shown["elapsed"] < 1 / 0.1


def test_a_curve_has_the_columns_of_looks_from_its_head_on(workplace: Path) -> None:
    with tracking.Curve(Path("c.csv"), "dpo", 4) as curve:
        for step in range(4):
            look = {"validation/loss": 0.75} if step in (1, 3) else {}
            curve.log({"step": step, "loss": 0.5, **look})
    assert Path("c.csv").read_text() == (
        "step,loss,validation/loss\n0,0.5,\n1,0.5,0.75\n2,0.5,\n3,0.5,0.75\n"
    )


def test_what_was_found_by_step_and_of_all_runs_together_is_delivered(client: MlflowClient) -> None:
    write_logratios()
    track_evaluation("dpo", recipe="r", metrics={"kl": 0.5}, by_step=[(9, {"looks/reward": 0.1})])
    track_comparison(recipe="r", metrics={"frontier/dpo/gain": 0.2}, files={"frontier.csv": "kl\n"})
    deliver_all()
    together, run = runs_of(client)
    (look,) = client.get_metric_history(run.info.run_id, "looks/reward")
    assert (look.step, look.value) == (9, 0.1)
    assert (together.info.run_name, together.data.metrics) == (
        "comparison",
        {"frontier/dpo/gain": 0.2},
    )
    path = client.download_artifacts(together.info.run_id, "frontier.csv")
    assert Path(path).read_text() == "kl\n"

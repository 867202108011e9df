"""A team's servers, all of them real: who may speak to them, and what a run leaves on them."""

import base64
import json
import os
import signal
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import services
import yaml
from conftest import PROJECT
from services import environment, python, wait_until

# Every secret has this word in it.
CANARY = "canary"
PREFECT_SECRET = "team:canary-of-prefect"
MLFLOW_PASSWORD = "canary-of-mlflow"
KEY = {
    "AWS_ACCESS_KEY_ID": "canary-of-s3",
    "AWS_SECRET_ACCESS_KEY": "canary-of-s3-too",
    "AWS_DEFAULT_REGION": "us-east-1",
}
STEPS = 40

DVC_YAML = """\
stages:
  train:
    cmd: python train.py
    deps: [train.py]
    outs: [artefacts/report]
"""

# A training that stands still at two steps until it is told to go on.
TRAIN = f"""\
import time
from pathlib import Path
from stages.tracking import Curve, track
head = dict(recipe="r", params={{"beta": 0.1}}, datasets={{"pairs": "0" * 64}})
with track("dpo", **head) as journal, Curve(Path("c.csv"), "train", {STEPS}, journal) as curve:
    for step in range({STEPS}):
        while step in (10, 20) and not Path(f"go-on-{{step}}").exists():
            time.sleep(0.05)
        curve.log({{"step": step, "loss": 1 / (step + 1)}}, {{"tokens_per_second": 1, "mfu": 0.1}})
        time.sleep(0.1)
report = Path("artefacts/report")
report.mkdir(parents=True)
(report / "results.md").write_text("| run | win rate |\\n| --- | --- |\\n| dpo | 0.9 |\\n")
(report / "index.html").write_text("<p>report</p>")
"""


def ask(url: str, secret: str = "", body: Any = None) -> tuple[int, str]:
    headers = {"Content-Type": "application/json"}
    if secret:
        headers["Authorization"] = "Basic " + base64.b64encode(secret.encode()).decode()
    request = urllib.request.Request(
        url, None if body is None else json.dumps(body).encode(), headers
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


@dataclass
class Team:
    """The servers of a team, and what has to be known to use them."""

    home: Path
    database: str
    s3: str
    ports: dict[str, int]
    started: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def prefect(self) -> str:
        return f"http://127.0.0.1:{self.ports['prefect']}/api"

    @property
    def mlflow(self) -> str:
        return f"http://127.0.0.1:{self.ports['mlflow']}"

    @property
    def client(self) -> dict[str, str]:
        """What a person has in the environment."""
        return environment(
            PREFECT_API_URL=self.prefect,
            PREFECT_API_AUTH_STRING=PREFECT_SECRET,
            PREFECT_HOME=str(self.home / "client"),
            MLFLOW_TRACKING_URI=self.mlflow,
            MLFLOW_TRACKING_USERNAME="admin",
            MLFLOW_TRACKING_PASSWORD=MLFLOW_PASSWORD,
        )

    def log(self, server: str) -> Path:
        return self.home / f"{server}.log"

    def start(self, server: str) -> None:
        own = {
            "prefect": {
                "PREFECT_SERVER_API_AUTH_STRING_FILE": str(self.home / "secret"),
                "PREFECT_API_DATABASE_CONNECTION_URL": (
                    f"postgresql+asyncpg://{self.database}/prefect"
                ),
                "PREFECT_HOME": str(self.home / "prefect"),
            },
            "mlflow": {
                "MLFLOW_AUTH_ADMIN_PASSWORD": MLFLOW_PASSWORD,
                "MLFLOW_BACKEND_STORE_URI": f"postgresql://{self.database}/mlflow",
                "MLFLOW_ARTIFACTS_DESTINATION": "s3://artefacts/mlflow",
                "MLFLOW_S3_ENDPOINT_URL": self.s3,
                **KEY,
            },
        }
        command = python("-m", "flows.cli", "serve", server, "--port", str(self.ports[server]))
        with open(self.log(server), "ab") as log:
            self.started[server] = subprocess.Popen(
                command,
                cwd=self.home,
                env=environment(**own[server]),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self, server: str) -> None:
        url = f"http://127.0.0.1:{self.ports[server]}/"
        services.await_answer(url, self.started[server], self.log(server))

    def records(self, what: str, **body: Any) -> list[dict[str, Any]]:
        """What Prefect has of something."""
        status, answer = ask(f"{self.prefect}/{what}/filter", PREFECT_SECRET, body)
        assert status == 200, answer
        return json.loads(answer)

    def trainings(self) -> list[dict[str, Any]]:
        """What MLflow has of the trainings."""
        runs = f"{self.mlflow}/api/2.0/mlflow/runs/search"
        status, answer = ask(runs, f"admin:{MLFLOW_PASSWORD}", {"experiment_ids": ["1"]})
        return json.loads(answer).get("runs", []) if status == 200 else []


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    import boto3

    home = tmp_path_factory.mktemp("team")
    (home / "secret").write_text(PREFECT_SECRET + "\n")
    with ExitStack() as running:
        database = running.enter_context(services.postgres())
        s3 = running.enter_context(services.s3(home))
        boto3.client("s3", endpoint_url=s3, **lower(KEY)).create_bucket(Bucket="artefacts")
        ports = {"prefect": services.free_port(), "mlflow": services.free_port()}
        team = Team(home, database, s3, ports)
        for server in ports:
            team.start(server)
            running.callback(lambda name: services.end(team.started[name], signal.SIGKILL), server)
        for server in ports:
            team.wait(server)
        yield team


def lower(key: dict[str, str]) -> dict[str, str]:
    return {
        "aws_access_key_id": key["AWS_ACCESS_KEY_ID"],
        "aws_secret_access_key": key["AWS_SECRET_ACCESS_KEY"],
        "region_name": key["AWS_DEFAULT_REGION"],
    }


@pytest.mark.parametrize(
    ("server", "path", "secret"),
    [
        ("prefect", "/api/version", PREFECT_SECRET),
        ("mlflow", "/api/2.0/mlflow/experiments/get?experiment_id=0", f"admin:{MLFLOW_PASSWORD}"),
    ],
)
def test_a_server_answers_those_who_have_its_password_and_no_others(
    team: Team, server: str, path: str, secret: str
) -> None:
    url = f"http://127.0.0.1:{team.ports[server]}{path}"
    assert ask(url)[0] == 401
    assert ask(url, f"{secret}x")[0] == 401
    assert ask(url + ("&x=/health" if "?" in url else "?x=/health"))[0] == 401
    assert ask(url, secret)[0] == 200


@pytest.mark.parametrize("server", ["prefect", "mlflow"])
def test_a_server_listens_on_the_loopback_alone(team: Team, server: str) -> None:
    port = f":{team.ports[server]:04X}"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening = [local for _, local, _, state, *_ in rows if state == "0A" and local.endswith(port)]
    assert listening == ["0100007F" + port]
    everywhere = [line for line in Path("/proc/net/tcp6").read_text().splitlines() if port in line]
    assert everywhere == []


@dataclass(frozen=True)
class Outcome:
    """What a run of the flow left, during whose training MLflow was killed and came back."""

    project: Path
    flow_run: dict[str, Any]
    artifacts: dict[str, dict[str, Any]]
    training: dict[str, Any]
    before: set[int]  # steps that MLflow had when it was killed
    said: str


@pytest.fixture(scope="module")
def outcome(team: Team, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    project = tmp_path_factory.mktemp("outcome") / "project"
    project.mkdir()
    (project / "dvc.yaml").write_text(DVC_YAML)
    (project / "train.py").write_text(TRAIN)
    (project / ".gitignore").write_text(".prefopt/\n")
    for command in (["git", "init", "--quiet"], python("-m", "dvc", "init", "--quiet")):
        subprocess.run(command, cwd=project, env=team.client, check=True, capture_output=True)
    with services.process(
        python("-m", "flows.pipeline"),
        cwd=project,
        log=project.parent / "flow.log",
        env=team.client,
    ) as flow:
        wait_until(lambda: any(metrics_of(one) for one in team.trainings()))
        wait_until(lambda: team.records("artifacts", artifacts={"type": {"any_": ["progress"]}}))
        before = set(steps_of(team, team.trainings()[0]))

        services.end(team.started["mlflow"], signal.SIGKILL)
        (project / "go-on-10").touch()
        courier = project / ".prefopt/tracking/courier.log"
        wait_until(lambda: "was not delivered" in courier.read_text())
        team.start("mlflow")
        team.wait("mlflow")
        (project / "go-on-20").touch()

        assert flow.wait(120) == 0, (project.parent / "flow.log").read_text()
    (flow_run,) = team.records("flow_runs")
    artifacts = {one["key"]: one for one in team.records("artifacts")}
    (training,) = team.trainings()
    said = "".join(path.read_text() for path in (courier, project.parent / "flow.log"))
    return Outcome(project, flow_run, artifacts, training, before, said)


def metrics_of(training: dict[str, Any]) -> list[dict[str, Any]]:
    return training["data"].get("metrics", [])


def steps_of(team: Team, training: dict[str, Any]) -> list[int]:
    run = training["info"]["run_id"]
    url = f"{team.mlflow}/api/2.0/mlflow/metrics/get-history?run_id={run}&metric_key=loss"
    answer = json.loads(ask(url, f"admin:{MLFLOW_PASSWORD}")[1])
    return [int(metric.get("step", 0)) for metric in answer["metrics"]]


def test_an_mlflow_that_was_killed_during_a_training_has_all_of_it_in_the_end(
    team: Team, outcome: Outcome
) -> None:
    assert outcome.before
    assert outcome.before < set(range(STEPS))
    assert sorted(steps_of(team, outcome.training)) == list(range(STEPS))
    assert outcome.training["info"]["status"] == "FINISHED"
    assert list((outcome.project / ".prefopt/tracking").glob("*.jsonl")) == []


def test_the_run_of_mlflow_names_the_runs_of_prefect(team: Team, outcome: Outcome) -> None:
    tags = {tag["key"]: tag["value"] for tag in outcome.training["data"]["tags"]}
    (task_run,) = team.records("task_runs")
    flow_run = outcome.flow_run["id"]
    ui = team.prefect.removesuffix("/api")
    assert tags["prefect.flow_run_id"] == flow_run
    assert tags["prefect.flow_run_url"] == f"{ui}/runs/flow-run/{flow_run}"
    assert tags["prefect.task_run_id"] == task_run["id"]
    assert tags["prefect.task_run_url"] == f"{ui}/runs/task-run/{task_run['id']}"


def test_the_run_of_prefect_links_to_results_report_and_mlflow(
    team: Team, outcome: Outcome
) -> None:
    shown = outcome.artifacts
    assert {one["flow_run_id"] for one in shown.values()} == {outcome.flow_run["id"]}
    assert "| dpo | 0.9 |" in shown["results"]["data"]
    report = (outcome.project / "artefacts/report/index.html").as_uri()
    assert f"]({report})" in shown["report"]["data"]
    info = outcome.training["info"]
    url = f"{team.mlflow}/#/experiments/{info['experiment_id']}/runs/{info['run_id']}"
    assert f"| dpo | [{info['run_id']}]({url}) |" in shown["mlflow-runs"]["data"]


def test_a_long_training_shows_its_progress(team: Team, outcome: Outcome) -> None:
    progress = outcome.artifacts["progress-train"]
    (task_run,) = team.records("task_runs")
    assert progress["task_run_id"] == task_run["id"]
    assert 0 < progress["data"] < 100
    assert progress["description"].startswith("train: step ")
    assert not (outcome.project / ".prefopt/progress/train.json").exists()


def test_what_is_logged_to_mlflow_as_a_file_lies_on_s3(team: Team, outcome: Outcome) -> None:
    import boto3

    run = outcome.training["info"]["run_id"]
    experiment = outcome.training["info"]["experiment_id"]
    path = f"{experiment}/{run}/artifacts/card.txt"
    request = urllib.request.Request(
        f"{team.mlflow}/api/2.0/mlflow-artifacts/artifacts/{path}", b"a card", method="PUT"
    )
    secret = base64.b64encode(f"admin:{MLFLOW_PASSWORD}".encode()).decode()
    request.add_header("Authorization", f"Basic {secret}")
    urllib.request.urlopen(request, timeout=30).close()
    bucket = boto3.client("s3", endpoint_url=team.s3, **lower(KEY))
    stored = bucket.get_object(Bucket="artefacts", Key=f"mlflow/{path}")
    assert stored["Body"].read() == b"a card"


def test_no_secret_is_in_what_a_run_leaves(team: Team, outcome: Outcome) -> None:
    # What is searched for is there to be found: it was used, and it is as it was given.
    assert CANARY in (team.home / "secret").read_text()
    files = [path for path in outcome.project.parent.rglob("*") if path.is_file()]
    files += [team.log("prefect"), team.log("mlflow")]
    assert len(files) > 10
    # MLflow's own file has the address of its database, for nobody else to read.
    assert (team.home / ".prefopt/mlflow/basic_auth.ini").stat().st_mode & 0o777 == 0o600
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []
    assert CANARY not in outcome.said
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            assert CANARY.encode() not in process.read_bytes()
        except OSError:
            continue  # It has ended.
    for database in ("prefect", "mlflow"):
        dumped = subprocess.run(
            ["pg_dump", f"postgresql://{team.database}/{database}"],
            env={**os.environ, "PATH": f"{services.programs_of_postgres()}:{os.environ['PATH']}"},
            capture_output=True,
            check=True,
        ).stdout
        assert b"dpo" in dumped or b"train" in dumped
        assert CANARY.encode() not in dumped


class Receiver(BaseHTTPRequestHandler):
    heard: list[tuple[str | None, Any]] = []  # noqa: RUF012

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.heard.append((self.headers["Content-Type"], json.loads(body)))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_a_webhook_hears_of_a_run_that_failed_and_of_no_other(team: Team) -> None:
    with HTTPServer(("127.0.0.1", 0), Receiver) as receiver:
        threading.Thread(target=receiver.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{receiver.server_address[1]}/canary-of-a-chat"
        for _ in range(2):  # The second time changes nothing.
            notify = subprocess.run(
                python("-m", "flows.cli", "notify"),
                env=team.client | {"PREFOPT_WEBHOOK_URL": url},
                capture_output=True,
                text=True,
            )
            assert notify.returncode == 0, notify.stderr
        (automation,) = team.records("automations")
        assert automation["name"] == "prefopt-failures"
        for name, state in [
            ("prefopt-pipeline", "COMPLETED"),
            ("another", "FAILED"),
            ("prefopt-pipeline", "FAILED"),
        ]:
            end_a_run(team, name, state)
        (heard,) = wait_until(lambda: list(Receiver.heard))
        receiver.shutdown()
    kind, message = heard
    assert kind == "application/json"
    assert 'prefopt-pipeline, run r: Failed. failed: "train@dpo" ' in message["text"]
    assert "/runs/flow-run/" in message["text"]


def end_a_run(team: Team, flow: str, state: str) -> None:
    """A run of a flow that ends in a state, as its server sees it."""

    def post(what: str, **body: Any) -> dict[str, Any]:
        status, answer = ask(f"{team.prefect}/{what}", PREFECT_SECRET, body)
        assert status in (200, 201), answer
        return json.loads(answer)

    flow_id = post("flows/", name=flow)["id"]
    run = post("flow_runs/", name="r", flow_id=flow_id, state={"type": "RUNNING"})["id"]
    ended = {"type": state, "name": state.capitalize(), "message": 'failed: "train@dpo"'}
    post(f"flow_runs/{run}/set_state", state=ended, force=True)


# Refusals, of which no server is started.


def serve(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        python("-m", "flows.cli", "serve", *arguments),
        env=environment(**settings),
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("arguments", "settings", "refusal"),
    [
        (("prefect", "--host", "0.0.0.0"), {}, "set PREFECT_SERVER_API_AUTH_STRING to"),
        (("mlflow", "--host", "::"), {}, "set MLFLOW_AUTH_ADMIN_PASSWORD to"),
        (("mlflow", "--host", "box.example"), {}, "got 'box.example'"),
        (("mlflow",), {"MLFLOW_AUTH_ADMIN_PASSWORD": "canary"}, "got 6 characters"),
        (("prefect",), {"PREFECT_SERVER_API_AUTH_STRING": "canary-without-user"}, "0 characters"),
        (("mlflow",), {"MLFLOW_AUTH_ADMIN_PASSWORD_FILE": "/nowhere"}, "'/nowhere'"),
        (
            ("mlflow",),
            {"MLFLOW_AUTH_ADMIN_PASSWORD_FILE": "a", "MLFLOW_AUTH_ADMIN_PASSWORD": "canary"},
            "given twice",
        ),
        (("dvc",), {}, "prefect or mlflow"),
    ],
)
def test_wrong_settings_are_refused_without_telling_the_secret(
    arguments: tuple[str, ...], settings: dict[str, str], refusal: str
) -> None:
    refused = serve(*arguments, **settings)
    assert refused.returncode == 1
    assert refusal in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert CANARY not in refused.stderr


def test_the_compose_file_has_no_secret_and_publishes_on_the_loopback_alone() -> None:
    compose = yaml.safe_load((PROJECT / "compose.yaml").read_text())
    published = [port for one in compose["services"].values() for port in one.get("ports", [])]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)
    for one in compose["services"].values():
        for name, value in one.get("environment", {}).items():
            secret = any(word in name for word in ("PASSWORD", "AUTH", "URI", "URL", "KEY"))
            assert not secret or value is None or value.startswith(("/run/secrets/", "${"))
    for secret in compose["secrets"].values():
        assert set(secret) == {"file"}

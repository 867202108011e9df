"""Retraining: what is pulled, what is refused, who is champion, and whole rounds of it.

The rounds are real: model, text, judge, DVC, git, MLflow, Prefect's server and a worker.
"""

import hashlib
import itertools
import os
import random
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import httpx
import pytest
import yaml
from conftest import PROJECT, shipped_params, write_jsonl
from forks import launched
from hub import hub
from processes import wait_until
from services import s3
from test_pipeline import copied, edit, git

from flows.clones import worktree
from stages import pull, registry
from stages.challenge import challenge
from stages.drift import drift, facts
from stages.existing import existing_policy
from stages.gate import bounds
from stages.params import Params
from stages.prepare import in_lasting_order
from stages.runs import bind, check_runs
from stages.sources import Text, read_sentences, read_texts

Row = dict[str, str]


def params_of(**changes: Any) -> Params:
    """The shipped ones, with some values set by their dotted names."""
    tree = shipped_params()
    for name, value in changes.items():
        *sections, key = name.split(".")
        node = tree
        for section in sections:
            node = node[section]
        node[key] = value
    return Params.model_validate(tree)


def pair(prompt: str, chosen: str, rejected: str) -> Text:
    return Text("", prompt, chosen, rejected)


# What it takes to be champion.

BETTER = {"value": 0.2, "corrected": 0.01}
METRICS = {"kl": 5.0, "length": 10.0, "displacement": {"chosen_fell": 0.2}}
CARD = {"agreement": {"low": 0.9}}
AGREEMENT = "low end of the agreement of vader with the labels"


def broken(
    pair: dict[str, float] = BETTER, ours: dict[str, Any] = METRICS, card: Any = CARD
) -> list[str]:
    found = bounds(pair, ours, METRICS, card, params_of().retrain.gate)
    return [bound.what for bound in found if not bound.holds]


def test_a_challenger_that_is_better_and_keeps_all_budgets_may_be_champion() -> None:
    assert broken() == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"pair": {"value": -0.2, "corrected": 0.01}}, "win rate above the champion's, by"),
        ({"pair": {"value": 0.2, "corrected": 0.06}}, "p of the paired test"),
        ({"ours": METRICS | {"kl": 31.0}}, "KL from SFT, nats a sequence"),
        ({"ours": METRICS | {"length": 12.6}}, "tokens for each of the champion's"),
        (
            {"ours": METRICS | {"displacement": {"chosen_fell": 0.26}}},
            "share of chosen texts that fell, more than under the champion",
        ),
        (
            {"card": {"agreement": {"low": 0.59}}},
            "low end of the agreement of vader with the labels",
        ),
        ({"card": {"agreement": None}}, AGREEMENT),
    ],
    ids=["worse", "unsure", "kl", "length", "displaced", "card", "nothing parsed"],
)
def test_each_bound_alone_keeps_the_champion(changed: dict[str, Any], said: str) -> None:
    assert broken(**changed) == [said]


def test_equal_runs_are_not_better() -> None:
    assert broken(pair={"value": 0.0, "corrected": 0.01}) == ["win rate above the champion's, by"]


# What is wrong with data.


def refused(new: list[Text], accepted: list[Text] | None) -> list[str]:
    measured = drift(
        facts(iter(new)),
        None if accepted is None else facts(iter(accepted)),
        params_of().retrain.drift,
    )
    return [bound.what for bound in measured if not bound.holds]


def alike(first: int, last: int, chosen: str = "good text") -> list[Text]:
    return [pair(f"prompt {number:03}", chosen, "bad text!") for number in range(first, last)]


ACCEPTED, MORE = alike(0, 100), alike(100, 150)
FLIPPED = [pair(f"prompt {number:03}", "bad text!", "good text") for number in (0, 149)]


def test_more_of_the_same_is_no_drift() -> None:
    assert refused(ACCEPTED + MORE, ACCEPTED) == []
    assert refused(ACCEPTED, None) == []


@pytest.mark.parametrize(
    ("new", "said"),
    [
        (ACCEPTED[:90], "rows for each accepted row"),
        (alike(0, 310), "rows for each accepted row"),
        (ACCEPTED + MORE[:1] * 12, "share of rows that are there already"),
        (
            ACCEPTED + alike(100, 110, "good text" * 9),
            "change of the mean characters of chosen texts",
        ),
        (ACCEPTED[1:] + MORE + FLIPPED, "share of pairs whose opposite is there too"),
    ],
    ids=["fewer", "too many", "duplicates", "longer", "contradicted"],
)
def test_each_kind_of_drift_is_seen_alone(new: list[Text], said: str) -> None:
    assert refused(new, ACCEPTED) == [said]


def test_a_bad_line_is_named_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "new.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "b"}\n')
    with pytest.raises(ValueError, match=r"new.jsonl:1: chosen and rejected are identical"):
        facts(read_texts(tmp_path / "new.jsonl", 4))


def test_what_was_trained_on_is_never_evaluated_on_while_data_grow() -> None:
    prompts = [f"prompt {number}" for number in range(300)]
    random.Random(0).shuffle(prompts)
    orders = [
        [prompts[row] for row in in_lasting_order(range(count), prompts, seed=3)]
        for count in (100, 180, 300)
    ]
    for earlier, later in itertools.pairwise(orders):
        assert not set(earlier[:-40]) & set(later[-40:])
        assert [prompt for prompt in later if prompt in earlier] == earlier
    assert orders[0] != sorted(orders[0])


# Where data come from.


def test_a_folder_is_pulled_whole_in_the_order_of_its_names(tmp_path: Path) -> None:
    source = tmp_path / "incoming"
    source.mkdir()
    (source / "b.jsonl").write_text('{"b": 1}')  # Without its newline.
    (source / "a.jsonl").write_text('{"a": 1}\n')
    (source / "notes.txt").write_text("no data")
    pull.pull("incoming", tmp_path, tmp_path / "data/new.jsonl")
    assert (tmp_path / "data/new.jsonl").read_text() == '{"a": 1}\n{"b": 1}\n'

    before = pull.state("incoming", tmp_path)
    assert pull.state("incoming", tmp_path) == before
    (source / "c.jsonl").write_text('{"c": 1}\n')
    assert pull.state("incoming", tmp_path) != before

    with pytest.raises(ValueError, match=r"no \*.jsonl there, got 'empty'"):
        pull.pull("empty", tmp_path, tmp_path / "new.jsonl")


def test_a_prefix_of_a_bucket_is_pulled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3(tmp_path) as url:
        for name in ("bucket", "bucket/new/1.jsonl", "bucket/old/0.jsonl"):
            data = b'{"prompt": "a"}\n' if "/" in name else b""
            httpx.put(f"{url}/{name}", content=data, trust_env=False).raise_for_status()
        for name, value in {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "x",
            "AWS_SECRET_ACCESS_KEY": "x",
            "NO_PROXY": "127.0.0.1",
        }.items():
            monkeypatch.setenv(name, value)
        before = pull.state("s3://bucket/new", tmp_path)
        pull.pull("s3://bucket/new", tmp_path, tmp_path / "new.jsonl")
    assert (tmp_path / "new.jsonl").read_text() == '{"prompt": "a"}\n'
    assert len(before) == 64


HUB = """
import sys
from pathlib import Path
from stages.pull import pull, state
source, to = sys.argv[1:]
pull(source, Path(), Path(to))
print(state(source, Path()))
"""


def test_a_data_set_of_the_hub_is_pulled_by_name_revision_and_split(tmp_path: Path) -> None:
    def pulled(source: str) -> tuple[str, str]:
        # Another process, because the hub's address is read when its client is imported.
        done = subprocess.run(
            [sys.executable, "-c", HUB, source, str(tmp_path / "new.jsonl")],
            env={
                **os.environ,
                "HF_ENDPOINT": held.url,
                "HF_HOME": str(tmp_path / "home"),
                "HF_HUB_OFFLINE": "0",
                "NO_PROXY": "127.0.0.1",
                "PYTHONPATH": str(PROJECT),
            },
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return (tmp_path / "new.jsonl").read_text(), done.stdout.strip()

    with hub("owner/name") as held:
        old, first = '{"prompt": "a"}\n', held.commit('{"prompt": "a"}\n')
        assert pulled("hub:owner/name") == (old, first)
        new, second = '{"prompt": "b"}\n', held.commit('{"prompt": "b"}\n')
        assert pulled("hub:owner/name:train") == (new, second)
        assert pulled(f"hub:owner/name@{first}:train") == (old, first)


# The round's parameters.


def test_a_round_has_two_runs_and_the_pulled_data() -> None:
    params = params_of(**{"data.split_by": "digest", "retrain.warm_start": True})
    row = {"loss": "dpo", "beta": 0.1}
    first = challenge(params, "artefacts/models/sft", "new.jsonl")
    assert first["data"] == {"source": "new.jsonl"}
    assert first["runs"] == {"dpo": row, "champion": {"model": "artefacts/models/sft"}}
    later = challenge(params, "data/models/champion", "new.jsonl")
    assert later["runs"]["dpo"] == row | {"start": "data/models/champion"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"retrain.run": "dpp"}, r"retrain.run: no run .* Did you mean 'dpo'\?"),
        ({"retrain.gate.judge": "gpt"}, "retrain.gate.judge: does not judge here, got 'gpt'"),
        ({"data.split_by": "shuffle"}, "data.split_by: the champion would be examined on prompts"),
    ],
    ids=["run", "judge", "splits"],
)
def test_a_round_that_could_compare_nothing_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    params = params_of(**{"data.split_by": "digest", **changes})
    with pytest.raises(ValueError, match=message):
        challenge(params, "data/models/champion", "new.jsonl")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"start": "data/models/a", "lora": {"rank": 2, "alpha": 4, "targets": "all-linear"}},
            "runs.dpo.start: is for runs that train all weights on labels",
        ),
        ({"start": "elsewhere"}, "runs.dpo.start: .*should match pattern.* got 'elsewhere'"),
    ],
    ids=["adapters", "not watched"],
)
def test_a_start_that_cannot_be_is_refused(row: dict[str, Any], message: str) -> None:
    params = params_of(runs={"dpo": {"loss": "dpo", "beta": 0.1, **row}})
    with pytest.raises(ValueError, match=message):
        bind(params, "dpo")


def test_a_policy_that_exists_is_no_training() -> None:
    there = {"model": "data/models/champion"}
    params = params_of(runs={"dpo": {"loss": "dpo", "beta": 0.1}, "champion": there})
    assert existing_policy(params, "champion") == there["model"]
    assert [run.written["loss"] for run in check_runs(params)] == ["dpo"]
    for row in (there | {"beta": 0.1}, {"model": "/elsewhere"}):
        with pytest.raises(ValueError, match=r"runs.champion\."):
            existing_policy(params_of(runs={"champion": row}), "champion")


# Who is champion.


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from mlflow import MlflowClient

    home = tmp_path_factory.mktemp("registry")
    return MlflowClient(f"sqlite:///{home}/mlflow.db", f"sqlite:///{home}/mlflow.db")


def version(run: str, data: str, md5: str) -> dict[str, Any]:
    tags = {"prefopt.run": run, "prefopt.data": data, "dvc.md5": md5}
    return {"source": f"dvc://project@{md5}:artefacts/models/{run}", "tags": tags}


@pytest.mark.usefixtures("workplace")
def test_champions_come_and_go_one_at_a_time(client: Any) -> None:
    def decide(data: str, *, promote: bool) -> dict[str, str]:
        challenger, first = version("dpo", data, f"of {data}"), version("sft", "none", "sft")
        registry.decide(client, "many", challenger=challenger, first=first, promote=promote)
        return registry.aliases(client, "many")

    assert decide("a", promote=False) == {"champion": "1", "challenger": "2"}
    assert decide("b", promote=True) == {"champion": "3", "previous": "1"}
    assert decide("b", promote=True) == {"champion": "3", "previous": "1"}  # Twice is once.
    assert decide("c", promote=True) == {"champion": "4", "previous": "3"}
    assert decide("d", promote=False) == {"champion": "4", "previous": "3", "challenger": "5"}
    assert registry.shown(client, "many")["champion"]["source"].startswith("dvc://")

    registry.roll_back(client, "many")
    assert registry.aliases(client, "many") == {"champion": "3", "previous": "1", "challenger": "4"}
    registry.roll_back(client, "many")
    assert registry.aliases(client, "many") == {"champion": "1", "challenger": "3"}
    with pytest.raises(ValueError, match="nobody was champion of 'many' before"):
        registry.roll_back(client, "many")


class Killed(BaseException):
    """In the place of SIGKILL: nothing in the process answers it."""


def killed_at(client: Any, write: int) -> Any:
    """The client, whose process dies before so many writes."""

    class Dying:
        writes = 0

        def __getattr__(self, name: str) -> Any:
            if name.startswith(("set_", "delete_")):
                if self.writes == write:
                    raise Killed
                self.writes += 1
            return getattr(client, name)

    return Dying()


@pytest.mark.parametrize("write", range(5))
@pytest.mark.usefixtures("workplace")
def test_a_kill_between_aliases_is_repaired_by_the_next_command(client: Any, write: int) -> None:
    name = f"killed{write}"
    client.create_registered_model(name)
    for md5 in "abc":
        client.create_model_version(name, f"dvc://{md5}")
    before = {"champion": "1", "challenger": "3"}
    registry.become(client, name, before)
    after = {"champion": "2", "previous": "1", "challenger": None}
    with pytest.raises(Killed):
        registry.become(killed_at(client, write), name, after)
    registry.repair(client, name)
    changed = {"champion": "2", "previous": "1"}
    assert registry.aliases(client, name) == (changed if write else before)
    assert client.get_registered_model(name).tags == {}


# Whole rounds.

SMALL: dict[str, Any] = {
    "data": {
        "num_train": None,
        "num_validation": 8,
        "num_test": 48,
        "split_by": "digest",
        "max_completion_tokens": 10,
    },
    "sft": {"num_epochs": 0},  # So that the reference stays what it is.
    "sample": {"num_prompts": 2, "num_completions": 2, "num_validation_prompts": 0},
    "label": {"method": "given"},
    "train": {"batch_size": 16, "learning_rate": 0.001, "num_epochs": 2},
    "watch": {"every": None},
    "runs": {"dpo": {"loss": "dpo", "beta": 0.1}},
    "exam": {"num_items": 60},
    "evaluation": {"num_resamples": 500, "judges": ["vader"]},
    "retrain": {"source": "incoming"},
}
GOOD = ["wonderful", "charming", "great", "brilliant", "beautiful", "delightful", "lovely"]
BAD = ["awful", "boring", "terrible", "dull", "horrible", "stupid", "ugly"]


def preferences(first: int, last: int, *, flipped: Callable[[int], bool]) -> list[Row]:
    """Pairs of prompts by their numbers; of those that are flipped the bad text is chosen."""
    found = list(dict.fromkeys(t.prompt for t in read_sentences(PROJECT / "data/reviews.json", 4)))
    draw = random.Random(first)
    rows: list[Row] = []
    for number in range(first, last):
        texts = [f" is {draw.choice(words)} and {draw.choice(words)} ." for words in (GOOD, BAD)]
        chosen, rejected = texts[::-1] if flipped(number) else texts
        rows.append({"prompt": found[number], "chosen": chosen, "rejected": rejected})
    return rows


class Project:
    """A project that is retrained, and the commands that a person gives there."""

    def __init__(self, folder: Path, server: str, launcher: str) -> None:
        self.folder = copied(folder / "project")
        self.server = server
        self.environment = {
            **{key: value for key, value in os.environ.items() if "PREFECT_" not in key},
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PREFECT_API_URL": server,
            "PREFECT_HOME": str(folder / "home"),
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "CUDA_VISIBLE_DEVICES": "0",  # A worker's GPU, whether or not there is one.
            "MLFLOW_TRACKING_URI": f"sqlite:///{self.folder}/mlflow.db",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(self.folder),  # As if it were installed, for the worker.
        }
        edit(self.folder, {key: value for key, value in SMALL.items() if key != "retrain"})
        pipeline = self.folder / "dvc.yaml"
        pipeline.write_text(pipeline.read_text().replace("python -m", launcher))
        (self.folder / "incoming").mkdir()
        self.set_retrain(source="incoming")

    def set_retrain(self, **changes: Any) -> None:
        """New parameters of `retrain`, committed."""
        params = yaml.safe_load((self.folder / "params.yaml").read_text())
        params["retrain"] |= changes
        params["retrain"]["gate"]["max_kl"] = 200.0
        edit(self.folder, {"retrain": params["retrain"]})
        git(self.folder, "add", "--update")
        git(self.folder, "-c", "user.name=t", "-c", "user.email=t@l", "commit", "-qm", "parameters")

    def offer(self, name: str, rows: list[Row]) -> None:
        """Put a file of preferences where the source is."""
        write_jsonl(self.folder / "incoming" / name, rows)

    def start(
        self, *command: str, output: int | IO[str] = subprocess.PIPE
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-B", *command],
            cwd=self.folder,
            env=self.environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *command: str, status: int = 0) -> str:
        """What a command says, which is to end with this status."""
        with self.start(*command) as process:
            said, _ = process.communicate()
        assert process.returncode == status, said[-4000:]
        return said

    def retrain(self, *, status: int = 0) -> str:
        """A round, and how it ended."""
        return self.run("-m", "flows.cli", "retrain", status=status).splitlines()[-1]

    def registry(self) -> Any:
        from mlflow import MlflowClient

        uri = self.environment["MLFLOW_TRACKING_URI"]
        return MlflowClient(uri, uri)

    def held(self) -> dict[str, Any]:
        """What the registry shows."""
        return registry.shown(self.registry(), "reviews")

    def aliases(self) -> dict[str, str | None]:
        held = self.held()
        return {name: held[name] and held[name]["version"] for name in registry.ALIASES}

    def at(self, path: str, revision: str = "retrain") -> Any:
        """A file of YAML at a revision."""
        return yaml.safe_load(git(self.folder, "show", f"{revision}:{path}"))

    def scored(self) -> dict[bytes, int]:
        """Prompts of the reference's store, and when each was written, as a number."""
        (file,) = (self.folder / ".prefopt/reference").glob("*.sqlite")
        with sqlite3.connect(file) as database:
            return dict(database.execute("SELECT digest, rowid FROM records"))

    def holds(self, stage: str) -> bool:
        """Whether DVC's cache here has all that a stage of the last round left."""
        cache = self.folder / ".dvc/cache/files/md5"
        digests = [out["md5"] for out in self.at("dvc.lock")["stages"][stage]["outs"]]
        return all((cache / digest[:2] / digest[2:]).exists() for digest in digests)

    def api(self, path: str, method: str = "POST", **body: Any) -> Any:
        answer = httpx.request(method, f"{self.server}/{path}", json=body, trust_env=False)
        answer.raise_for_status()
        return answer.json() if answer.content else None


def worktrees(project: Path) -> str:
    return git(project, "worktree", "list")


def never(_number: int) -> bool:
    return False


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
    project.offer("1.jsonl", good)

    said = project.run("-m", "flows.cli", "rollback")
    assert said == "champion of reviews: version 1\n"
    assert project.aliases() == {"champion": "1", "previous": None, "challenger": "2"}


POOLS = ("cpu", "gpu", "api")


def test_a_round_by_workers_is_kept_like_any_other(project: Project, tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet", "--bare", "origin")
    git(project.folder, "remote", "add", "origin", str(tmp_path / "origin"))
    project.run("-m", "dvc", "remote", "add", "--quiet", "--default", "store", f"{tmp_path}/store")
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
    # Nothing was computed here; the branch and its data are where others look.
    assert not project.holds("train@dpo")
    tip = git(project.folder, "rev-parse", "retrain")
    assert git(tmp_path / "origin", "rev-parse", "retrain") == tip
    assert git(tmp_path / "origin", "for-each-ref", "refs/prefopt") == ""
    git(project.folder, "checkout", "--quiet", "retrain")
    project.run("-m", "dvc", "pull", "--quiet")
    project.run("-m", "flows.cli", "audit", "models:/reviews@champion")


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

    project.run("-m", "flows.cli", "deploy")
    name = "deployments/name/prefopt-retrain/retrain"
    deployed = project.api(name, "GET")
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
    worker = project.start("-m", "flows.cli", "worker", "retrain", "--clone", "unused")
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

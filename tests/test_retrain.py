"""Retraining: what is pulled, what is refused, and who is champion."""

import itertools
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import PROJECT, shipped_params
from hub import hub
from retraining import version
from services import s3

from stages import pull, registry
from stages.challenge import challenge
from stages.drift import drift, facts
from stages.existing import existing_policy
from stages.gate import bounds
from stages.params import Params
from stages.prepare import in_lasting_order
from stages.runs import bind, check_runs
from stages.sources import Text, read_texts


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

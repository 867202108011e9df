"""Laws of judges: one form for all, over real HTTP where one is behind an address."""

import csv
import json
import math
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
from conftest import PROJECT, byte_tokenizer, llama, write_jsonl
from hostile import HOSTILE
from typer.testing import CliRunner

from flows.cli import app
from prefopt.judging import length_slope, wilson
from stages import exam
from stages.artefacts import (
    CANDIDATES,
    CANDIDATES_SCHEMA,
    COMPLETIONS,
    COMPLETIONS_SCHEMA,
    PAIRS,
    PAIRS_SCHEMA,
    PROMPTS,
    PROMPTS_SCHEMA,
    card_of,
    write_table,
)
from stages.cards import expenses_of
from stages.choice import Chooser, TooLong
from stages.judges import Asked, Comparison, Judgement, check_judge, load_judge, together
from stages.ledger import opened
from stages.params import load_params
from stages.questions import SCHEMA
from stages.rewards import Text, load_reward

Write = Callable[..., dict[str, Any]]
SHORT = "{prompt}\n{first}\n{second}\nA or B?\n"
TEXTS = [" is a great film .", " is a terrible mess .", " is a film .", " is a joy , a triumph ."]


@pytest.fixture
def folder(workplace: Path) -> Path:
    folder = Path("data/judges")
    folder.mkdir(parents=True)
    (folder / "short.txt").write_text(SHORT)
    copytree(PROJECT / "data" / "base", folder / "base")
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """`prefopt serve-judge data/base`: what it says when it is ready."""
    command = [sys.executable, "-B", "-m", "flows.cli", "serve-judge", "data/base", "--port", "0"]
    process = subprocess.Popen(
        command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    said = [process.stdout.readline() for _ in range(2)]
    yield dict(line.strip().split(": ", 1) for line in said)
    process.terminate()
    _, errors = process.communicate(timeout=30)
    assert process.poll() is not None
    assert "Traceback" not in errors


def comparisons(texts: list[str] = TEXTS) -> list[Comparison]:
    return [Comparison(n, "The movie", text, texts[n - 1], "sft") for n, text in enumerate(texts)]


def judged(name: str, found: list[Comparison]) -> list[Judgement]:
    return load_judge(load_params(), name, "dpo").judge(found)


def endpoint(server: dict[str, str], **changes: Any) -> dict[str, Any]:
    return {"kind": "endpoint", "template": "short", "max_calls": 1000} | server | changes


@pytest.mark.parametrize("name", ["vader", "textblob"])
def test_a_programmatic_judge_compares_the_rewards_of_whole_texts(
    write_params: Write, name: str
) -> None:
    write_params()
    reward = load_reward(load_params(), name)
    for each, judgement in zip(comparisons(), judged(name, comparisons()), strict=True):
        ours, theirs = reward(
            [Text("The movie", each.policy), Text("", "The movie" + each.opponent)]
        )
        assert (judgement.policy_reward, judgement.opponent_reward) == (ours, theirs)
        expected = "tie" if ours == theirs else "policy" if ours > theirs else "opponent"
        assert judgement.verdict == expected
        assert judgement.order_consistent


def test_a_model_over_http_says_what_it_says_at_home(
    write_params: Write, folder: Path, server: dict[str, str]
) -> None:
    local = {"kind": "local", "model": str(folder / "base"), "template": "short"}
    write_params(judges={"far": endpoint(server), "near": local})
    far, near = judged("far", comparisons()), judged("near", comparisons())
    assert list(map(repr, far)) == list(map(repr, near))  # NaN is not equal to itself
    for judgement in far:
        answer = json.loads(judgement.policy_first_reply)
        assert answer == {"reason": "", "verdict": answer["verdict"]}
    assert server["model"].startswith("base@")


def test_hostile_completions_are_answered_in_form_over_http(
    write_params: Write, folder: Path, server: dict[str, str]
) -> None:
    write_params(judges={"far": endpoint(server, concurrency=4)})
    found = [Comparison(n, "Go on.", text, "I see.", "sft") for n, text in enumerate(HOSTILE)]
    for judgement in judged("far", found):
        assert judgement.verdict in ("policy", "opponent", "tie", "unparsed")
        if judgement.verdict == "unparsed":
            said = judgement.policy_first_reply + judgement.opponent_first_reply
            assert "context" in said or "larger than" in said


def test_a_model_chooses_what_is_likelier_after_the_question(folder: Path) -> None:
    chooser = Chooser(str(folder / "base"), dtype="float32", num_threads=1)
    words = ["great", "zzzz"]
    schema = {"type": "object", "properties": {"word": {"type": "string", "enum": words}}}
    for order in (words, words[::-1]):
        schema["properties"]["word"]["enum"] = order
        reply = chooser.reply([("user", "The movie was")], schema)
        assert json.loads(reply.text) == {"word": "great"}


def test_what_a_message_says_is_never_a_control_token(base: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "<s>{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    )
    tokenizer.save_pretrained(base)
    llama(context=256).save_pretrained(base)
    from stages.choice import conversation

    tokens = conversation(tokenizer, [("user", "a</s><s><pad>b"), ("assistant", "</s>")])
    assert [token for token in tokens if token < 3] == [0, 1, 1]
    assert tokenizer.decode([t for t in tokens if t > 2]) == "user: a</s><s><pad>bassistant: </s>"


def test_a_question_longer_than_the_context_is_said_to_be(base: Path) -> None:
    chooser = Chooser(str(base), dtype="float32", num_threads=1)
    with pytest.raises(TooLong, match="at most 64"):
        chooser.reply([("user", "x" * 60)], SCHEMA)


@pytest.mark.parametrize(
    ("path", "body", "headers", "status"),
    [
        ("models", None, {"Host": "evil.example"}, 400),
        ("chat/completions", b"{}", {}, 400),
        ("chat/completions", b"[" * 100_000, {}, 400),
        ("chat/completions", b"x" * 4_000_001, {}, 413),
        ("chat/completions", b'{"model": "gpt-4", "messages": [{"role": "user", "content": ""}], '
         b'"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}', {}, 404),
        ("elsewhere", None, {}, 404),
    ],
    ids=["host", "empty", "deep", "large", "model", "path"],
)  # fmt: skip
def test_the_server_refuses_what_it_cannot_serve(
    server: dict[str, str], path: str, body: bytes | None, headers: dict[str, str], status: int
) -> None:
    address = f"{server['base_url']}/{path}"
    request = urllib.request.Request(address, body, headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with pytest.raises(urllib.error.HTTPError) as refusal:
        opener.open(request, timeout=30)
    assert refusal.value.code == status
    refusal.value.close()


def test_the_server_listens_on_the_loopback_alone(server: dict[str, str]) -> None:
    port = int(server["base_url"].split(":")[2].split("/")[0])
    listening = [
        line.split()[1]
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        if line.split()[3] == "0A"
    ]
    assert [address for address in listening if address.endswith(f":{port:04X}")] == [
        f"0100007F:{port:04X}"
    ]


def vote(folder: Path, rows: list[tuple[str, str, str]]) -> None:
    (folder / "votes").mkdir(exist_ok=True)
    with open(folder / "votes" / "dpo.csv", "w", newline="") as file:
        csv.writer(file).writerows([("prompt", "opponent", "verdict"), *rows])


def test_peoples_votes_are_matched_by_text_or_number_and_the_most_frequent_counts(
    write_params: Write, folder: Path
) -> None:
    vote(
        folder,
        [
            ("one", "sft", "policy"),
            ("0", "sft", "policy"),
            ("one", "sft", "opponent"),
            ("1", "gold", "policy"),
            ("two", "gold", "opponent"),
        ],
    )
    write_params(judges={"people": {"kind": "human", "votes": "data/judges/votes"}})
    found = [
        Comparison(0, "one", "a", "b", "sft"),
        Comparison(1, "two", "a", "b", "sft"),
        Comparison(1, "two", "a", "b", "gold"),
    ]
    assert [j.verdict for j in judged("people", found)] == ["policy", "missing", "tie"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("three", "sft", "policy"), "dpo.csv:2: a vote on nothing that is judged, got prompt 'th"),
        (("one", "gold", "policy"), "dpo.csv:2: a vote on nothing"),
        (("one", "sft", "A"), "dpo.csv:2: no verdict, got 'A'; write one of policy, opponent, tie"),
    ],
)
def test_a_vote_that_matches_nothing_is_refused_with_its_row(
    write_params: Write, folder: Path, row: tuple[str, str, str], message: str
) -> None:
    vote(folder, [row])
    write_params(judges={"people": {"kind": "human", "votes": "data/judges/votes"}})
    with pytest.raises(ValueError, match=re.escape(message)):
        judged("people", [Comparison(0, "one", "a", "b", "sft")])


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"kind": "oracle"}, "judges.x.kind: no such kind of judge, got 'oracle'; known: endpoint"),
        ({"kind": "human"}, "judges.x.votes: is missing"),
        ({"kind": "local", "model": "m", "template": "t", "beta": 1}, "judges.x.beta: no such key"),
        (
            {"kind": "endpoint", "model": "m", "template": "t"},
            "judges.x.max_calls: is missing",
        ),
    ],
)
def test_a_wrong_judge_is_refused_with_its_place(
    write_params: Write, declared: dict[str, Any], message: str
) -> None:
    write_params(judges={"x": declared})
    with pytest.raises(ValueError, match=re.escape(message)):
        load_params()


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"kind": "human", "votes": "elsewhere"}, "judges.x.votes: no folder within data/judges"),
        ({"kind": "human", "votes": "data/judges/../x"}, "judges.x.votes: no folder within"),
        (
            {"kind": "local", "model": "./m", "template": "short"},
            "judges.x.model: outside data/judges, got './m'",
        ),
        ({"kind": "local", "model": "o/m", "template": "none"}, "template: no data/judges/none"),
    ],
)
def test_what_dvc_does_not_watch_is_refused(
    write_params: Write, folder: Path, declared: dict[str, Any], message: str
) -> None:
    write_params(judges={"x": declared})
    with pytest.raises(ValueError, match=re.escape(message)):
        check_judge(load_params(), "x")


@pytest.mark.parametrize(
    "values",
    [
        {"api_key": "whatever"},
        {"model": "sk-proj-abcdefghijklmnopqrstuv"},
        {"base_url": "https://me:secret@example.com/v1"},
        {"key": "x"},
    ],
)
def test_a_secret_in_params_is_refused_and_not_shown(
    write_params: Write, values: dict[str, str]
) -> None:
    write_params(judges={"gpt": {"kind": "endpoint", **values}})
    with pytest.raises(ValueError, match="holds what looks like a secret") as refusal:
        load_params()
    assert not any(value in str(refusal.value) for value in values.values() if len(value) > 1)


def test_orders_that_disagree_are_a_tie_and_gaps_stay_gaps() -> None:
    assert together(["policy", "policy"]) == "policy"
    assert together(["policy", "opponent"]) == "tie"
    assert together(["policy"]) == "policy"
    assert together(["policy", "unparsed"]) == "unparsed"
    assert together(["unparsed", "refused"]) == "refused"
    assert together(["missing", "policy"]) == "missing"


# Report cards.


def item(label: int, first: str = "aa", second: str = "b") -> exam.Item:
    return exam.Item("p", first, second, label == 1)


def both(first: str, second: str) -> Judgement:
    return Judgement(together([first, second]), policy_first=first, opponent_first=second)


def test_a_card_counts_what_the_judge_said() -> None:
    items = [item(1), item(1), item(2), item(2), item(1), item(2)]
    said = [
        both("policy", "policy"),
        both("policy", "opponent"),  # what was shown first, twice
        both("opponent", "opponent"),
        both("policy", "policy"),
        both("unparsed", "policy"),
        both("refused", "refused"),
    ]
    found = exam.card(items, said)
    assert found["confusion"] == {
        "first": {"first": 1, "tie": 1, "unparsed": 1},
        "second": {"first": 1, "refused": 1, "second": 1},
    }
    assert found["agreement"]["value"] == (1 + 0.5 + 1 + 0) / 4
    assert found["flip_rate"]["value"] == 1 / 4
    # Of the items with a readable order: 1/2, 1, 1/2, 1/2, and the one whose other order was read.
    assert found["first_position"]["value"] == pytest.approx((0.5 + 1 + 0.5 + 0.5 + 0) / 5)
    assert found["unparsed_rate"] == found["refused_rate"] == round(1 / 6, 6)
    assert found["missing_rate"] == 0


def test_a_reward_has_no_orders_to_disagree_in() -> None:
    found = exam.card([item(1)], [Judgement("policy", 1.0, 0.0)])
    assert (found["flip_rate"], found["first_position"]) == (None, None)


def test_wilsons_interval_is_the_root_of_its_equation() -> None:
    for successes in (0, 3, 10):
        found = wilson(np.array([1.0] * successes + [0.0] * (10 - successes)), z=1.96)
        for bound in (found.low, found.high):
            error = (bound * (1 - bound) / 10) ** 0.5
            assert abs(found.value - bound) == pytest.approx(1.96 * error, abs=1e-9)


def test_the_length_slope_finds_what_made_the_outcomes() -> None:
    generator = np.random.default_rng(0)
    lengths = generator.integers(20, 400, (20_000, 2)).astype(float)
    labels = generator.integers(0, 2, 20_000).astype(float)
    ratio = np.log2((lengths[:, 0] + 1) / (lengths[:, 1] + 1))
    chance = 1 / (1 + np.exp(-(0.7 * ratio + 0.5 * (2 * labels - 1))))
    outcomes = (generator.random(20_000) < chance).astype(float)
    found = length_slope(outcomes, labels, *lengths.T)
    assert abs(found.value - 0.7) < 4 * found.standard_error < 0.1
    separated = length_slope((ratio > 0).astype(float), labels, *lengths.T)
    assert math.isfinite(separated.value)
    assert separated.value > 5


def test_the_pipelines_pairs_become_items_with_the_chosen_side_as_label(workplace: Path) -> None:
    table = {
        "split": ["train"], "text": ["The movie"], "tokens": [[7]], "gold": [" ok"],
        "gold_tokens": [[1]], "rejected": [""], "rejected_tokens": [[]],
    }  # fmt: skip
    Path("artefacts").mkdir()
    write_table(PROMPTS, table, PROMPTS_SCHEMA)
    texts = [" a", " b", " c"]
    candidates = {"prompt": [0] * 3, "text": texts, "tokens": [[10], [11], [12]]}
    write_table(CANDIDATES, candidates, CANDIDATES_SCHEMA)
    completions = {"prompt": [[7], [7], [7]], "completion": [[12], [10], [1]]}
    write_table(COMPLETIONS, completions, COMPLETIONS_SCHEMA)
    pairs = {
        "split": ["train", "train"], "chosen": [0, 2], "rejected": [1, 0], "preference": [1.0, 1.0]
    }  # fmt: skip
    write_table(PAIRS, pairs, PAIRS_SCHEMA)
    for each, (better, worse) in zip(
        exam.pairs_as_items(), [(" c", " a"), (" ok", " c")], strict=True
    ):
        assert each.prompt == "The movie"
        sides = (each.first, each.second) if each.first_is_better else (each.second, each.first)
        assert sides == (better, worse)


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv"])
def test_labelled_items_are_read_from_files_of_people(workplace: Path, suffix: str) -> None:
    rows = [
        {"input": "p", "output_1": "a", "output_2": "b", "label": 2},
        {"input": "q", "output_1": "c", "output_2": "d", "label": 1},
    ]
    path = Path(f"items.{suffix}")
    match suffix:
        case "json":
            path.write_text(json.dumps(rows))
        case "jsonl":
            write_jsonl(path, rows)
        case _:
            with open(path, "w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
    assert list(exam.read_items(str(path))) == [
        exam.Item("p", "a", "b", False),
        exam.Item("q", "c", "d", True),
    ]


def test_chosen_and_rejected_come_first_about_equally_often(workplace: Path) -> None:
    rows = [{"prompt": f"{n}", "chosen": "good", "rejected": "bad"} for n in range(200)]
    write_jsonl(Path("pairs.jsonl"), rows)
    items = list(exam.read_items("pairs.jsonl"))
    assert all((each.first == "good") == each.first_is_better for each in items)
    assert 70 < sum(each.first_is_better for each in items) < 130


def test_a_row_that_is_no_item_is_refused_with_its_number(workplace: Path) -> None:
    write_jsonl(Path("x.jsonl"), [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p"}])
    with pytest.raises(ValueError, match=r"x\.jsonl: row 2 is no item, got \['prompt'\]"):
        list(exam.read_items("x.jsonl"))


def test_labelled_items_are_read_from_the_hub_by_name_and_split(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", workplace / "cache")
    rows = [{"prompt": "p", "output_1": "a", "output_2": "b", "label": 2}]
    other = [{"prompt": "q", "output_1": "c", "output_2": "d", "label": 1}]
    Path("someone").mkdir()
    write_jsonl(Path("someone/test.jsonl"), rows)
    write_jsonl(Path("someone/train.jsonl"), other)
    assert list(exam.read_items("hub:./someone")) == [exam.Item("p", "a", "b", False)]
    assert list(exam.read_items("hub:./someone:train")) == [exam.Item("q", "c", "d", True)]
    write_jsonl(Path("someone/test.jsonl"), [*rows, {"prompt": "p"}])
    with pytest.raises(ValueError, match=r"hub:\./someone: row 2 is no item"):
        list(exam.read_items("hub:./someone"))


def test_a_local_judges_card_over_labelled_items(write_params: Write, folder: Path) -> None:
    local = {"kind": "local", "model": str(folder / "base"), "template": "short"}
    write_params(judges={"near": local})
    items = [exam.Item("The movie", text, TEXTS[n - 1], n % 2 == 0) for n, text in enumerate(TEXTS)]
    found = exam.examined(load_params(), "near", items, "items")
    assert sum(sum(counts.values()) for counts in found["confusion"].values()) == 4
    assert found["identity"]["model"].startswith("base@")
    took = json.loads(expenses_of("near").read_text())
    assert took["calls"] == 8
    judge = load_judge(load_params(), "near", "exam")
    assert isinstance(judge, Asked)
    again = exam.examined(load_params(), "near", items, "items")
    assert again == found
    with opened(judge.respondent.identity) as book:
        assert book.calls == 8


def test_the_command_prints_cards_with_what_the_exams_took(
    write_params: Write, folder: Path, server: dict[str, str]
) -> None:
    priced = endpoint(server, cost={"input": 2.0, "output": 8.0, "max": 1.0})
    write_params(judges={"far": priced}, **{"evaluation.judges": ["vader", "far", "textblob"]})
    params = load_params()
    items = [exam.Item("The movie", text, TEXTS[n - 1], n % 2 == 0) for n, text in enumerate(TEXTS)]
    card_of("far").parent.mkdir(parents=True)
    for judge in ("far", "textblob"):
        found = exam.examined(params, judge, items, "items.csv")
        card_of(judge).write_text(exam.as_json(found))
    took = json.loads(expenses_of("far").read_text())
    said = CliRunner().invoke(app, ["judges"]).stdout
    estimates, cards = said.split("\n\n")
    assert [line.split(":")[0] for line in estimates.splitlines()] == ["vader", "far", "textblob"]
    far, findings, cost, *textblob = cards.splitlines()
    assert far == "far, examined on 4 items of items.csv:"
    for part in ("agreement 0.", "flips ", "first position ", "length slope ", "no verdict 0.0%"):
        assert part in findings
    assert f"median {took['seconds_a_call']['median']:.3g} s a verdict" in cost
    assert cost.endswith(f"; 8 calls, {took['cost']:.4f} paid")
    assert took["cost"] > 0
    assert "flips none; first position none" in textblob[1]
    assert textblob[2].endswith(" s an item")
    expenses_of("textblob").unlink()
    assert "because the exam ran elsewhere" in CliRunner().invoke(app, ["judges"]).stdout


def test_without_exams_the_command_prints_no_cards(write_params: Write) -> None:
    write_params()
    said = CliRunner().invoke(app, ["judges"]).stdout
    assert said == "vader: a reward, costs no calls\ntextblob: a reward, costs no calls\n"

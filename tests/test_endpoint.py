"""Laws of judges behind an address: nothing lost, asked twice, overspent or given away."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT
from faulty import (
    FAULTS,
    Endpoint,
    always,
    asked,
    at_first,
    comparisons,
    expected,
    served,
    settings,
    thirty_percent,
    well,
)

from stages import endpoint as endpoints
from stages.endpoint import retry_after
from stages.judges import Comparison, Judgement, estimate
from stages.ledger import opened
from stages.questions import load_template

TEMPLATE = "{prompt}\n{first}\n{second}\n"
CANARY = "sk-CANARY0123456789abcdef"


@pytest.fixture(autouse=True)
def place(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(endpoints, "FIRST_PAUSE", 0.001)
    Path("data/judges").mkdir(parents=True)
    Path("data/judges/short.txt").write_text(TEMPLATE)
    return workplace


def verdicts(judgements: list[Judgement]) -> list[str]:
    return [judgement.verdict for judgement in judgements]


def test_both_orders_are_asked_once_in_the_form_and_never_again() -> None:
    with served(always("slow")) as server:
        judgements = asked(server, concurrency=3).judge(comparisons(20))
        assert verdicts(judgements) == expected(20)
        assert all(judgement.order_consistent for judgement in judgements)
        assert json.loads(judgements[0].policy_first_reply)["reason"] == "so"
        assert len(server.asked) == len(set(server.asked)) == 40
        assert 1 < server.most_at_once <= 3
        body = server.bodies[0]
        assert body["temperature"] == 0
        assert body["response_format"]["json_schema"]["strict"] is True
        again = asked(server).judge(comparisons(21))
        assert verdicts(again) == expected(21)
        assert len(server.asked) == 42


def test_identical_completions_are_a_tie_without_asking() -> None:
    with served(well) as server:
        same = Comparison(0, "prompt", "same", "same", "sft")
        (judgement,) = asked(server).judge([same])
        assert (judgement.verdict, len(server.asked)) == ("tie", 0)


def test_one_order_costs_half_and_puts_each_side_first_in_turn() -> None:
    with served(well) as server:
        judgements = asked(server, orders="one").judge(comparisons(40))
        assert verdicts(judgements) == expected(40)
        assert len(server.asked) == 40
        first = sum(bool(judgement.policy_first) for judgement in judgements)
        assert 10 < first < 30


@pytest.mark.parametrize(
    "changed", [{"model": "gpt-4.1-2026-01-01"}, {"temperature": None}, {"max_tokens": 99}]
)
def test_another_model_or_form_is_asked_anew(changed: dict[str, Any]) -> None:
    with served(well) as server:
        asked(server).judge(comparisons(2))
        asked(server, **changed).judge(comparisons(2))
        assert len(server.asked) == 8


def test_another_template_is_asked_anew() -> None:
    with served(well) as server:
        asked(server).judge(comparisons(2))
        Path("data/judges/short.txt").write_text("Compare.\n" + TEMPLATE)
        asked(server).judge(comparisons(2))
        assert len(server.asked) == 8


@pytest.mark.parametrize("fault", [fault for fault, _ in FAULTS])
def test_every_fault_is_tried_again_until_there_is_an_answer(fault: str) -> None:
    with served(at_first(fault, times=2)) as server:
        timeout = 0.5 if fault == "hang" else 5.0
        judgements = asked(server, timeout=timeout).judge(comparisons(3))
        assert verdicts(judgements) == expected(3)
        assert len(server.asked) == 18


@pytest.mark.parametrize(
    ("fault", "verdict", "words"),
    [
        ("garbage", "unparsed", "I prefer A"),
        ("null", "unparsed", ""),
        ("refusal", "refused", "I cannot judge this."),
        ("too long", "unparsed", "context_length_exceeded"),
    ],
)
def test_a_reply_that_is_no_verdict_is_a_verdict_of_its_own_kind_and_asked_again_next_time(
    fault: str, verdict: str, words: str
) -> None:
    with served(always(fault)) as server:
        (judgement,) = asked(server).judge(comparisons(1))
        assert judgement.verdict == judgement.policy_first == judgement.opponent_first == verdict
        assert words in judgement.policy_first_reply
        assert len(server.asked) == 2 * endpoints.READINGS
        server.fault = well
        assert verdicts(asked(server).judge(comparisons(1))) == expected(1)


@pytest.mark.parametrize("status", ["401", "404", "400", "307"])
def test_a_refused_request_stops_at_once(status: str) -> None:
    with served(always(status)) as server:
        with pytest.raises(ValueError, match=f"refuses, got status {status}"):
            asked(server, concurrency=1).judge(comparisons(5))
        assert len(server.asked) == 1


def test_an_endpoint_that_never_works_ends_the_stage_and_loses_nothing() -> None:
    with served(always("500")) as server:
        with pytest.raises(ValueError, match="the endpoint fails, got 'status 500' after 12"):
            asked(server, concurrency=1).judge(comparisons(5))
        server.fault = well
        assert verdicts(asked(server).judge(comparisons(5))) == expected(5)


def test_an_endpoint_without_response_format_is_asked_without_and_read_as_strictly() -> None:
    with served(always("no form")) as server:
        with pytest.warns(UserWarning, match="does not know response_format"):
            judgements = asked(server, concurrency=1).judge(comparisons(3))
        assert verdicts(judgements) == expected(3)
        assert len(server.asked) == 7


def test_a_judge_that_goes_by_the_place_makes_only_ties_and_says_so() -> None:
    with served(well) as server:
        # Both texts look alike to the endpoint, whose verdict then hangs on the place alone.
        judge = asked(server)
        twins = [Comparison(n, "p", f"\u200b{n}", f"\\u{{200b}}{n}", "sft") for n in range(5)]
        judgements = judge.judge(twins)
        assert verdicts(judgements) == ["tie"] * 5
        assert not any(judgement.order_consistent for judgement in judgements)
        assert {j.policy_first for j in judgements} == {"opponent"}


def test_the_budget_of_calls_is_kept_to_the_call_and_gaps_are_missing() -> None:
    with served(at_first("garbage")) as server:
        judgements = asked(server, max_calls=60).judge(comparisons(20))
        assert len(server.asked) == 60
        counts = Counter(verdicts(judgements))
        assert set(counts) == {"policy", "opponent", "missing"} or "unparsed" in counts
        gaps = sum(counts[gap] for gap in ("missing", "unparsed"))
        assert 0 < gaps < 20
        for judgement, right in zip(judgements, expected(20), strict=True):
            assert judgement.verdict in (right, "missing", "unparsed")
        more = asked(server, max_calls=200).judge(comparisons(20))
        assert verdicts(more) == expected(20)
        assert len(server.asked) <= 120


def test_what_the_budget_will_not_finish_is_refused_before_any_call() -> None:
    cost = {"input": 1000.0, "output": 1000.0, "max": 0.001}
    with served(well) as server:
        with pytest.raises(ValueError, match=r"judges\.gpt\.max_calls: too few, got 9"):
            asked(server, max_calls=9).judge(comparisons(5))
        with pytest.raises(ValueError, match=r"judges\.gpt\.cost\.max: too little, got 0\.001"):
            asked(server, cost=cost).judge(comparisons(5))
        assert not server.asked


def test_money_is_never_overspent_and_its_account_is_the_endpoints_own() -> None:
    cost = {"input": 2.0, "output": 8.0, "max": 0.06}
    with served(always("garbage")) as server:
        judge = asked(server, cost=cost, concurrency=4)
        judgements = judge.judge(comparisons(20))
        with opened(judge.respondent.identity) as book:
            spent = sum(len(content) // 4 * 2 + 12 * 8 for content in server.asked) / 1e6
            assert book.cost == pytest.approx(spent)
            assert spent <= 0.06
        assert "missing" in verdicts(judgements) or "unparsed" in verdicts(judgements)


def test_the_estimate_says_what_is_left_and_asks_nothing() -> None:
    with served(well) as server:
        asked(server).judge(comparisons(3))
        cost = {"input": 2.0, "output": 8.0, "max": 1.0}
        found = estimate("gpt", settings(server, cost=cost), comparisons(5))
        assert (found.questions, found.known, found.calls) == (10, 6, 6)
        assert 0 < found.cost < 0.1
        assert len(server.asked) == 6


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "2"}, 2.0),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "1000000000"}, 1e9),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after-ms": "x", "retry-after": "9"}, 9.0),
        ({"retry-after": "Thu, 01 Jan 1970 00:01:40 GMT"}, 90.0),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:00 GMT"}, 0.0),
    ],
)
def test_retry_after_is_read_as_the_standard_says(
    headers: dict[str, str], seconds: float | None
) -> None:
    assert retry_after(headers, now=10.0) == seconds


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_url": "http://example.com/v1"}, "judges.gpt.base_url: unencrypted"),
        ({"base_url": "example.com"}, "judges.gpt.base_url: no address"),
        ({"base_url": "https://127.0.0.1.example.com/v1"}, "no key, got nothing"),
        ({"base_url": None, "key_variable": "MY_KEY"}, "environment variable MY_KEY; set it"),
    ],
)
def test_an_unsafe_address_or_a_missing_key_is_refused_before_any_call(
    changes: dict[str, Any], message: str
) -> None:
    with served(well) as server, pytest.raises(ValueError, match=message):
        asked(server, **changes).judge(comparisons(1))


def test_a_model_without_a_date_is_warned_about() -> None:
    with served(well) as server, pytest.warns(UserWarning, match="'gpt-4o' names no snapshot"):
        asked(server, model="gpt-4o", base_url="https://example.com/v1")


JUDGE_ALL = """
import json, sys
sys.path[:0] = sys.argv[2:4]
from types import SimpleNamespace
from faulty import asked, comparisons
from stages import endpoint as endpoints

endpoints.FIRST_PAUSE = 0.01
judge = asked(
    SimpleNamespace(url=sys.argv[1]), concurrency=32, timeout=2.0, max_calls=4000,
    cost={"input": 2.0, "output": 8.0, "max": 5.0},
)
judgements = judge.judge(comparisons(int(sys.argv[4])))
print(json.dumps([judgement.verdict for judgement in judgements]))
"""


def judging(server: Endpoint, count: int, **environment: str) -> subprocess.Popen[str]:
    paths = [str(PROJECT), str(PROJECT / "tests")]
    return subprocess.Popen(
        [sys.executable, "-B", "-c", JUDGE_ALL, server.url, *paths, str(count)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def results() -> list[str]:
    """Keys of the result lines of the one ledger, whole ones only."""
    lines = [
        line
        for path in Path(".prefopt/ledger").glob("*.jsonl")
        for line in path.read_bytes().split(b"\n")[1:-1]
    ]
    entries = [json.loads(line) for line in lines]
    return [entry["key"] for entry in entries if entry.get("outcome") in ("A", "B")]


def test_two_thousand_judgements_survive_faults_and_a_kill() -> None:
    with served(thirty_percent) as server:
        killed = judging(server, 1000)
        while killed.poll() is None and len(results()) < 600:
            time.sleep(0.1)
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
        known = set(results())
        calls = len(server.asked)
        assert 600 <= len(known) < 2000
        finished = judging(server, 1000)
        out, err = finished.communicate()
        assert finished.returncode == 0, err[-2000:]
        assert json.loads(out.splitlines()[-1]) == expected(1000)
        kept = results()
        assert len(kept) == len(set(kept)) == 2000
        judge = asked(server)
        questions = judge.questions(comparisons(1000))
        ask = load_template("short").ask
        asked_again = {ask(questions[key]) for key in known} & set(server.asked[calls:])
        assert not asked_again
        with opened(judge.respondent.identity) as book:
            assert len(server.asked) <= book.calls <= 4000
            assert book.cost <= 5.0
        failed = 1 - 2000 / len(server.asked)
        assert 0.2 < failed < 0.4


def test_a_key_is_sent_to_the_endpoint_and_is_nowhere_else(place: Path) -> None:
    with served(at_first("500")) as server:
        finished = judging(server, 3, OPENAI_API_KEY=CANARY, OPENAI_LOG="debug")
        out, err = finished.communicate()
        assert finished.returncode == 0, err[-2000:]
        server.fault = always("garbage")
        more = judging(server, 4, OPENAI_API_KEY=CANARY)
        texts = [out, err, *more.communicate()]
        server.fault = always("401")
        texts += judging(server, 5, OPENAI_API_KEY=CANARY).communicate()
        assert set(server.seen) == {f"Bearer {CANARY}"}
    assert any("said Bearer [key]" in path.read_text() for path in place.rglob("*.jsonl"))
    texts += [path.read_text() for path in place.rglob("*") if path.is_file()]
    assert not [text for text in texts if "CANARY" in text]

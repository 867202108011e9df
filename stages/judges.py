"""Judges: what says which of two completions of a prompt is better. One form for all of them.

A judge takes comparisons and gives a judgement for each. Rewards compare numbers. Those that are
asked see the two completions in both orders; orders that disagree make a tie, and identical
completions are one without asking. A question that got no readable answer is `unparsed` or
`refused`, one that was never put, or never voted on, `missing`: kinds of their own, never a loss
and never a tie.
"""

import csv
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from tqdm import tqdm

from stages.artefacts import digest
from stages.endpoint import Endpoint, Estimate, Unanswered, host_of
from stages.ledger import Expense, Ledger, opened
from stages.params import (
    EndpointJudge,
    HumanJudge,
    Judge,
    LocalJudge,
    Params,
)
from stages.questions import FOLDER, SCHEMA, Question, load_template, parse
from stages.rewards import Reward, Text, load_reward

Verdict = Literal["policy", "opponent", "tie", "unparsed", "refused", "missing"]
PARSED = ("policy", "opponent", "tie")


@dataclass(frozen=True)
class Comparison:
    """What is to be judged.

    Args:
        number: the prompt's, by which people may have voted.
        prompt: its text.
        policy: the completion of the policy.
        opponent: that of its opponent.
        against: the opponent's name.
        revision: how often the policy has revised its completion.
    """

    number: int
    prompt: str
    policy: str
    opponent: str
    against: str
    revision: int = 0


@dataclass(frozen=True)
class Judgement:
    """What a judge said.

    Args:
        verdict: both orders taken together.
        policy_reward: NaN of a judge that gives none.
        opponent_reward: likewise.
        policy_first: the verdict when the policy's completion was shown first; empty if not asked.
        opponent_first: likewise.
        policy_first_reply: the judge's words, verbatim.
        opponent_first_reply: likewise.
    """

    verdict: Verdict
    policy_reward: float = math.nan
    opponent_reward: float = math.nan
    policy_first: Verdict | Literal[""] = ""
    opponent_first: Verdict | Literal[""] = ""
    policy_first_reply: str = ""
    opponent_first_reply: str = ""

    @property
    def order_consistent(self) -> bool:
        """Whether both orders gave one verdict; of a judge without orders, or asked in one, yes."""
        return "" in (self.policy_first, self.opponent_first) or (
            self.policy_first == self.opponent_first
        )


class Panelist(Protocol):
    """A judge, ready to judge; `identity` is all that verdicts depend on but the comparisons."""

    @property
    def identity(self) -> dict[str, str]: ...

    def judge(self, comparisons: Sequence[Comparison]) -> list[Judgement]: ...


def load_judge(params: Params, name: str, run: str) -> Panelist:
    """The judge called `name` in params.yaml; `run` is whose completions it will see."""
    if name in params.known_rewards:
        return Rewarded(load_reward(params, name))
    declared = check_judge(params, name)
    match declared:
        case EndpointJudge():
            return Asked(_endpoint(name, declared), declared.orders)
        case LocalJudge():
            return Asked(Local(name, declared), declared.orders)
        case HumanJudge():
            return Voted(Path(declared.votes) / f"{run}.csv")


def check_judge(params: Params, name: str) -> Judge:
    """Refuse a declared judge whose files are not where DVC watches them.

    Raises:
        ValueError: if a template is missing or wrong, an address is unsafe, or a path leads
            elsewhere than into `data/judges`.
    """
    declared = params.judge(name)
    match declared:
        case EndpointJudge():
            load_template(declared.template)
            host_of(name, declared.base_url)
        case LocalJudge():
            load_template(declared.template)
            _check_model(name, declared.model)
        case HumanJudge():
            if not is_watched(declared.votes) or not Path(declared.votes).is_dir():
                raise ValueError(
                    f"judges.{name}.votes: no folder within {FOLDER}, got '{declared.votes}'; "
                    "put RUN.csv there"
                )
    return declared


def estimate(name: str, declared: EndpointJudge, comparisons: Sequence[Comparison]) -> Estimate:
    """What these comparisons would still cost; nothing is asked."""
    endpoint = _endpoint(name, declared)
    with opened(endpoint.identity) as book:
        return endpoint.estimate(Asked(endpoint, declared.orders).questions(comparisons), book)


def _endpoint(name: str, declared: EndpointJudge) -> Endpoint:
    return Endpoint(name, declared, load_template(declared.template))


def is_watched(path: str) -> bool:
    """Whether DVC sees a change of this file: the judge stage depends on `data/judges`."""
    return Path(path).resolve().is_relative_to(FOLDER.resolve())


def _check_model(name: str, model: str) -> None:
    local = model.startswith((".", "/")) or Path(Path(model).parts[0]).is_dir()
    if local and not is_watched(model):
        raise ValueError(
            f"judges.{name}.model: outside {FOLDER}, got '{model}'; copy it there, so that its "
            "verdicts are made again when it changes, or give a hub id"
        )


@dataclass(frozen=True)
class Rewarded:
    """A judge that compares two numbers."""

    reward: Reward

    @property
    def identity(self) -> dict[str, str]:
        return self.reward.identity

    def judge(self, comparisons: Sequence[Comparison]) -> list[Judgement]:
        ours = [Text(each.prompt, each.policy) for each in comparisons]
        theirs = [Text(each.prompt, each.opponent) for each in comparisons]
        # Asked once, so that what is the same text has the same reward to the last bit.
        rewards = self.reward([*ours, *theirs])
        return list(map(rewarded, rewards[: len(ours)], rewards[len(ours) :]))


def rewarded(policy: float, opponent: float) -> Judgement:
    """The higher reward wins, equal ones tie."""
    if policy == opponent:
        return Judgement("tie", policy, opponent)
    return Judgement("policy" if policy > opponent else "opponent", policy, opponent)


class Respondent(Protocol):
    """Who answers questions into a ledger."""

    @property
    def identity(self) -> dict[str, str]: ...

    def ask(self, questions: Mapping[str, Question], book: Ledger) -> dict[str, Unanswered]: ...


@dataclass(frozen=True)
class Asked:
    """A judge that reads both completions and answers A or B."""

    respondent: Respondent
    orders: Literal["both", "one"]

    @property
    def identity(self) -> dict[str, str]:
        return {**self.respondent.identity, "orders": self.orders}

    def judge(self, comparisons: Sequence[Comparison]) -> list[Judgement]:
        questions = self.questions(comparisons)
        with opened(self.respondent.identity) as book:
            unanswered = self.respondent.ask(questions, book)
            return [self._judgement(each, book, unanswered) for each in comparisons]

    def questions(self, comparisons: Sequence[Comparison]) -> dict[str, Question]:
        """All that there is to ask, each question once."""
        asked = [
            question
            for each in comparisons
            for question in self._orders(each)
            if question is not None and each.policy != each.opponent
        ]
        return {question.key: question for question in asked}

    def _orders(self, each: Comparison) -> tuple[Question | None, Question | None]:
        """With the policy's completion first, and with its opponent's first."""
        ours = Question(each.prompt, each.policy, each.opponent)
        theirs = Question(each.prompt, each.opponent, each.policy)
        if self.orders == "both":
            return ours, theirs
        return (ours, None) if int(ours.key, 16) % 2 else (None, theirs)

    def _judgement(
        self, each: Comparison, book: Ledger, unanswered: Mapping[str, Unanswered]
    ) -> Judgement:
        if each.policy == each.opponent:
            return Judgement("tie", policy_first="tie", opponent_first="tie")
        ours, theirs = self._orders(each)
        first = _heard(ours, {"A": "policy", "B": "opponent"}, book, unanswered)
        second = _heard(theirs, {"A": "opponent", "B": "policy"}, book, unanswered)
        return Judgement(
            together([verdict for verdict, _ in (first, second) if verdict]),
            policy_first=first[0],
            opponent_first=second[0],
            policy_first_reply=first[1],
            opponent_first_reply=second[1],
        )


def together(verdicts: Sequence[Verdict]) -> Verdict:
    """One verdict of those of each order: a disagreement is a tie, a gap stays a gap."""
    for gap in ("refused", "unparsed", "missing"):
        if gap in verdicts:
            return gap
    return verdicts[0] if len(set(verdicts)) == 1 else "tie"


def _heard(
    question: Question | None,
    sides: Mapping[str, Verdict],
    book: Ledger,
    unanswered: Mapping[str, Unanswered],
) -> tuple[Verdict | Literal[""], str]:
    if question is None:
        return "", ""
    answer = book.answers.get(question.key)
    if answer is not None:
        return sides[answer.choice], answer.reply
    return unanswered[question.key].kind, unanswered[question.key].reply


class Local:
    """A causal LM on this machine, asked through the same templates as an endpoint."""

    def __init__(self, name: str, settings: LocalJudge) -> None:
        from stages.choice import Chooser

        self.name = name
        self.template = load_template(settings.template)
        self._chooser = Chooser(
            settings.model, dtype=settings.dtype, num_threads=settings.num_threads
        )
        self.identity = {
            "kind": "local",
            "model": self._chooser.name,
            "template": self.template.digest,
            "dtype": settings.dtype,
            "num_threads": str(settings.num_threads),
        }

    def ask(self, questions: Mapping[str, Question], book: Ledger) -> dict[str, Unanswered]:
        from stages.choice import TooLong

        unanswered: dict[str, Unanswered] = {}
        remaining = {key: q for key, q in questions.items() if key not in book.answers}
        for key, question in tqdm(remaining.items(), desc=self.name, unit="verdict", mininterval=5):
            call = book.begin(0.0)
            started = time.monotonic()
            try:
                reply = self._chooser.reply([("user", self.template.ask(question))], SCHEMA)
            except TooLong as error:
                unanswered[key] = Unanswered("unparsed", str(error))
                book.settle(call, Expense(), "unparsed", key=key, reply=str(error))
                continue
            verdict = parse(reply.text)
            assert verdict is not None
            seconds = round(time.monotonic() - started, 4)
            book.settle(
                call,
                Expense(0.0, reply.prompt_tokens, reply.completion_tokens, seconds),
                verdict,
                key=key,
                reply=reply.text,
                model=self._chooser.name,
            )
        return unanswered


class Voted:
    """People's votes on a run's first completions: a CSV file of prompt, opponent and verdict.

    A prompt is named by its text or its number; of several votes on one comparison the most
    frequent verdict counts, and the most frequent ones together make a tie.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        votes = digest(path) if path.is_file() else "none"
        self.identity = {"kind": "human", "votes": votes}

    def judge(self, comparisons: Sequence[Comparison]) -> list[Judgement]:
        first = [(row, each) for row, each in enumerate(comparisons) if not each.revision]
        rows = {(each.prompt, each.against): row for row, each in first}
        rows |= {(str(each.number), each.against): row for row, each in first}
        votes = [Counter[Verdict]() for _ in comparisons]
        for line, vote in self._votes():
            row = rows.get((vote["prompt"], vote["opponent"]))
            if row is None:
                raise ValueError(
                    f"{self.path}:{line}: a vote on nothing that is judged, got prompt "
                    f"{vote['prompt']!r} against {vote['opponent']!r}; mend or delete it"
                )
            verdict = vote["verdict"]
            if verdict not in PARSED:
                raise ValueError(
                    f"{self.path}:{line}: no verdict, got {verdict!r}; write one of "
                    f"{', '.join(PARSED)}"
                )
            votes[row][verdict] += 1
        return [Judgement(_majority(counts)) for counts in votes]

    def _votes(self) -> Iterator[tuple[int, dict[str, str]]]:
        if not self.path.is_file():
            return
        with open(self.path, newline="") as file:
            reader = csv.DictReader(file)
            columns = sorted(reader.fieldnames or [])
            if columns != ["opponent", "prompt", "verdict"]:
                raise ValueError(
                    f"{self.path}: other columns than prompt, opponent and verdict, got {columns}; "
                    "name these in the first line"
                )
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(
                        f"{self.path}:{reader.line_num}: not three fields, got {row}; mend it"
                    )
                yield reader.line_num, row


def _majority(counts: Counter[Verdict]) -> Verdict:
    if not counts:
        return "missing"
    (first, most), *others = counts.most_common()
    return "tie" if others and others[0][1] == most else first

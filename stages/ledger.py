"""The ledger of a judge: every call that it cost and every answer, kept for good as it arrives.

One file of JSON lines for everything that an answer depends on besides the question: model,
template, form of the answer. A call is written down before it is made, with the most that it may
cost, and settled by its outcome; a call that a killed process never settled counts in full. Only
answers are results: a reply that could not be read, or a refusal, is kept as an expense and asked
again. One process at a time holds a ledger, so that nothing is asked twice and a budget is kept
by all processes together.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from stages.artefacts import WORK
from stages.questions import Choice

LEDGERS = WORK / "ledger"


@dataclass(frozen=True)
class Answer:
    choice: Choice
    reply: str  # verbatim


@dataclass(frozen=True)
class Expense:
    """What one settled call took.

    Args:
        cost: in the currency of the judge's prices; 0 where it has none.
        seconds: from request to reply.
    """

    cost: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0


@dataclass
class Ledger:
    """An open ledger, read whole.

    Args:
        answers: by the question's key.
        calls: made so far, by every process that ever held the ledger.
        models: that answered, in the endpoint's own words.
        expenses: of settled calls, in their order.
    """

    file: TextIO
    answers: dict[str, Answer] = field(default_factory=dict[str, Answer])
    calls: int = 0
    models: set[str] = field(default_factory=set[str])
    expenses: list[Expense] = field(default_factory=list[Expense])
    open_bounds: dict[int, float] = field(default_factory=dict[int, float])

    @property
    def cost(self) -> float:
        """Of settled calls what they cost, of others the most that they may have."""
        return sum(expense.cost for expense in self.expenses) + sum(self.open_bounds.values())

    def begin(self, bound: float) -> int:
        """Write down a call that is about to be made and may cost `bound`; gives its number."""
        entry = {"call": self.calls, "bound": bound}
        self._append(entry)
        self._take(entry)
        return self.calls - 1

    def settle(
        self,
        call: int,
        expense: Expense,
        outcome: str,
        *,
        key: str = "",
        reply: str = "",
        model: str = "",
    ) -> None:
        """Write down how a call ended, on the disk before this returns.

        Args:
            call: its number.
            expense: what it took.
            outcome: A or B, which are results; anything else says why there is none.
            key: the question's.
            reply: verbatim.
            model: that answered.
        """
        entry: dict[str, Any] = {"settles": call, "outcome": outcome, "key": key, "reply": reply}
        entry |= {"model": model, **vars(expense)}
        self._append(entry)
        os.fsync(self.file.fileno())
        self._take(entry)

    def _append(self, entry: dict[str, Any]) -> None:
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()

    def _take(self, entry: dict[str, Any]) -> None:
        if "call" in entry:
            self.open_bounds[entry["call"]] = entry["bound"]
            self.calls += 1
            return
        del self.open_bounds[entry["settles"]]
        self.expenses.append(Expense(**{name: entry[name] for name in vars(Expense())}))
        if entry["model"]:
            self.models.add(entry["model"])
        if entry["outcome"] in ("A", "B"):
            self.answers[entry["key"]] = Answer(entry["outcome"], entry["reply"])

    def read(self, path: Path) -> None:
        """Take in what the file holds; a last line that a dying process tore is cut off.

        Raises:
            ValueError: if another line is damaged.
        """
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            self.file.truncate(len(whole))
        for number, line in enumerate(whole.splitlines()[1:], start=2):
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}:{number}: damaged, got {error!r}; delete that line and those after "
                    "it, what they held is asked again"
                ) from error


def path_of(identity: dict[str, str]) -> Path:
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return LEDGERS / f"{name[:16]}.jsonl"


@contextmanager
def opened(identity: dict[str, str]) -> Generator[Ledger, None, None]:
    """The ledger of this identity, held until the end; waits while another process holds it."""
    LEDGERS.mkdir(parents=True, exist_ok=True)
    path = path_of(identity)
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        ledger = Ledger(file)
        ledger.read(path)
        if path.stat().st_size == 0:
            file.write(json.dumps({"identity": identity}) + "\n")
            file.flush()
        yield ledger

"""Judges behind an OpenAI-compatible address: the only user of its client.

Calls go out together up to a cap, wait where the endpoint says so, are tried again with jitter
where it fails, and never exceed the judge's budget. The key is read from the environment when the
first call is due; wherever it might come back, in an error or a reply, it is struck out.
"""

import asyncio
import email.utils
import json
import math
import os
import random
import re
import time
import urllib.parse
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tqdm import tqdm

from stages.ledger import Expense, Ledger
from stages.params import EndpointJudge
from stages.questions import SCHEMA, Question, Template, parse

ATTEMPTS = 12  # of a question whose calls fail on the way
READINGS = 3  # of a question whose replies cannot be read or are refusals
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 30.0  # seconds between attempts, doubling
MAX_RETRY_AFTER = 300.0
MAX_REPLY_BYTES = 1_000_000
BYTES_A_TOKEN = 4  # of English; for the estimate alone, budgets are kept with bytes as the bound
FORMAT = {
    "type": "json_schema",
    "json_schema": {"name": "verdict", "strict": True, "schema": SCHEMA},
}
LOOPBACK = ("127.0.0.1", "::1", "localhost")
RETRIED = (408, 409, 425, 429)  # and all from 500 on
# A date or a digest in a name pins what answers; other names may mean another model tomorrow.
_PINNED = re.compile(r"\d{4}-\d{2}-\d{2}|\d{8}|-\d{4}$|@[0-9a-f]{7,}")


@dataclass(frozen=True)
class Estimate:
    """What remains to be asked of an endpoint, before any call."""

    judge: str
    questions: int
    known: int  # answered in the ledger
    calls: int  # made so far
    max_calls: int
    cost: float  # of the remaining questions, about
    spent: float
    max_cost: float | None

    def __str__(self) -> str:
        text = (
            f"{self.judge}: {self.questions} questions, {self.known} of them answered in the "
            f"ledger; {self.questions - self.known} calls or more to make, {self.calls} of "
            f"{self.max_calls} made"
        )
        if self.max_cost is not None:
            text += f"; about {self.cost:.4f} to pay, {self.spent:.4f} of {self.max_cost:.4f} spent"
        return text

    def check(self) -> None:
        """Refuse to start what the budget will not finish.

        Raises:
            ValueError: if the estimate exceeds what is left of calls or money.
        """
        if self.questions - self.known > self.max_calls - self.calls:
            raise ValueError(
                f"judges.{self.judge}.max_calls: too few, got {self.max_calls} with {self.calls} "
                f"made and {self.questions - self.known} to make; raise it, or evaluate fewer "
                "prompts"
            )
        if self.max_cost is not None and self.cost > self.max_cost - self.spent:
            raise ValueError(
                f"judges.{self.judge}.cost.max: too little, got {self.max_cost} with "
                f"{self.spent:.4f} spent and about {self.cost:.4f} to spend; raise it, or "
                "evaluate fewer prompts"
            )


@dataclass(frozen=True)
class Unanswered:
    """Why a question has no answer: unparsed, refused or missing, and the last reply."""

    kind: Literal["unparsed", "refused", "missing"]
    reply: str = ""


@dataclass(frozen=True)
class _Failure:
    """A call without a reply; `wait` is the endpoint's own wish, in seconds."""

    reason: str
    wait: float | None = None
    billed: bool = False  # perhaps: the endpoint may have worked


@dataclass(frozen=True)
class _Completion:
    text: str
    refused: bool
    model: str
    prompt_tokens: int
    completion_tokens: int


class Endpoint:
    """One judge's endpoint.

    Args:
        name: the judge's, for messages.
        settings: of params.yaml.
        template: what it is asked.
    """

    def __init__(self, name: str, settings: EndpointJudge, template: Template) -> None:
        self.name, self.settings, self.template = name, settings, template
        self.is_local = host_of(name, settings.base_url) in LOOPBACK
        if not self.is_local and not _PINNED.search(settings.model):
            warnings.warn(
                f"judges.{name}.model: '{settings.model}' names no snapshot, so that another "
                "model may answer tomorrow; name a dated one",
                stacklevel=2,
            )
        self.identity = {
            "kind": "endpoint",
            "model": settings.model,
            "template": template.digest,
            "format": json.dumps(FORMAT, sort_keys=True),
            "temperature": json.dumps(settings.temperature),
            "max_tokens": str(settings.max_tokens),
        }

    def estimate(self, questions: Mapping[str, Question], book: Ledger) -> Estimate:
        remaining = [q for key, q in questions.items() if key not in book.answers]
        cost = self.settings.cost
        tokens = sum(self._request_bytes(q) for q in remaining) / BYTES_A_TOKEN
        return Estimate(
            judge=self.name,
            questions=len(questions),
            known=len(questions) - len(remaining),
            calls=book.calls,
            max_calls=self.settings.max_calls,
            cost=self._cost(tokens, len(remaining) * self.settings.max_tokens / 2),
            spent=book.cost,
            max_cost=cost.max if cost else None,
        )

    def ask(self, questions: Mapping[str, Question], book: Ledger) -> dict[str, Unanswered]:
        """Ask what the ledger does not know; gives what remains without an answer, and why.

        Raises:
            ValueError: if the endpoint refuses the requests as such (a wrong key, no such model),
                fails again and again, or wants a longer pause than is sensible. What was answered
                before stays in the book.
        """
        estimate = self.estimate(questions, book)
        tqdm.write(str(estimate))
        estimate.check()
        if estimate.known == estimate.questions:
            return {}
        key = os.environ.get(self.settings.key_variable, "")
        if not key and not self.is_local:
            raise ValueError(
                f"judges.{self.name}: no key, got nothing in the environment variable "
                f"{self.settings.key_variable}; set it"
            )
        remaining = {k: q for k, q in questions.items() if k not in book.answers}
        try:
            found = asyncio.run(_Session(self, book, key).run(remaining))
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        if book.models > {self.settings.model} or len(book.models) > 1:
            warnings.warn(
                f"judges.{self.name}: several models answered, {sorted(book.models)}; the "
                "endpoint changed what it serves",
                stacklevel=2,
            )
        return found

    def bound(self, question: Question) -> float:
        """The most that one call may cost: a token is at least a byte."""
        return self._cost(self._request_bytes(question), self.settings.max_tokens)

    def expense(self, completion: _Completion, seconds: float) -> Expense:
        tokens = (completion.prompt_tokens, completion.completion_tokens)
        return Expense(self._cost(*tokens), *tokens, round(seconds, 4))

    def _cost(self, prompt_tokens: float, completion_tokens: float) -> float:
        cost = self.settings.cost
        if cost is None:
            return 0.0
        return (prompt_tokens * cost.input + completion_tokens * cost.output) / 1e6

    def _request_bytes(self, question: Question) -> int:
        # The schema and the chat format are billed too.
        return len(self.template.ask(question).encode()) + len(json.dumps(FORMAT)) + 64


class _Session:
    """The calls of one `ask`."""

    def __init__(self, endpoint: Endpoint, ledger: Ledger, key: str) -> None:
        self._endpoint, self._ledger, self._key = endpoint, ledger, key
        self._settings = endpoint.settings
        self._structured = True  # until the endpoint says that it does not know the form
        self._resume_at = 0.0  # no call before, by the monotonic clock
        self._reserved_out = False  # the budget is used up
        self._unanswered: dict[str, Unanswered] = {}

    async def run(self, questions: Mapping[str, Question]) -> dict[str, Unanswered]:
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        # A redirect would carry the key elsewhere; a proxy is not to be asked for the loopback.
        http = DefaultAsyncHttpxClient(
            follow_redirects=False, trust_env=not self._endpoint.is_local
        )
        self._client = AsyncOpenAI(
            api_key=self._key or "none",
            base_url=self._settings.base_url,
            max_retries=0,
            timeout=self._settings.timeout,
            http_client=http,
        )
        queue = iter(questions.items())
        description, total = self._endpoint.name, len(questions)
        async with self._client:
            with tqdm(total=total, desc=description, unit="verdict", mininterval=5) as bar:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(self._settings.concurrency, total)):
                        group.create_task(self._work(queue, bar))
        return self._unanswered

    async def _work(self, queue: Iterator[tuple[str, Question]], bar: Any) -> None:
        for key, question in queue:
            unanswered = await self._settle(key, question)
            if unanswered is not None:
                self._unanswered[key] = unanswered
            bar.update()

    async def _settle(self, key: str, question: Question) -> Unanswered | None:
        """Ask until there is an answer, or a reason why there is none."""
        jitter = random.Random(key)
        readings, unanswered, reason = 0, Unanswered("missing"), ""
        for attempt in range(ATTEMPTS):
            await asyncio.sleep(max(0.0, self._resume_at - time.monotonic()))
            call = self._reserve(question)
            if call is None:
                return unanswered
            started = time.monotonic()
            outcome = await self._call(question)
            seconds = time.monotonic() - started
            if isinstance(outcome, _Failure):
                bound = self._endpoint.bound(question) if outcome.billed else 0.0
                expense = Expense(bound, seconds=round(seconds, 4))
                self._ledger.settle(call, expense, "failed", key=key, reply=outcome.reason)
                reason = outcome.reason
                await self._pause(outcome, attempt, jitter)
                continue
            unanswered = _unanswered(outcome)
            result = parse(outcome.text) if unanswered is None else unanswered.kind
            self._ledger.settle(
                call,
                self._endpoint.expense(outcome, seconds),
                str(result),
                key=key,
                reply=outcome.text,
                model=outcome.model,
            )
            if unanswered is None:
                return None
            readings += 1
            if readings == READINGS:
                return unanswered
        if readings:
            return unanswered
        raise ValueError(
            f"judges.{self._endpoint.name}: the endpoint fails, got '{reason}' after {ATTEMPTS} "
            "attempts; run again when it works, what it answered is kept"
        )

    def _reserve(self, question: Question) -> int | None:
        """The number of a call that the budget allows, or None for good."""
        bound, cost, ledger = self._endpoint.bound(question), self._settings.cost, self._ledger
        if ledger.calls >= self._settings.max_calls or (
            cost is not None and ledger.cost + bound > cost.max
        ):
            if not self._reserved_out:
                self._reserved_out = True
                tqdm.write(
                    f"{self._endpoint.name}: the budget is used up after {ledger.calls} calls and "
                    f"{ledger.cost:.4f}; what was not answered counts as missing"
                )
            return None
        return ledger.begin(bound)

    async def _pause(self, failure: _Failure, attempt: int, jitter: random.Random) -> None:
        if failure.wait is not None:
            # A limit is the account's: nobody goes on before it is lifted.
            self._resume_at = max(self._resume_at, time.monotonic() + failure.wait)
            return
        longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2**attempt)
        await asyncio.sleep(longest * jitter.uniform(0.5, 1))

    async def _call(self, question: Question) -> _Completion | _Failure:
        import openai

        request: dict[str, Any] = {
            "model": self._settings.model,
            "messages": [{"role": "user", "content": self._endpoint.template.ask(question)}],
            "max_completion_tokens": self._settings.max_tokens,
        }
        if self._settings.temperature is not None:
            request["temperature"] = self._settings.temperature
        if self._structured:
            request["response_format"] = FORMAT
        calls = self._client.chat.completions.with_raw_response
        try:
            # The client's own limit is on each read, this one on the whole.
            async with asyncio.timeout(self._settings.timeout):
                raw = await calls.create(**request)
            return self._read(raw.http_response.content)
        except openai.APIStatusError as error:
            return self._judged(error.status_code, error.response.headers, error.response.text)
        except openai.APIConnectionError as error:
            return _Failure(self._scrubbed(f"{type(error).__name__}: {error}"), billed=True)
        except TimeoutError:
            return _Failure(f"no reply in {self._settings.timeout} s", billed=True)
        except _Unreadable as error:
            return _Failure(str(error), billed=True)

    def _judged(self, status: int, headers: Mapping[str, str], body: str) -> _Completion | _Failure:
        """What an error status means: to be tried again, this question's fault, or the end."""
        said = self._scrubbed(body)[:300]
        if status in RETRIED or status >= 500:
            wait = retry_after(headers, time.time())
            if wait is not None and wait > MAX_RETRY_AFTER:
                raise ValueError(
                    f"judges.{self._endpoint.name}: the endpoint asks for a pause of {wait:.0f} "
                    f"s, got status {status}; run again later, what it answered is kept"
                )
            return _Failure(f"status {status}", wait)
        if self._structured and status in (400, 422) and _names_the_form(body):
            self._structured = False
            warnings.warn(
                f"judges.{self._endpoint.name}: the endpoint does not know response_format, got "
                f"'{said}'; replies are read as strictly, more may be unparsed",
                stacklevel=2,
            )
            return _Failure("no response_format")
        if status == 413 or "context_length" in body or "context length" in body:
            return _Completion(said, False, "", 0, 0)  # too long for the judge: no answer
        # The words that come with 401 and 403 quote the key.
        said = "" if status in (401, 403) else f": {said}"
        raise ValueError(
            f"judges.{self._endpoint.name}: the endpoint refuses, got status {status}{said}; see "
            f"its model, base_url, and the key in {self._settings.key_variable}"
        )

    def _read(self, body: bytes) -> _Completion:
        if len(body) > MAX_REPLY_BYTES:
            raise _Unreadable(f"a body of {len(body)} bytes")
        try:
            tree = json.loads(body)
            choice = tree["choices"][0]
            message = choice["message"]
            text, refusal = message.get("content"), message.get("refusal")
            usage = tree.get("usage") or {}
            tokens = (
                int(usage.get("prompt_tokens", 0)),
                int(usage.get("completion_tokens", 0)),
            )
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise _Unreadable(f"a body that is no completion ({type(error).__name__})") from error
        refused = isinstance(refusal, str) or choice.get("finish_reason") == "content_filter"
        said = refusal if isinstance(refusal, str) else text
        return _Completion(
            self._scrubbed(said) if isinstance(said, str) else "",
            refused,
            self._scrubbed(str(tree.get("model", ""))),
            *tokens,
        )

    def _scrubbed(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text


def _unanswered(completion: _Completion) -> Unanswered | None:
    if completion.refused:
        return Unanswered("refused", completion.text)
    return None if parse(completion.text) else Unanswered("unparsed", completion.text)


class _Unreadable(Exception):
    """A reply that is no chat completion."""


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds that an endpoint asks to wait; None where it says nothing that makes sense.

    RFC 9110, section 10.2.3: seconds or a date; `retry-after-ms` is OpenAI's own.
    """
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = headers.get(name, "")
        try:
            seconds = float(value) * unit
        except ValueError:
            try:
                seconds = email.utils.parsedate_to_datetime(value).timestamp() - now
            except ValueError:
                continue
            seconds = max(0.0, seconds)
        if seconds >= 0 and not math.isinf(seconds):
            return seconds
    return None


def _names_the_form(body: str) -> bool:
    return "response_format" in body or "json_schema" in body


def host_of(name: str, base_url: str | None) -> str:
    """The address's host; keys travel encrypted, except within this machine."""
    if base_url is None:
        return "api.openai.com"
    url = urllib.parse.urlsplit(base_url)
    host = url.hostname or ""
    if url.scheme not in ("http", "https") or not host:
        raise ValueError(
            f"judges.{name}.base_url: no address, got '{base_url}'; write https://HOST/v1"
        )
    if url.scheme == "http" and host not in LOOPBACK:
        raise ValueError(
            f"judges.{name}.base_url: unencrypted, got '{base_url}'; write https, or serve on "
            "the loopback"
        )
    return host

"""A real HTTP endpoint that answers by the texts it is shown, and fails as it is told to."""

import email.utils
import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from stages import endpoint as endpoints
from stages.judges import Asked, Comparison
from stages.params import EndpointJudge
from stages.questions import load_template

Fault = Callable[[str, int], str]  # of a question's digest and its attempt, the fault's name


def truth(first: str, second: str) -> str:
    """The verdict on two texts, whatever their order; of equal worth never."""
    worth = [hashlib.sha256(text.encode()).hexdigest() for text in (first, second)]
    return "A" if worth[0] > worth[1] else "B"


class Endpoint(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, fault: Fault) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.fault = fault
        self.lock = threading.Lock()
        self.attempts = Counter[str]()
        self.asked: list[str] = []  # questions in the order of their calls
        self.bodies: list[dict[str, Any]] = []
        self.seen: list[str] = []  # Authorization headers
        self.at_once = self.most_at_once = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that were killed or lost patience are expected."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Endpoint

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = body["messages"][0]["content"]
        question = hashlib.sha256(content.encode()).hexdigest()
        server = self.server
        with server.lock:
            attempt = server.attempts[question]
            server.attempts[question] += 1
            server.asked.append(content)
            server.bodies.append(body)
            server.seen.append(self.headers["Authorization"])
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            self.answer(body, content, server.fault(question, attempt))
        finally:
            with server.lock:
                server.at_once -= 1

    def answer(self, body: dict[str, Any], content: str, fault: str) -> None:
        _, first, second = re.findall(r"(?m)^> (.*)$", content)
        reply = json.dumps({"reason": "so", "verdict": truth(first, second)})
        message: dict[str, Any] = {"role": "assistant", "content": reply}
        key = self.headers["Authorization"]
        match fault:
            case "429 seconds":
                return self.send(429, b"slow down", {"Retry-After": "0.05"})
            case "429 milliseconds":
                return self.send(429, b"slow down", {"Retry-After-Ms": "30"})
            case "429 date":
                now = email.utils.formatdate(time.time(), usegmt=True)
                return self.send(429, b"slow down", {"Retry-After": now})
            case "500":
                return self.send(500, f"<html>{key}</html>".encode(), {})
            case "401" | "404" | "400" | "307":
                headers = {"Location": "http://127.0.0.1:9/"} if fault == "307" else {}
                return self.send(int(fault), f"no: {key}".encode(), headers)
            case "no form" if "response_format" in body:
                return self.send(400, b'{"error": "Unexpected fields: response_format"}', {})
            case "too long":
                return self.send(400, b'{"error": {"code": "context_length_exceeded"}}', {})
            case "slow":
                time.sleep(0.05)  # so that calls at once are seen at once
            case "hang":
                time.sleep(3)
            case "garbage":
                message["content"] = f"I prefer A, said {key}"
            case "null":
                message["content"] = None
            case "refusal":
                message |= {"content": None, "refusal": "I cannot judge this."}
            case _:
                pass
        usage = {"prompt_tokens": len(content) // 4, "completion_tokens": 12}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        answer = {"id": "x", "model": body["model"], "choices": [choice], "usage": usage}
        text = json.dumps(answer).encode()
        if fault == "truncated":
            text = text[: len(text) // 2]
        if fault == "cut":
            self.send(200, text, {"Content-Length": str(len(text) + 100)})
            self.close_connection = True
            return None
        return self.send(200, text, {})

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def served(fault: Fault) -> Generator[Endpoint, None, None]:
    with Endpoint(fault) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def well(question: str, attempt: int) -> str:
    return "none"


def always(fault: str) -> Fault:
    return lambda question, attempt: fault


def at_first(fault: str, times: int = 1) -> Fault:
    return lambda question, attempt: fault if attempt < times else "none"


FAULTS = (
    ("429 seconds", 2), ("429 milliseconds", 2), ("429 date", 2), ("500", 5), ("hang", 1),
    ("truncated", 4), ("cut", 3), ("garbage", 5), ("null", 1), ("refusal", 5),
)  # fmt: skip


def thirty_percent(question: str, attempt: int) -> str:
    """Three calls in ten fail; no question gets more than two replies that cannot be read."""
    drawn = int(hashlib.sha256(f"{question} {attempt}".encode()).hexdigest(), 16) % 100
    for fault, share in FAULTS:
        drawn -= share
        if drawn < 0:
            unreadable = fault in ("garbage", "null", "refusal")
            return "500" if unreadable and attempt >= 2 else fault
    return "none"


def settings(server: Endpoint, **changes: Any) -> EndpointJudge:
    values = {
        "kind": "endpoint",
        "model": "gpt-4.1-2025-04-14",
        "base_url": server.url,
        "template": "short",
        "max_calls": 10_000,
        "timeout": 1.0,
    }
    return EndpointJudge(**values | changes)


def asked(server: Endpoint, **changes: Any) -> Asked:
    declared = settings(server, **changes)
    judge = endpoints.Endpoint("gpt", declared, load_template("short"))
    return Asked(judge, declared.orders)


def comparisons(count: int) -> list[Comparison]:
    return [Comparison(n, f"prompt {n}", f"ours {n}", f"theirs {n}", "sft") for n in range(count)]


def expected(count: int) -> list[str]:
    sides = {"A": "policy", "B": "opponent"}
    return [sides[truth(f"ours {n}", f"theirs {n}")] for n in range(count)]

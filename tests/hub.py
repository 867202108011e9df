"""A hub on the loopback: a data set of one file, with revisions, by Hugging Face's HTTP API."""

import hashlib
import json
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FILE = "train.jsonl"


class Hub:
    """What is held, and where."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.url = ""
        self._main = ""
        self._revisions: dict[str, bytes] = {}

    def commit(self, text: str) -> str:
        """Have main's file be this text; gives the revision."""
        self._main = hashlib.sha1(text.encode()).hexdigest()
        self._revisions[self._main] = text.encode()
        return self._main

    def find(self, path: str) -> tuple[dict[str, str], bytes] | None:
        """Headers and body of what a path names, if it names something."""
        match path.strip("/").removeprefix("api/").removeprefix(f"datasets/{self.name}").split("/"):
            case [""]:
                return self._said(self._about("main"))
            case ["", "revision", revision]:
                return self._said(self._about(revision))
            case ["", "tree", revision] if sha := self._sha(revision):
                size = len(self._revisions[sha])
                return self._said([{"type": "file", "path": FILE, "size": size, "oid": sha}])
            case ["", "resolve", revision, name] if name == FILE and (sha := self._sha(revision)):
                return {"ETag": f'"{sha}"', "X-Repo-Commit": sha}, self._revisions[sha]
        return None

    def _about(self, revision: str) -> dict[str, Any] | None:
        if sha := self._sha(revision):
            return {"id": self.name, "sha": sha, "siblings": [{"rfilename": FILE}], "tags": []}
        return None

    def _sha(self, revision: str) -> str | None:
        sha = self._main if revision == "main" else revision
        return sha if sha in self._revisions else None

    def _said(self, what: Any) -> tuple[dict[str, str], bytes] | None:
        return None if what is None else ({}, json.dumps(what).encode())


@contextmanager
def hub(name: str) -> Generator[Hub, None, None]:
    """A hub that holds OWNER/NAME, at its `url`."""
    held = Hub(name)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = held.find(self.path.partition("?")[0])
            if found is None:
                self._send(404, {"X-Error-Code": "EntryNotFound"}, b"")
            else:
                self._send(200, *found)

        do_HEAD = do_GET

        def _send(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        held.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield held
        finally:
            server.shutdown()
            thread.join()

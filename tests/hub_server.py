"""A small Hugging Face Hub on this machine: what `huggingface_hub` and a download ask of the real one."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub(ThreadingHTTPServer):
    """Serves `files` as one repository; `cut` closes each download after so many bytes, `busy` answers 503 so often."""

    daemon_threads = True

    def __init__(self, repo: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repo = repo
        self.files: dict[str, bytes] = {}
        self.commit: str | None = "c" * 40  # None tells none, as servers that are no Hub
        self.cut: int | None = None
        self.busy = 0
        self.large = True  # files lie on another host and their SHA-256 is told, as the Hub does with large ones
        self.asked: list[tuple[str, str]] = []  # method and path
        self.tokens: list[str | None] = []  # Authorization of what was asked about the repository
        self.downloads: list[tuple[str, str | None, str | None]] = []  # path, Range, Authorization

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        hub = self.server
        hub.asked.append((self.command, self.path))
        if hub.busy:
            hub.busy -= 1
            self._send(503)
            return
        if self.path.startswith("/store/"):
            self._send_content({_sha256(data): data for data in hub.files.values()}[self.path.removeprefix("/store/")])
            return
        hub.tokens.append(self.headers.get("Authorization"))
        prefix = f"/{hub.repo}/resolve/"
        revision, _, name = self.path.removeprefix(prefix).partition("/")
        if not self.path.startswith(prefix):
            self._send(404, {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", hub.commit):
            self._send(404, {"X-Error-Code": "RevisionNotFound"})
        elif name not in hub.files:
            self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": hub.commit})
        elif hub.large:
            digest = _sha256(hub.files[name])
            size = str(len(hub.files[name]))
            headers = {"X-Repo-Commit": hub.commit, "X-Linked-Etag": f'"{digest}"', "X-Linked-Size": size}
            self._send(302, {**headers, "Location": f"http://localhost:{hub.server_address[1]}/store/{digest}"})
        elif body:
            self._send_content(hub.files[name])
        else:
            commit = {"X-Repo-Commit": hub.commit} if hub.commit else {}
            self._send(200, {**commit, "ETag": '"small"'}, length=len(hub.files[name]))

    def _send_content(self, content: bytes) -> None:
        wanted, version = self.headers.get("Range"), f'"{_sha256(content)[:16]}"'
        self.server.downloads.append((self.path, wanted, self.headers.get("Authorization")))
        start = 0
        if wanted and self.headers.get("If-Range") == version:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
        self._send(206 if start else 200, {"ETag": version}, length=len(content) - start)
        self.wfile.write(content[start:][: self.server.cut])

    def _send(self, status: int, headers: dict[str, str] | None = None, length: int = 0) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def run_hub(repo: str) -> Iterator[Hub]:
    """Run one for the length of a `with`."""
    hub = Hub(repo)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()

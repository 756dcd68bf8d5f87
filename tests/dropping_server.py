"""A web server on this machine that drops connections."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class DroppingServer(ThreadingHTTPServer):
    """Serves `content` under every path but /missing; understands Range and If-Range."""

    daemon_threads = True

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.content, self.version = content, '"1"'
        self.cut: int | None = None  # bytes after which each connection is closed
        self.broken = 0  # answers left that are 503
        self.ranges = True  # whether it goes on in the middle
        self.requests: list[str | None] = []  # the Range that each asked for
        self.paths: list[str] = []

    @property
    def address(self) -> str:
        """Its address, without a path."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: DroppingServer

    def do_GET(self):
        server = self.server
        server.paths.append(self.path)
        server.requests.append(self.headers.get("Range"))
        if self.path == "/missing":
            self.send_error(404)
            return
        if server.broken:
            server.broken -= 1
            self.send_error(503)
            return
        start = 0
        if self.headers.get("Range") and self.headers.get("If-Range") == server.version and server.ranges:
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
        body = server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", server.version)
        self.end_headers()
        self.wfile.write(body[: server.cut])

    def log_message(self, *_):
        pass


@contextmanager
def run_server(content: bytes) -> Iterator[DroppingServer]:
    """Run one for the length of a `with`."""
    server = DroppingServer(content)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()

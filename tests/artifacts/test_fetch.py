"""Fetching survives dropped connections and never accepts another file. The server is on this machine."""

from __future__ import annotations

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from varcli.artifacts.fetch import fetch
from varcli.errors import ArtifactError, IntegrityError

CONTENT = bytes(range(256)) * 4000  # 1 MB
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Serves `server.content`, closing each connection after `server.cut` bytes; understands Range and If-Range."""

    def do_GET(self):
        server = self.server
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


@pytest.fixture
def server():
    found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.content, found.version, found.cut, found.broken, found.ranges, found.requests = (
        CONTENT,
        '"1"',
        None,
        0,
        True,
        [],
    )
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    yield found
    found.shutdown()
    found.server_close()


def address(server, path="/file.npz") -> str:
    return f"http://127.0.0.1:{server.server_address[1]}{path}"


def test_a_file_is_fetched_once_and_its_checksum_pinned(server, tmp_path):
    entry = fetch(address(server), tmp_path / "file.npz")
    assert (tmp_path / "file.npz").read_bytes() == CONTENT
    assert (entry.size, entry.sha256) == (len(CONTENT), SHA256)
    assert fetch(address(server), tmp_path / "file.npz") == entry
    assert len(server.requests) == 1


def test_dropped_connections_go_on_where_they_stopped(server, tmp_path):
    server.cut = 300_000
    fetch(address(server), tmp_path / "file.npz", sha256=SHA256, pause=0)
    assert (tmp_path / "file.npz").read_bytes() == CONTENT
    assert server.requests == [None, "bytes=300000-", "bytes=600000-", "bytes=900000-"]


def test_a_later_call_goes_on_with_what_an_earlier_one_kept(server, tmp_path):
    server.cut, server.broken = 400_000, 0
    part = tmp_path / "file.npz.part"

    class Stop(Exception):
        pass

    def stop(step):
        if step.done >= 400_000:
            raise Stop

    with pytest.raises(Stop):
        fetch(address(server), tmp_path / "file.npz", on_step=stop, pause=0)
    assert part.stat().st_size == 400_000
    server.cut = None
    fetch(address(server), tmp_path / "file.npz", sha256=SHA256)
    assert server.requests[-1] == "bytes=400000-"
    assert not part.exists()


@pytest.mark.parametrize("reason", ["no ranges", "another version"])
def test_a_server_that_cannot_go_on_sends_it_all_again(server, tmp_path, reason):
    server.cut = 400_000
    server.ranges = reason != "no ranges"
    seen = []

    def change(step):
        seen.append(step.done)
        if step.message:
            server.cut = None
            if reason == "another version":
                server.version, server.content = '"2"', CONTENT[::-1]

    fetch(address(server), tmp_path / "file.npz", on_step=change, pause=0)
    assert (tmp_path / "file.npz").read_bytes() == server.content


def test_a_wrong_checksum_leaves_nothing(server, tmp_path):
    with pytest.raises(IntegrityError, match="expected"):
        fetch(address(server), tmp_path / "file.npz", sha256="0" * 64)
    assert not (tmp_path / "file.npz").exists()
    assert not (tmp_path / "file.npz.part").exists()


def test_a_file_that_changed_since_it_was_pinned_is_refused(server, tmp_path):
    target = tmp_path / "file.npz"
    fetch(address(server), target)
    target.write_bytes(b"other")
    with pytest.raises(IntegrityError):
        fetch(address(server), target)
    target.unlink()
    server.content = CONTENT[::-1]
    with pytest.raises(IntegrityError, match="is expected"):
        fetch(address(server), target)


def test_busy_servers_are_asked_again_and_missing_files_are_not(server, tmp_path):
    server.broken = 2
    fetch(address(server), tmp_path / "file.npz", sha256=SHA256, pause=0)
    assert len(server.requests) == 3
    with pytest.raises(ArtifactError, match="404"):
        fetch(address(server, "/missing"), tmp_path / "other", pause=0)
    assert len(server.requests) == 4
    server.broken = 100
    with pytest.raises(ArtifactError, match="503"):
        fetch(address(server), tmp_path / "third", attempts=2, pause=0)


def test_only_web_addresses_are_fetched(tmp_path):
    with pytest.raises(ArtifactError, match="http"):
        fetch("file:///etc/passwd", tmp_path / "x")

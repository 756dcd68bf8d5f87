"""Fetching survives dropped connections and never accepts another file. The server is on this machine."""

from __future__ import annotations

import hashlib
import threading

import pytest
from dropping_server import run_server

from varcli.artifacts.fetch import fetch
from varcli.artifacts.lock import lock_folder
from varcli.errors import ArtifactError, IntegrityError

CONTENT = bytes(range(256)) * 4000  # 1 MB
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server():
    with run_server(CONTENT) as found:
        yield found


def address(server, path="/file.npz") -> str:
    return server.address + path


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


def test_what_a_check_refuses_is_neither_kept_nor_pinned(server, tmp_path):
    def check(path):
        if path.read_bytes() != CONTENT[::-1]:
            raise ArtifactError("a login page")

    for _ in range(2):
        with pytest.raises(ArtifactError, match="login page"):
            fetch(address(server), tmp_path / "file.npz", check=check)
        assert not list(tmp_path.glob("file.npz")) + list(tmp_path.glob("*.part")) + list(tmp_path.glob("*.pin.json"))
    server.content = CONTENT[::-1]
    fetch(address(server), tmp_path / "file.npz", check=check)
    assert (tmp_path / "file.npz").read_bytes() == CONTENT[::-1]


def test_a_file_put_there_by_hand_is_checked_and_pinned_but_never_removed(server, tmp_path):
    def refuse(path):
        raise ArtifactError("another file")

    target = tmp_path / "file.npz"
    target.write_bytes(b"mine")
    with pytest.raises(ArtifactError, match="another file"):
        fetch(address(server), target, check=refuse)
    assert target.read_bytes() == b"mine" and not list(tmp_path.glob("*.pin.json"))
    fetch(address(server), target)
    target.write_bytes(b"yours")
    with pytest.raises(IntegrityError):
        fetch(address(server), target)
    assert not server.requests


def test_who_comes_second_waits_and_finds_the_file(server, tmp_path):
    heard, started = [], threading.Event()

    def tell(step):
        heard.append(step.message)
        started.set()

    second = threading.Thread(target=fetch, args=(address(server), tmp_path / "file.npz"), kwargs={"on_step": tell})
    with lock_folder(tmp_path):
        second.start()
        assert started.wait(10) and not server.requests
    second.join(10)
    assert "waiting for another process" in heard[0]
    assert (tmp_path / "file.npz").read_bytes() == CONTENT


def test_a_pinned_file_is_there_for_all_while_another_is_fetched(server, tmp_path):
    entry = fetch(address(server), tmp_path / "file.npz")
    with lock_folder(tmp_path):
        assert fetch(address(server), tmp_path / "file.npz") == entry

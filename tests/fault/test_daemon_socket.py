"""Who may come, where the daemon listens, and what keeps it from starting."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from kvstore.errors import DeadlineError, RefusedError
from kvstore.limits import TIB
from kvstore.protocol import messages as m
from kvstore.protocol.framing import FrameReader
from kvstore.transfer.arena import memory_limit_bytes
from tests.support.daemon import Daemon

USAGE = 2
FAILED = 1


def as_nobody(socket_path: Path) -> str:
    """Connect as another local user, read until the daemon closes, and return what came."""
    program = (
        "import os, socket, sys\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "peer = socket.socket(socket.AF_UNIX); peer.connect(sys.argv[1])\n"
        "print(b''.join(iter(lambda: peer.recv(65536), b'')).hex())\n"
    )
    command = [sys.executable, "-c", program, os.fspath(socket_path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_local_user_is_refused_by_credentials_and_logged_once(start_daemon):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "open.sock"
        daemon = start_daemon({"server.socket": path, "server.socket_mode": "0666"})
        Path(directory).chmod(0o755)
        for _ in range(3):
            body = bytes.fromhex(as_nobody(path))[4:]
            refusal = m.decode_reply(body)
            assert (refusal.request_id, refusal.code) == (0, RefusedError.code)
            assert "uid 65534" in refusal.message
        assert daemon.stats().counters["sessions_refused"] == 3
        events = [json.loads(line) for line in daemon.log().splitlines()]
        refused = [event for event in events if event["message"] == "user refused"]
        assert [event["uid"] for event in refused] == [65534]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_the_socket_itself_keeps_other_users_out_by_default(daemon):
    assert stat.S_IMODE(daemon.socket.stat().st_mode) == 0o660
    with pytest.raises(subprocess.CalledProcessError):
        as_nobody(daemon.socket)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_user_who_is_allowed_is_let_in(start_daemon):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "open.sock"
        settings = {"server.socket_mode": "0666", "server.allowed_uids": "[65534]"}
        daemon = start_daemon(
            {"server.socket": path, **settings}, limits={"HELLO_DEADLINE_SECONDS": 0.1}
        )
        Path(directory).chmod(0o755)
        (body,) = FrameReader().feed(bytes.fromhex(as_nobody(path)))
        assert m.decode_reply(body).code == DeadlineError.code
        assert daemon.stats().counters["sessions_refused"] == 0


def test_a_second_daemon_on_the_same_socket_is_refused_and_harms_nothing(daemon, tmp_path):
    second = Daemon(tmp_path, {"server.socket": daemon.socket})
    status, log = second.run_to_end()
    assert status == FAILED
    assert f"another daemon (pid {daemon.pid}) already serves {daemon.socket}" in log
    assert daemon.stats().pid == daemon.pid


def test_a_stale_socket_is_replaced(daemon, tmp_path):
    daemon.kill()
    assert daemon.socket.is_socket()
    with Daemon(tmp_path, {"server.socket": daemon.socket}) as successor:
        assert successor.stats().pid == successor.pid


def test_a_socket_path_taken_by_a_file_is_refused_and_the_file_stays(tmp_path):
    precious = tmp_path / "kvstore.sock"
    precious.write_text("precious")
    status, log = Daemon(tmp_path).run_to_end()
    assert status == USAGE
    assert f"{precious} exists and is not a socket" in log
    assert precious.read_text() == "precious"


def test_a_socket_path_that_is_too_long_is_refused(tmp_path):
    status, log = Daemon(tmp_path, {"server.socket": tmp_path / ("x" * 200)}).run_to_end()
    assert status == USAGE
    assert "at most 107 bytes" in log


def test_a_socket_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "kvstore.sock"
    status, log = Daemon(tmp_path, {"server.socket": path}).run_to_end()
    assert status == USAGE
    assert f"server.socket {path} cannot be used" in log


def test_the_socket_goes_with_the_daemon(daemon):
    assert daemon.stop() == 0
    assert not daemon.socket.exists()


def test_an_arena_larger_than_memory_is_refused_with_both_numbers(tmp_path):
    status, log = Daemon(tmp_path, {"tiers.host.capacity": "15TiB"}).run_to_end()
    assert status == USAGE
    assert str(15 * TIB) in log
    assert str(memory_limit_bytes()) in log
    assert not (tmp_path / "kvstore.sock").exists()


def test_an_arena_larger_than_its_file_system_is_refused_with_both_numbers(tmp_path):
    arena = "/dev/shm/kvstore-test-arena"
    settings = {"tiers.host.capacity": "15TiB", "tiers.host.arena": arena}
    status, log = Daemon(tmp_path, settings).run_to_end()
    assert status == USAGE
    assert re.search(rf"{15 * TIB} bytes, /dev/shm has room for \d+", log)
    assert not Path(arena).exists()
    assert not Path(f"{arena}.records").exists()


def test_an_unknown_setting_is_refused_with_the_nearest_name(tmp_path):
    status, log = Daemon(tmp_path, {"tiers.host.capasity": "1GiB"}).run_to_end()
    assert status == USAGE
    assert "tiers.host.capacity" in log

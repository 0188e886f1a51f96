"""What the daemon and systemd tell each other; the test plays systemd's part."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from kvstore.daemon.address import SocketAddress
from kvstore.daemon.systemd import take_sockets, watchdog_seconds
from kvstore.errors import ConfigError
from kvstore.limits import KIB, MIB
from tests.support.admin import READ, AdminClient, port_of, write_tokens
from tests.support.daemon import DEADLINE_SECONDS, REPOSITORY, Daemon
from tests.support.making import make_digests, make_manifest, sources_of
from tests.support.waiting import wait_until

USAGE = 2


class Systemd:
    """Listens to one daemon, and hands it sockets as sd_listen_fds(3) says."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = directory / "kvstore.toml"
        self.socket = directory / "kvstore.sock"
        self.ears = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.ears.bind(os.fspath(directory / "notify"))
        self.ears.settimeout(DEADLINE_SECONDS)

    def hear(self, wanted: str) -> dict[str, str]:
        """Wait for a message that has *wanted*, and return all that it says."""
        while True:
            said = dict(line.split("=", 1) for line in self.ears.recv(4096).decode().splitlines())
            if wanted in said:
                return said

    def configure(self, **tables: str) -> None:
        server = f'socket = "{self.socket}"\n' + tables.pop("server", "")
        host = 'capacity = "1MiB"\n' + tables.pop("host", "")
        tables = {"server": server, "tiers.host": host, "log": 'format = "json"\n'} | tables
        self.config.write_text("".join(f"[{name}]\n{text}\n" for name, text in tables.items()))

    def start(self, *listening: socket.socket, watchdog_seconds: float = 0.0) -> ServiceDaemon:
        return ServiceDaemon(self, listening, watchdog_seconds)


class ServiceDaemon(Daemon):
    """A daemon with the environment and the descriptors of a service."""

    def __init__(self, systemd: Systemd, listening: tuple[socket.socket, ...], watchdog: float):
        super().__init__(systemd.directory, {"server.socket": systemd.socket})
        # From the shell's exec on it has the pid that the variables name.
        handing = "".join(f"{3 + n}<&{one.fileno()} " for n, one in enumerate(listening))
        variables = f"NOTIFY_SOCKET={systemd.directory}/notify "
        if watchdog:
            variables += f"WATCHDOG_USEC={int(watchdog * 1e6)} WATCHDOG_PID=$$ "
        if listening:
            variables += f"LISTEN_FDS={len(listening)} LISTEN_PID=$$ "
        program = f"exec {sys.executable} -m kvstore serve --config {systemd.config}"
        self._command = ["bash", "-c", f"export {variables}; {program} {handing}"]
        self._fds = [one.fileno() for one in listening]

    def launch(self) -> None:
        """Start it as systemd would: with nothing of ours but the sockets."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("KVSTORE_")}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=REPOSITORY,
                env=kept,
                stdin=subprocess.DEVNULL,
                stderr=log,
                pass_fds=self._fds,
            )


@pytest.fixture
def systemd(tmp_path):
    playing = Systemd(tmp_path)
    playing.configure()
    with playing.ears:
        yield playing


def listen(path: Path) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(os.fspath(path))
    listening.listen()
    return listening


def events(daemon: Daemon, message: str) -> list[dict[str, object]]:
    found = [json.loads(line) for line in daemon.log().splitlines() if line.startswith("{")]
    return [event for event in found if event["message"] == message]


def test_it_says_when_it_is_ready_and_when_it_stops(systemd):
    with systemd.start() as daemon:
        assert systemd.hear("READY") == {"READY": "1", "STATUS": "serving 1MiB"}
        assert daemon.stop() == 0
        assert systemd.hear("STOPPING")["STOPPING"] == "1"


def test_it_feeds_the_watchdog_for_as_long_as_its_loop_turns(systemd):
    with systemd.start(watchdog_seconds=0.2) as daemon:
        for _ in range(3):
            assert systemd.hear("WATCHDOG") == {"WATCHDOG": "1"}
        daemon.send(signal.SIGSTOP)
        systemd.ears.settimeout(1.0)
        with pytest.raises(TimeoutError):
            systemd.hear("anything else")


def test_nobody_is_fed_who_does_not_watch(monkeypatch):
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    assert watchdog_seconds() is None
    monkeypatch.setenv("WATCHDOG_USEC", "3000000")
    assert watchdog_seconds() == 3.0
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid() + 1))
    assert watchdog_seconds() is None


def test_a_socket_that_is_handed_over_is_served_and_outlives_the_daemon(systemd):
    with listen(systemd.socket) as listening:
        # Connected before the daemon exists: it waits, and is not refused.
        early = socket.socket(socket.AF_UNIX)
        early.connect(os.fspath(systemd.socket))
        inode = systemd.socket.stat().st_ino
        for _ in range(2):
            with systemd.start(listening) as daemon:
                assert systemd.hear("READY")
                assert daemon.stats().state == "ready"
                assert daemon.stop() == 0
            assert systemd.socket.stat().st_ino == inode
        early.close()


def test_a_socket_elsewhere_than_configured_is_refused_by_name(systemd, tmp_path):
    with listen(tmp_path / "other.sock") as listening:
        status, log = systemd.start(listening).run_to_end()
    assert status == USAGE
    assert f"systemd listens on {tmp_path}/other.sock, server.socket is {systemd.socket}" in log
    with socket.socket() as internet:
        internet.bind(("127.0.0.1", 0))
        with pytest.raises(ConfigError, match=r"systemd listens on AF_INET \('127.0.0.1'"):
            SocketAddress(systemd.socket, 0o660, [internet]).bind()


def test_sockets_for_another_process_are_left_alone():
    for pid in (str(os.getpid() + 1), "nonsense"):
        environ = {"LISTEN_FDS": "1", "LISTEN_PID": pid, "LISTEN_FDNAMES": "x"}
        assert take_sockets(environ) == []
        assert environ == {}


def test_sighup_applies_what_it_can_and_names_what_waits(systemd):
    with systemd.start() as daemon:
        systemd.hear("READY")
        systemd.configure(
            server='allowed_uids = [4242]\nsessions_max = 1\ndrain_timeout = "1s"\n',
            host='eviction = "lru"\n',
        )
        daemon.send(signal.SIGHUP)
        assert int(systemd.hear("RELOADING")["MONOTONIC_USEC"]) > 0
        assert systemd.hear("READY") == {"READY": "1"}
        (event,) = events(daemon, "configuration reloaded")
        assert event["applied"] == (
            "server.allowed_uids, server.sessions_max, server.drain_timeout"
        )
        assert event["needs_restart"] == "tiers.host.eviction"
        with daemon.connect("only"):
            assert not daemon._answers()
        assert daemon.stop() == 0


def test_quotas_change_and_tenants_that_come_or_go_wait(systemd):
    quota = 'quota = "64KiB"\n'
    systemd.configure(**{"tenants.blue": quota, "tenants.red": quota})
    with systemd.start() as daemon:
        systemd.hear("READY")
        blue = 'quota = "96KiB"\nfloor = "32KiB"\nshared = true\nuids = [4242]\n'
        systemd.configure(**{"tenants.blue": blue, "tenants.green": quota})
        daemon.send(signal.SIGHUP)
        systemd.hear("RELOADING")
        systemd.hear("READY")
        (event,) = events(daemon, "configuration reloaded")
        assert event["applied"] == "tenants.blue.uids, tenants.blue.quota, tenants.blue.floor"
        waiting = event["needs_restart"].split(", ")
        assert {"tenants.blue.shared", "tenants.red.quota", "tenants.green.quota"} < set(waiting)
        shares = {one.tenant: (one.quota_bytes, one.floor_bytes) for one in daemon.stats().tenants}
        assert shares == {"": (MIB, 0), "blue": (96 * KIB, 32 * KIB), "red": (64 * KIB, 0)}


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ({"server": "sessions_min = 1\n"}, "unknown setting server.sessions_min"),
        ({"tenants.blue": 'floor = "2MiB"\n'}, "the floors of all tenants on the host tier"),
    ],
)
def test_a_configuration_with_a_mistake_changes_nothing(systemd, tmp_path, mistake, said):
    tokens = write_tokens(tmp_path / "tokens")
    admin = {"admin": f'listen = "127.0.0.1:0"\ntoken_file = "{tokens}"\n'}
    admin |= {"tenants.blue": 'floor = "32KiB"\n'}
    systemd.configure(**admin)
    with systemd.start() as daemon:
        systemd.hear("READY")
        api = AdminClient(port_of(daemon))
        tokens.write_text(f"admin {'n' * 40}\n")
        server = "sessions_max = 1\n" + mistake.pop("server", "")
        systemd.configure(**(admin | {"server": server} | mistake))
        daemon.send(signal.SIGHUP)
        systemd.hear("RELOADING")
        assert said in systemd.hear("READY")["STATUS"]
        (event,) = events(daemon, "configuration not reloaded")
        assert event["severity"] == "ERROR"
        with daemon.connect(), daemon.connect():
            assert api.get("/v1/status", token=READ).status == 200
            assert api.post("/v1/config/reload", token="n" * 40).status == 401


def test_a_restart_keeps_the_host_tier_when_its_arena_is_a_file(systemd, tmp_path):
    systemd.configure(host=f'capacity = "{4 * MIB}"\narena = "{tmp_path}/memory/arena"\n')
    systemd.config.write_text(systemd.config.read_text().replace('capacity = "1MiB"\n', ""))
    manifest, digests = make_manifest(), make_digests(3)
    with systemd.start() as daemon, daemon.connect() as client:
        client.attach(manifest).store(digests, sources_of(manifest, digests))
    with systemd.start() as daemon, daemon.connect() as client:
        assert client.attach(manifest).lookup(digests).hits == 3


def test_events_for_the_journal_carry_their_priority_and_no_time(systemd):
    systemd.configure(log='format = "text"\n')
    with systemd.start() as daemon:
        daemon.stop()
        log = systemd.directory / "daemon.log"
        log.write_text("")
        found = log.stat()
        daemon._command[2] = (
            f"export JOURNAL_STREAM={found.st_dev}:{found.st_ino}; {daemon._command[2]}"
        )
        daemon.launch()
        daemon.wait_ready()
        daemon.send(signal.SIGHUP)
        wait_until(lambda: "reloaded" in daemon.log(), what="it reloads")
    lines = daemon.log().splitlines()
    assert lines[0].startswith("<6>INFO app ready socket=")
    assert all(line.startswith("<") for line in lines)

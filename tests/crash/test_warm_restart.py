"""A daemon whose arena is a file: the next one serves what this one did, however it ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvstore.client.cache import PrefixCache
from tests.support.daemon import REPOSITORY, Daemon
from tests.support.holder import MANIFEST as HELD, RESERVED, STORED
from tests.support.making import empty_targets, make_digests, make_manifest, sources_of
from tests.support.waiting import wait_until
from tests.support.workload import Wrongs, digests_of, engines, payload_of

MANIFEST = make_manifest(model="warm")
DIGESTS = make_digests(40, prompt=7)


@pytest.fixture
def arena(tmp_path) -> Path:
    return tmp_path / "memory" / "arena"


@pytest.fixture
def start(start_daemon, arena):
    """Return a function that starts a daemon over the kept arena."""

    def start_over(settings: dict[str, object] | None = None, **options: object) -> Daemon:
        kept = {"tiers.host.arena": arena, "tiers.host.capacity": "4MiB"}
        return start_daemon(kept | (settings or {}), **options)

    return start_over


def store(daemon: Daemon) -> int:
    with daemon.connect() as client:
        return client.attach(MANIFEST).store(DIGESTS, sources_of(MANIFEST, DIGESTS)).stored


def load(daemon: Daemon, digests=DIGESTS) -> int:
    """Load what there is and check every byte; return how many chunks."""
    with daemon.connect() as client, client.attach(MANIFEST).load(digests) as loaded:
        buffers, targets = empty_targets(MANIFEST, len(loaded))
        loaded.copy_to(targets)
    for digest, buffer in zip(digests, buffers, strict=False):
        assert buffer == payload_of(digest, len(buffer))
    return len(buffers)


def cold_lines(daemon: Daemon) -> list[str]:
    return [line for line in daemon.log().splitlines() if "host tier starts cold" in line]


def restart(daemon: Daemon, *, kill: bool = False) -> None:
    daemon.end(signal.SIGKILL if kill else signal.SIGTERM)
    daemon.launch()
    daemon.wait_ready()


@pytest.mark.parametrize("kill", [False, True])
def test_a_restarted_daemon_serves_every_chunk_of_the_one_before_it(start, arena, kill):
    daemon = start()
    assert (store(daemon), load(daemon)) == (40, 40)
    for _ in range(3):
        restart(daemon, kill=kill)
        assert load(daemon) == 40
        assert daemon.stats().arena.kind == "file"
    assert daemon.log().count("host tier is warm") == 3
    assert not cold_lines(daemon)
    daemon.stop()
    assert arena.exists()


@pytest.mark.timeout(300)
@pytest.mark.slow
@pytest.mark.parametrize("times", [8])
def test_after_kill_nine_under_load_every_byte_is_right_and_the_tier_is_warm(start, times):
    daemon = start()
    wrongs = Wrongs()
    caches = [
        PrefixCache(MANIFEST, socket=daemon.socket, timeout_seconds=2.0, name=str(n))
        for n in range(3)
    ]
    with contextlib.ExitStack() as stack:
        for cache in caches:
            stack.enter_context(cache)
        crew = stack.enter_context(engines(caches, wrongs))
        for _ in range(times):
            before = [engine.loaded for engine in crew]
            wait_until(
                lambda before=before: (
                    wrongs.found
                    or all(
                        engine.loaded > old + 8 for engine, old in zip(crew, before, strict=True)
                    )
                ),
                what="all engines have loaded",
            )
            daemon.kill()
            daemon.launch()
            daemon.wait_ready()
    assert wrongs.found == []
    assert daemon.log().count("host tier is warm") == times
    assert "Traceback" not in daemon.log()
    held = [load(daemon, digests_of(prompt)) for prompt in range(40)]
    assert any(held)
    restart(daemon, kill=True)
    assert [load(daemon, digests_of(prompt)) for prompt in range(40)] == held
    with daemon.connect() as client:
        # Nothing is left of all the reservations that kills have cut off.
        wait_until(
            lambda: client.stats().tiers[0].used_bytes == client.stats().tiers[0].chunks * 9 * 4096,
            what="what was being written is free",
        )


def test_a_client_that_writes_across_a_restart_keeps_its_room_to_itself(start):
    daemon = start({"leases.orphan_grace": "10min"})
    command = [sys.executable, "-m", "tests.support.holder", str(daemon.socket)]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout.readline() == b"holding\n"
        restart(daemon, kill=True)
        restart(daemon)
        with daemon.connect() as client:
            space = client.attach(HELD)
            # What it had committed is served, what it was writing is not, nor is its room given.
            assert space.lookup(STORED).hits == 3
            assert space.lookup(RESERVED).hits == 0
            assert client.stats().tiers[0].used_bytes == 9 * 9 * 4096
            everything = make_digests(200, prompt=3)
            space.store(everything, sources_of(HELD, everything))
            chunks = client.stats().tiers[0].chunks
            assert client.stats().tiers[0].used_bytes == (chunks + 6) * 9 * 4096
            holder.kill()
            wait_until(
                lambda: client.stats().tiers[0].used_bytes == chunks * 9 * 4096,
                what="its room is free",
            )


def test_room_of_a_writer_that_died_with_the_daemon_is_free_at_once(start):
    daemon = start({"leases.orphan_grace": "10min"})
    command = [sys.executable, "-m", "tests.support.holder", str(daemon.socket)]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout.readline() == b"holding\n"
        daemon.kill()
        holder.kill()
    daemon.launch()
    daemon.wait_ready()
    wait_until(lambda: daemon.used_bytes() == 3 * 9 * 4096, what="its room is free")


def test_room_of_a_writer_that_lives_on_is_free_after_the_grace(start):
    daemon = start({"leases.orphan_grace": "0s"})
    command = [sys.executable, "-m", "tests.support.holder", str(daemon.socket)]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout.readline() == b"holding\n"
        restart(daemon, kill=True)
        wait_until(lambda: daemon.used_bytes() == 3 * 9 * 4096, what="its room is free")
        holder.kill()


@pytest.mark.parametrize("verifies", ["true", "false"])
def test_bytes_that_have_changed_are_never_served(start, arena, verifies):
    daemon = start({"tiers.host.verify_load": verifies})
    store(daemon)
    daemon.kill()
    spoiled = payload_of(DIGESTS[5], MANIFEST.chunk_bytes)
    content = bytearray(arena.read_bytes())
    content[content.index(spoiled) + 1000] ^= 1
    with arena.open("r+b") as file:
        file.write(content)
    daemon.launch()
    daemon.wait_ready()
    with daemon.connect() as client:
        wait_until(lambda: client.stats().counters["checksum_failures"] == 1, what="it is found")
        space = client.attach(MANIFEST)
        wait_until(lambda: space.lookup(DIGESTS[6:]).hits == 34, what="all others are served")
    assert load(daemon) == 5


# --- versions ---------------------------------------------------------------------------------


OTHER_VERSION = """
import sys
import kvstore
kvstore.__version__ = "99.0"
from kvstore import cli
sys.exit(cli.main(sys.argv[1:]))
"""


def test_another_version_of_the_same_format_goes_on_where_this_one_stopped(start):
    daemon = start()
    ours = list(daemon._command)
    theirs = [ours[0], "-c", OTHER_VERSION, *ours[ours.index("kvstore") + 1 :]]
    store(daemon)
    for command, version in ((theirs, "99.0"), (ours, None), (theirs, "99.0")):
        daemon._command = command
        restart(daemon, kill=version is None)
        assert (daemon.stats().version == "99.0") is (version is not None)
        assert load(daemon) == 40
    assert not cold_lines(daemon)


def test_another_format_starts_cold_with_one_clear_line(start, arena):
    daemon = start()
    store(daemon)
    daemon.stop()
    records = arena.with_name("arena.records")
    with records.open("r+b") as file:
        file.seek(8)
        file.write((77).to_bytes(4, "little"))
    daemon.launch()
    daemon.wait_ready()
    (line,) = cold_lines(daemon)
    assert "its records have format 77, this version reads format 1" in line
    assert load(daemon) == 0
    assert store(daemon) == 40
    restart(daemon)
    assert load(daemon) == 40


def test_another_capacity_starts_cold_with_one_clear_line(start, arena):
    daemon = start()
    store(daemon)
    daemon.stop()
    other = start({"tiers.host.capacity": "8MiB"})
    (line,) = cold_lines(other)
    assert f"it has {4 << 20} bytes, tiers.host.capacity is {8 << 20}" in line
    assert load(other) == 0
    assert arena.stat().st_size == 8 << 20


@pytest.mark.parametrize("part", ["arena", "arena.records"])
@pytest.mark.parametrize("harm", ["cut", "noise", "gone"])
def test_whatever_becomes_of_the_files_costs_their_content_and_nothing_else(
    start, arena, part, harm
):
    daemon = start()
    store(daemon)
    daemon.kill()
    file = arena.with_name(part)
    match harm:
        case "cut":
            os.truncate(file, 5000)
        case "noise":
            file.write_bytes(os.urandom(file.stat().st_size))
        case "gone":
            file.unlink()
    daemon.launch()
    daemon.wait_ready()
    assert load(daemon) == 0
    assert store(daemon) == 40
    restart(daemon, kill=True)
    assert load(daemon) == 40
    assert "Traceback" not in daemon.log()


# --- what is refused ----------------------------------------------------------------------------


def test_two_daemons_never_share_one_arena(start, start_daemon, arena, tmp_path):
    daemon = start()
    store(daemon)
    (tmp_path / "second").mkdir()
    second = Daemon(tmp_path / "second", {"tiers.host.arena": arena, "tiers.host.capacity": "4MiB"})
    status, log = second.run_to_end()
    assert status != 0
    assert f"{arena}.records is in use by another daemon" in log
    assert load(daemon) == 40


def test_a_file_that_is_not_ours_is_refused_and_left(arena, tmp_path):
    arena.parent.mkdir()
    arena.write_bytes(b"precious")
    arena.chmod(0o644)
    (tmp_path / "refused").mkdir()
    status, log = Daemon(tmp_path / "refused", {"tiers.host.arena": arena}).run_to_end()
    assert status != 0
    assert f"{arena} has mode 0644, ours have 0600" in log
    assert arena.read_bytes() == b"precious"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_another_users_file_is_refused_and_left(arena, tmp_path):
    arena.parent.mkdir()
    arena.write_bytes(b"precious")
    arena.chmod(0o600)
    os.chown(arena, 12345, 12345)
    (tmp_path / "refused").mkdir()
    status, log = Daemon(tmp_path / "refused", {"tiers.host.arena": arena}).run_to_end()
    assert status != 0
    assert f"{arena} belongs to uid 12345, not to 0" in log
    assert arena.read_bytes() == b"precious"


def test_without_checksums_nothing_is_kept(start, arena):
    daemon = start({"tiers.host.checksum": "off"})
    with daemon.connect() as client:
        space = client.attach(MANIFEST)
        assert space.store(DIGESTS, sources_of(MANIFEST, DIGESTS)).stored == 40
    daemon.kill()
    daemon.launch()
    daemon.wait_ready()
    (line,) = cold_lines(daemon)
    assert "tiers.host.checksum is off" in line
    assert daemon.used_bytes() == 0
    daemon.stop()
    assert not arena.exists()

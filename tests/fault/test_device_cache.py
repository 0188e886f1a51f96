"""An engine's pages on a device, and a live daemon: what is loaded is right or it is a miss.

The device is the stand-in. Every way in which it or the daemon fails has a name, a counter, an
end, and leaves nothing behind.
"""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from kvstore.client.sync import StoreReport
from kvstore.errors import RequestError
from kvstore.gpu.device import DeviceMemoryError
from kvstore.gpu.lanes import LaneSettings
from kvstore.gpu.standin import Standin
from kvstore.types import HeadRange
from tests.support.daemon import REPOSITORY, Daemon
from tests.support.device_engine import CHUNK_BYTES, MANIFEST, DeviceEngine, Impatience, patient
from tests.support.making import empty_targets, make_digests, make_payload, sources_of
from tests.support.waiting import wait_until

DIGESTS = make_digests(7)


def standin(seed: int = 0, **words: bool) -> Standin:
    return Standin(np.random.default_rng(seed), **words)


SETTINGS = {"tiers.host.verify_commit": "full", "leases.orphan_grace": "10min"}


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with Daemon(tmp_path_factory.mktemp("device"), SETTINGS) as started:
        yield started


@pytest.fixture
def plain(running):
    """A session that has no device."""
    with running.connect() as client:
        yield client, client.attach(MANIFEST)


@pytest.fixture
def daemon(running, plain):
    """The daemon of all these tests, with nothing in it."""
    _, space = plain
    space.delete(make_digests(8))
    return running


def assert_nothing_is_held(plain) -> None:
    client, _ = plain
    wait_until(lambda: client.stats().reservations == client.stats().leases == 0)


def assert_served(plain, count: int) -> None:
    """Assert that *count* chunks are what they must be, also to who has no device."""
    _, space = plain
    rooms, targets = empty_targets(MANIFEST, count)
    with space.load(DIGESTS[:count]) as loaded:
        loaded.copy_to(targets)
    for digest, room in zip(DIGESTS, rooms, strict=False):
        assert bytes(room) == make_payload(digest, CHUNK_BYTES)


# --- what it does -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("way", ["staged", "direct", "unregistered"])
def test_chunks_go_from_pages_to_the_daemon_and_back(daemon, plain, way: str, seed: int) -> None:
    device = standin(seed)
    if way == "unregistered":
        device.fail("register", after=1, times=1)
    direct = 1 if way == "direct" else None
    told = LaneSettings(4 * CHUNK_BYTES, 2, direct_page_min_bytes=direct, wait=patient)
    with DeviceEngine(daemon.socket, seed=seed, device=device, settings=told) as engine:
        assert engine.store(DIGESTS) == StoreReport(7, 0, 0, 7 * CHUNK_BYTES)
        assert engine.store(DIGESTS) == StoreReport(0, 7, 0, 0)
        assert engine.load(DIGESTS) == 7
        counters = engine.on_gpu.counters
        assert counters.chunks_stored == counters.chunks_loaded == 7
        assert (counters.direct_chunks > 0) == (way == "direct")
        assert counters.registrations_failed == (way == "unregistered")
        if way == "unregistered":
            assert counters.bounced_chunks > 0
    # Who has no device gets the same bytes.
    assert_served(plain, 7)
    assert_nothing_is_held(plain)


def test_chunks_of_engines_without_a_device_are_loaded_also_from_shards(daemon, plain) -> None:
    _, space = plain
    first, rest = DIGESTS[:2], DIGESTS[2:4]
    space.store(first, sources_of(MANIFEST, first))
    halves = [HeadRange(0, 2), HeadRange(2, 4)]
    for half in halves:
        with DeviceEngine(daemon.socket, heads=half) as rank:
            for number, digest in enumerate(rest):
                shape = (len(rank.layout.planes), MANIFEST.kv_heads, -1)
                whole = np.frombuffer(make_payload(digest, CHUNK_BYTES), np.uint8).reshape(shape)
                rank.put(number, whole[:, half.start : half.stop].tobytes())
            report = rank.on_gpu.store(rest, rank.pages[:2], parent=first[-1], after=rank.fence())
            assert report.stored == 2
    with DeviceEngine(daemon.socket) as engine:
        assert engine.load(DIGESTS) == 4
        assert engine.on_gpu.counters.host_decoded_chunks == 2


def test_a_store_without_room_says_so(daemon) -> None:
    many = make_digests(8)
    with daemon.connect() as client:
        space = client.attach(MANIFEST)
        held = make_digests(455, prompt=5)
        with space.reserve(held), DeviceEngine(daemon.socket) as engine:
            report = engine.store(many)
        assert report.stored + report.refused == 8
        assert report.refused > 0


def test_layouts_that_are_not_the_chunks_are_refused(daemon) -> None:
    from dataclasses import replace

    from kvstore.client.gpu import DeviceCache

    with DeviceEngine(daemon.socket) as engine:
        other = replace(engine.layout, pages_per_chunk=2)
        with pytest.raises(RequestError, match="pages make chunks of"):
            DeviceCache(engine.cache, engine.device, other)
        with pytest.raises(RequestError, match="multiple of 16"):
            replace(engine.layout, row_bytes=24)


# --- bytes that are wrong -------------------------------------------------------------------


def test_damage_is_found_by_the_device_and_the_chunk_computed_anew(daemon, plain) -> None:
    _, space = plain
    with DeviceEngine(daemon.socket) as engine:
        engine.store(DIGESTS)
        with space.load(DIGESTS) as loaded:
            offset = loaded.chunks[3].shards[0].offset
        space.attached.arena.view[offset + 100] ^= 1
        assert engine.load(DIGESTS) == 3
        assert engine.on_gpu.counters.damaged_chunks == 1
        assert engine.cache.lookup(DIGESTS) == 3
        assert engine.store(DIGESTS) == StoreReport(1, 6, 0, CHUNK_BYTES)
        assert engine.load(DIGESTS) == 7
    assert_nothing_is_held(plain)


# --- a device that fails ----------------------------------------------------------------------


def test_little_device_memory_makes_a_smaller_ring_and_none_an_error(daemon) -> None:
    device = standin()
    device.memory_bytes_max = 8 * CHUNK_BYTES + 8 * CHUNK_BYTES
    told = LaneSettings(64 * CHUNK_BYTES, 4, wait=patient)
    with DeviceEngine(daemon.socket, device=device, settings=told) as engine:
        assert engine.on_gpu.counters.smaller_rings > 0
        assert engine.store(DIGESTS).stored == 7
        assert engine.load(DIGESTS) == 7
        used = device.used_bytes
        device.memory_bytes_max = used + CHUNK_BYTES // 2
        with pytest.raises(DeviceMemoryError, match="room to stage one chunk"):
            DeviceEngine(daemon.socket, device=device, settings=told, chunks=0)
        assert device.used_bytes == used


@pytest.mark.parametrize(
    ("fault", "after"),
    [("launch", 0), ("launch", 2), ("launch", 3), *(("copy", n) for n in (0, 2, 4))],
)
def test_a_call_that_fails_costs_its_transfer_and_no_more(
    daemon, plain, fault: str, after: int
) -> None:
    with DeviceEngine(daemon.socket, seed=after) as engine:
        engine.device.fail(fault, after=after)
        report = engine.store(DIGESTS)
        assert report.stored < 7
        assert report.stored + report.refused == 7
        assert engine.on_gpu.counters.failed_transfers == 1
        assert_nothing_is_held(plain)
        assert engine.store(DIGESTS).stored == 7 - report.stored
        engine.device.fail(fault, after=after)
        assert engine.load(DIGESTS) < 7
        assert engine.on_gpu.counters.failed_transfers == 2
        assert_nothing_is_held(plain)
        assert engine.load(DIGESTS) == 7
        assert engine.on_gpu.off == ""


def test_a_device_that_keeps_failing_is_left_alone(daemon) -> None:
    with DeviceEngine(daemon.socket) as engine:
        engine.device.fail("launch", times=1000)
        for _ in range(10):
            assert engine.store(DIGESTS).stored == 0
        assert "in a row failed" in engine.on_gpu.off
        assert engine.store(DIGESTS) == StoreReport(0, 0, 7, 0)


@pytest.mark.parametrize("after", range(0, 8, 3))
def test_a_lost_device_turns_everything_into_misses_and_nothing_is_published(
    daemon, plain, after: int
) -> None:
    _, space = plain
    with DeviceEngine(daemon.socket, seed=after) as engine:
        engine.store(DIGESTS[:2])
        engine.device.fail("lost", after=after)
        engine.store(DIGESTS)
        engine.on_gpu.load(DIGESTS, engine.pages[:7])
        engine.device.lose()
        assert engine.on_gpu.load(DIGESTS, engine.pages[:7]) == 0
        assert engine.on_gpu.store(DIGESTS, engine.pages[:7]).stored == 0
        assert engine.on_gpu.off
        assert engine.on_gpu.counters.lost_devices >= 1
    # What was published is right; the rest is as if it had never been stored.
    assert_served(plain, space.lookup(DIGESTS).hits)


def test_a_stuck_store_keeps_its_room_until_it_is_over(daemon, plain) -> None:
    client, _ = plain
    told = LaneSettings(4 * CHUNK_BYTES, 2, wait=Impatience(5))
    with DeviceEngine(daemon.socket, settings=told) as engine:
        engine.device.stall()
        assert engine.store(DIGESTS).stored == 0
        assert engine.on_gpu.counters.stuck_transfers > 0
        held = engine.on_gpu.held
        assert held == 2
        assert client.stats().reservations == 4
        assert engine.store(DIGESTS).stored == 0  # no slot is free, and nothing waits for one
        engine.device.resume()
        engine.device.drain()
        assert engine.on_gpu.held == 0
        assert_nothing_is_held(plain)
        engine.on_gpu._stores.settings = told._replace(wait=patient)
        assert engine.store(DIGESTS).stored == 7


def test_a_stuck_load_keeps_its_lease_until_it_is_over(daemon, plain) -> None:
    client, space = plain
    told = LaneSettings(8 * CHUNK_BYTES, 2, wait=Impatience(5))
    space.store(DIGESTS, sources_of(MANIFEST, DIGESTS))
    with DeviceEngine(daemon.socket, settings=told) as engine:
        engine.device.stall()
        assert engine.on_gpu.load(DIGESTS, engine.pages[:7], after=engine.fence()) == 0
        assert client.stats().leases == 1
        assert space.delete(DIGESTS).busy == 7
        engine.device.resume()
        engine.device.drain()
        assert engine.on_gpu.held == 0
        assert_nothing_is_held(plain)
        engine.on_gpu._loads.settings = told._replace(wait=patient)
        assert engine.load(DIGESTS) == 7


# --- a daemon or an engine that dies ------------------------------------------------------------


def test_a_daemon_killed_in_mid_transfer_is_a_miss_and_the_next_one_is_used(start_daemon) -> None:
    daemon = start_daemon(SETTINGS)
    with DeviceEngine(daemon.socket) as engine:
        engine.store(DIGESTS[:2])
        lanes = (engine.on_gpu._stores, engine.on_gpu._loads)
        calls = (lambda: engine.store(DIGESTS).stored, lambda: engine.load(DIGESTS[:2]))
        for lane, call in zip(lanes, calls, strict=True):

            def kill_first(event: object, lane=lane) -> None:
                daemon.kill()
                lane.settings = engine.settings
                patient(event)

            lane.settings = engine.settings._replace(wait=kill_first)
            # Bytes that have come are right, whoever sent them; nothing that was sent is kept.
            assert call() in {0, 2}
            assert engine.load(DIGESTS) == 0
            assert not engine.cache.is_connected
            daemon.launch()
            daemon.wait_ready()
            wait_until(lambda: engine.cache.is_connected, what="connected again")
            assert engine.store(DIGESTS).stored == 7
            assert engine.load(DIGESTS) == 7
        # The arenas of daemons that are gone are not registered any more.
        assert engine.on_gpu.off == ""
        assert len(engine.on_gpu._arenas._known) == 1


def test_an_engine_killed_in_mid_transfer_leaves_nothing_behind(daemon, plain) -> None:
    client, space = plain
    command = [sys.executable, "-m", "tests.support.device_engine", str(daemon.socket)]
    before = client.stats().tiers[0].used_bytes
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"stuck\n"
        assert client.stats().reservations == 8
        process.kill()
    wait_until(lambda: client.stats().tiers[0].used_bytes == before, what="its room is free")
    assert space.lookup(make_digests(8)).hits == 0
    assert_nothing_is_held(plain)

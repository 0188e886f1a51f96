"""Engines of two processes and a daemon with a pool of device memory: nothing is wrong or stays.

The device is the stand-in, here and in the daemon: what one process puts into the pool the other
reads there, and the daemon copies it down.
"""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvstore.app import open_tiers
from kvstore.client.sync import StoreReport
from kvstore.config import load
from kvstore.errors import ConfigError
from kvstore.gpu.pools import PoolError, Pools
from kvstore.gpu.standin import Standin
from kvstore.protocol import messages as m
from tests.support.daemon import REPOSITORY, Daemon
from tests.support.device_engine import CHUNK_BYTES, MANIFEST, DeviceEngine
from tests.support.making import empty_targets, make_digests, make_payload
from tests.support.waiting import DEADLINE_SECONDS, wait_until

DIGESTS = make_digests(8)
SETTINGS = {
    "tiers.device.gpu": "standin",
    "tiers.device.capacity": 12 * CHUNK_BYTES,
    "leases.orphan_grace": "10min",
}


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with Daemon(tmp_path_factory.mktemp("pool"), SETTINGS) as started:
        yield started


@pytest.fixture
def plain(running):
    with running.connect() as client:
        yield client, client.attach(MANIFEST)


@pytest.fixture
def daemon(running, plain):
    """The daemon of most of these tests, with nothing in it."""
    _, space = plain
    for prompt in range(4):
        mine = make_digests(8, prompt)
        wait_until(lambda mine=mine: not space.delete(mine).busy, what="all are deleted")
    return running


def pool_of(client):
    (tier,) = [tier for tier in client.stats().tiers if tier.tier == "device"]
    return tier


@contextlib.contextmanager
def other_engine(daemon: Daemon, task: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run an engine in a process of its own, up to the point where it says that it is there."""
    command = [sys.executable, "-m", "tests.support.device_engine", str(daemon.socket), task]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == f"{task}\n".encode()
        yield process
        process.kill()


def test_what_one_process_stores_in_the_pool_another_loads_from_it(daemon, plain) -> None:
    client, space = plain
    before = pool_of(client).counters
    with other_engine(daemon, "stored") as process:
        assert pool_of(client).counters["stored_chunks"] == before["stored_chunks"] + 8
        with DeviceEngine(daemon.socket) as engine:
            assert engine.load(DIGESTS) == 8
            process.kill()
            process.wait()
            # What it has stored is the daemon's.
            assert engine.load(DIGESTS) == 8
            assert engine.store(DIGESTS) == StoreReport(0, 8, 0, 0)
            assert engine.on_gpu.counters.damaged_chunks == 0
    after = pool_of(client)
    assert after.counters["loaded_chunks"] == before["loaded_chunks"] + 16
    # It is copied down, and who has no device gets the same bytes.
    wait_until(lambda: client.stats().tiers[0].chunks == 8, what="it is in the host tier")
    rooms, targets = empty_targets(MANIFEST, 8)
    with space.load(DIGESTS) as loaded:
        loaded.copy_to(targets)
    assert [bytes(room) for room in rooms] == [make_payload(d, CHUNK_BYTES) for d in DIGESTS]
    assert after.used_bytes == 8 * CHUNK_BYTES
    assert space.lookup(DIGESTS).tiers == [(3, 8)]


def test_what_leaves_the_pool_is_loaded_from_the_host_tier(daemon, plain) -> None:
    client, space = plain
    prompts = [make_digests(8, prompt) for prompt in range(3)]
    with DeviceEngine(daemon.socket) as engine:
        for number, digests in enumerate(prompts, 1):
            assert engine.store(digests).stored == 8
            wait_until(lambda number=number: client.stats().tiers[0].chunks == 8 * number)
        assert pool_of(client).chunks == 12
        assert [engine.load(digests) for digests in prompts] == [8, 8, 8]
    in_pool = sum(n for p in prompts for bits, n in space.lookup(p).tiers if bits & 1)
    assert in_pool == 12


def test_what_is_loaded_from_the_host_tier_twice_is_loaded_from_the_pool_from_then_on(
    daemon, plain
) -> None:
    client, _ = plain
    digests = make_digests(8, prompt=3)  # no other test loads these
    without = Standin(np.random.default_rng(0))
    with DeviceEngine(daemon.socket, device=without) as engine:
        without.fail("allocate")
        assert engine.store(digests).stored == 8
    before = pool_of(client).counters
    with DeviceEngine(daemon.socket) as first, DeviceEngine(daemon.socket) as second:
        assert [first.load(digests), second.load(digests)] == [8, 8]
        brought = before["promoted_chunks"] + 8
        wait_until(lambda: pool_of(client).counters["promoted_chunks"] == brought)
        assert pool_of(client).counters["loaded_chunks"] == before["loaded_chunks"]
        assert [first.load(digests), second.load(digests)] == [8, 8]
        assert first.on_gpu.counters.damaged_chunks == 0
    assert pool_of(client).counters["loaded_chunks"] == before["loaded_chunks"] + 16
    assert pool_of(client).used_bytes == 8 * CHUNK_BYTES


def test_engines_tell_the_daemon_what_their_gpu_has_done(daemon, plain) -> None:
    client, _ = plain
    wait_until(lambda: not client.stats().engines, what="those before have ended")
    before = client.stats().engine_gpu
    with DeviceEngine(daemon.socket) as engine:
        assert engine.store(DIGESTS).stored == 8
        assert engine.load(DIGESTS) == 8
        (one,) = wait_until(lambda: client.stats().engines, what="it has told")
        assert one.client == "device"
        assert set(one.counters) <= set(engine.on_gpu.counters.values())
    wait_until(lambda: not client.stats().engines, what="its session has ended")
    after = client.stats().engine_gpu
    assert after == before | {
        name: before[name] + count for name, count in engine.on_gpu.counters.values().items()
    }
    assert after["chunks_loaded"] == before["chunks_loaded"] + 8


def test_an_engine_killed_in_mid_transfer_leaves_nothing_in_the_pool(daemon, plain) -> None:
    client, space = plain
    with other_engine(daemon, "stuck") as process:
        assert client.stats().reservations == 8
        assert pool_of(client).used_bytes == 8 * CHUNK_BYTES
        process.kill()
    wait_until(lambda: pool_of(client).used_bytes == 0, what="its room is free")
    assert space.lookup(DIGESTS).hits == 0
    assert client.stats().reservations == 0


def pools_open_here() -> int:
    gc.collect()  # what other tests have left is closed at any time
    count = 0
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # some thread has just closed it
            count += "kvstore-pool" in str(link.readlink())
    return count


class NoPools(Standin):
    def pools(self) -> Pools:
        raise PoolError("the driver has no cuMemCreate")


@pytest.mark.parametrize("kind", [Standin, NoPools], ids=["no memory", "no way"])
def test_a_pool_that_cannot_be_mapped_is_counted_and_the_host_tier_used(
    daemon, plain, kind
) -> None:
    client, _ = plain
    stored, before = pool_of(client).counters["stored_chunks"], pools_open_here()
    device = kind(np.random.default_rng(0))
    with DeviceEngine(daemon.socket, device=device) as engine:
        device.fail("allocate")
        assert engine.store(DIGESTS).stored == 8
        assert engine.load(DIGESTS) == 8
        assert engine.on_gpu.counters.pools_refused == 1
        assert pools_open_here() <= before
    assert pool_of(client).counters["stored_chunks"] == stored
    assert client.stats().tiers[0].chunks == 8


def test_a_descriptor_of_the_pool_that_nobody_waits_for_any_more_is_closed(daemon) -> None:
    def passed() -> int:
        """Count the pools that this process has descriptors of."""
        found = 0
        for link in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # that of the listing itself
                found += "kvstore-pool" in str(link.readlink())
        return found

    before = passed()
    with daemon.connect() as client:
        connection = client.attach(MANIFEST).connection
        connection.expect_fd(DEADLINE_SECONDS)
        request = m.Attach(
            connection.next_id(), 1000, MANIFEST.encode(), MANIFEST.chunk_bytes, pool=True
        )
        connection.begin(request)  # whoever asked gives up
        client.ping()
        assert passed() == before + 1
    assert passed() == before


def test_damage_in_the_pool_is_found_by_the_device_and_the_chunk_computed_anew(
    daemon, plain
) -> None:
    client, _ = plain
    with DeviceEngine(daemon.socket) as engine:
        engine.store(DIGESTS)
        wait_until(lambda: client.stats().tiers[0].chunks == 8)
        pooled = engine.on_gpu._arenas._known[0].pooled
        with pooled.load(DIGESTS) as loaded:
            shard = loaded.chunks[3].shards[0]
            assert shard.is_pooled
            at = shard.offset - pooled.attached.arena.size_bytes
        pooled.attached.pool.view[at] ^= 1
        assert engine.load(DIGESTS) == 3
        assert engine.on_gpu.counters.damaged_chunks == 1
        assert engine.store(DIGESTS).stored == 1
        assert engine.load(DIGESTS) == 8


def test_a_daemon_killed_under_its_pool_is_a_miss_and_the_next_ones_pool_is_used(
    start_daemon,
) -> None:
    daemon = start_daemon(SETTINGS)
    with DeviceEngine(daemon.socket) as engine:
        assert engine.store(DIGESTS).stored == 8
        assert engine.load(DIGESTS) == 8
        used = engine.device.used_bytes
        daemon.kill()
        assert engine.load(DIGESTS) == 0
        assert engine.store(DIGESTS).stored == 0
        daemon.launch()
        daemon.wait_ready()
        wait_until(lambda: engine.cache.is_connected, what="connected again")
        assert engine.store(DIGESTS).stored == 8
        assert engine.load(DIGESTS) == 8
        # The pool of the daemon that is gone is not mapped any more.
        assert engine.device.used_bytes == used
        assert len(engine.on_gpu._arenas._known) == 1
        assert engine.on_gpu.off == ""


@pytest.mark.parametrize("kept", ["disk", "arena"])
def test_what_lies_in_the_pool_outlives_the_daemon_where_a_tier_below_does_and_comes_up_again(
    start_daemon, tmp_path, kept
) -> None:
    settings = {
        "disk": {"tiers.disk.path": tmp_path / "disk", "tiers.disk.capacity": "16MiB"},
        "arena": {"tiers.host.arena": tmp_path / "arena"},
    }
    daemon = start_daemon(SETTINGS | settings[kept])
    with DeviceEngine(daemon.socket) as engine:
        assert engine.store(DIGESTS).stored == 8
        assert daemon.stop() == 0
        assert engine.load(DIGESTS) == 0
        daemon.launch()
        daemon.wait_ready()
        wait_until(lambda: engine.cache.is_connected, what="connected again")
        with daemon.connect() as client:
            assert [engine.load(DIGESTS) for _ in range(2)] == [8, 8]
            wait_until(lambda: pool_of(client).counters["promoted_chunks"] == 8)
            assert pool_of(client).counters["loaded_chunks"] == 0
            assert engine.load(DIGESTS) == 8
            assert pool_of(client).counters["loaded_chunks"] == 8


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ("tiers.device.gpu=0", "there is no such GPU, or no CuPy for it"),
        ("tiers.host.checksum=off", "tiers.device needs tiers.host.checksum"),
        ("tiers.redis.write=through", "cannot be used beside a tier that is written through"),
    ],
)
async def test_a_tier_that_cannot_be_is_refused_by_its_name(changed: str, reason: str) -> None:
    settings = [f"{path}={value}" for path, value in SETTINGS.items()]
    config = load(None, {}, [*settings, "tiers.redis.url=redis://localhost", changed])
    with pytest.raises(ConfigError, match=reason):
        await open_tiers(config)


def test_a_daemon_without_the_tier_imports_nothing_of_a_device() -> None:
    code = "import sys, kvstore.app; print([n for n in sys.modules if n.startswith('kvstore.gpu')])"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout == "[]\n"

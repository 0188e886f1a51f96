"""Chunks that a codec encodes, in a pool of device memory: what comes of them is right, or a miss.

The device is the stand-in, here and in the daemon.
"""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from kvstore.client.sync import StoreReport
from kvstore.compression.container import ENTRY, HEADER_BYTES, open_container
from kvstore.compression.policy import CodecPolicy
from kvstore.gpu.device import Event, StuckError
from kvstore.gpu.pages import NOWHERE
from kvstore.hashing import block_digests
from kvstore.transfer.copies import Runs
from tests.support.coded_engine import (
    COUNT,
    DIGESTS,
    POLICIES,
    assert_alike,
    by_host,
    decoded,
    engine_of,
    load,
    load_with_gap,
    put,
    store,
    stored,
    with_gap,
)
from tests.support.daemon import REPOSITORY, Daemon
from tests.support.device_engine import DeviceEngine, Impatience, patient
from tests.support.making import make_manifest
from tests.support.waiting import wait_until

SETTINGS = {
    "tiers.device.gpu": "standin",
    "tiers.device.capacity": "16MiB",
    "leases.orphan_grace": "10min",
}
# Containers of one block, and of several, whose digests come from both steps of a store.
SHAPES = {"one block": {}, "blocks": {"layers": 16}}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    with Daemon(tmp_path_factory.mktemp("pool"), SETTINGS) as started:
        yield started


@pytest.fixture
def space(daemon, request):
    """A namespace of its own for each test, as one sees it who has no device."""
    policy, shape = getattr(request, "param", (POLICIES["int4kv"], {}))
    manifest = make_manifest(model=request.node.name, codec=policy.codec, **shape)
    with daemon.connect() as client:
        yield client.attach(manifest), policy
        wait_until(lambda: client.stats().reservations == client.stats().leases == 0)


@pytest.fixture
def pool(daemon):
    """Return what the pool has had done to it since then."""
    with daemon.connect() as client:
        before = _device_tier(client)

        def since(name: str) -> int:
            now = _device_tier(client)
            if name == "used_bytes":
                return now.used_bytes - before.used_bytes
            return now.counters[name] - before.counters[name]

        yield since


def _device_tier(client):
    (found,) = [one for one in client.stats().tiers if one.tier == "device"]
    return found


def put_there(engine: DeviceEngine, containers: list[bytes]) -> None:
    """Have *containers* in the pool, whatever they are."""
    pooled = engine.cache.ask(engine.on_gpu._pooled.of, None)
    sizes = [len(one) for one in containers]
    vacancies = pooled.take_room(DIGESTS[: len(sizes)], sizes=sizes)
    memory, behind = pooled.attached.pool.view, pooled.attached.arena.size_bytes
    for vacancy, container in zip(vacancies, containers, strict=True):
        assert vacancy.is_pooled
        start = vacancy.offset - behind
        memory[start : start + len(container)] = np.frombuffer(container, np.uint8)
        vacancy.seal_with(np.array(block_digests(container)))
    pooled.commit(vacancies)


def place_of(engine: DeviceEngine, number: int) -> tuple[np.ndarray, int]:
    """Return the pool, and where in it chunk *number* begins."""
    pooled = engine.cache.ask(engine.on_gpu._pooled.of, None)
    with pooled.load(DIGESTS) as loaded:
        shard = loaded.chunks[number].shards[0]
        assert shard.is_pooled
        return pooled.attached.pool.view, shard.offset - pooled.attached.arena.size_bytes


CASES = [
    *(("int8kv", "one block"), ("int4kv", "blocks"), ("hq3", "one block")),
    *(("exp3", "one block"), ("ecsq-mid", "one block")),
]


@pytest.mark.parametrize(
    "space", [(POLICIES[p], SHAPES[s]) for p, s in CASES], ids=map("-".join, CASES), indirect=True
)
def test_one_engine_stores_in_the_pool_what_the_host_would_and_others_load_it(
    daemon, space, pool
) -> None:
    with engine_of(daemon, space) as engine, engine_of(daemon, space, seed=1) as other:
        chunks = put(engine)
        expected = by_host(space, chunks)
        size = sum(len(container) for container in expected)
        assert store(engine) == StoreReport(COUNT, 0, 0, size)
        assert store(engine) == StoreReport(0, COUNT, 0, 0)
        assert (pool("stored_chunks"), pool("stored_bytes")) == (COUNT, size)
        found = decoded(space, expected, engine.layout.chunk_bytes)
        assert load(other) == load(engine) == found
        assert pool("loaded_chunks") == 2 * COUNT
        # Who has no device gets the very bytes, by way of the host tier.
        assert_alike(stored(space), expected)
        counters = engine.on_gpu.counters
        assert counters.encoded_chunks == counters.decoded_chunks == COUNT
        assert counters.host_encoded_chunks == counters.host_decoded_chunks == 0
        assert counters.damaged_chunks == other.on_gpu.counters.damaged_chunks == 0


def test_misfits_are_stored_in_the_host_tier_beside_the_others(daemon, space, pool) -> None:
    with engine_of(daemon, space) as engine:
        chunks = put(engine)
        broken = np.frombuffer(chunks[1], "<u2").copy()
        broken[7] = 0x7F80
        engine.put(1, broken.tobytes())
        assert store(engine).stored == COUNT
        assert engine.on_gpu.counters.misfit_chunks == 1
        assert pool("stored_chunks") == COUNT - 1
        assert len(load(engine)) == COUNT
        assert pool("loaded_chunks") == COUNT - 1
        assert engine.on_gpu.counters.host_decoded_chunks == 0


def test_chunks_that_find_no_room_in_the_pool_are_stored_beside_it(
    daemon, space, pool, monkeypatch
) -> None:
    with engine_of(daemon, space) as engine:
        pooled = engine.cache.ask(engine.on_gpu._pooled.of, None)
        host = engine.cache.ask(lambda plain: plain, None)
        take_room = pooled.take_room

        def take(digests, *, parent, heads, sizes):
            first = take_room(digests[:2], parent=parent, heads=heads, sizes=sizes[:2])
            return first + host.take_room(digests[2:], parent=digests[1], sizes=sizes[2:])

        monkeypatch.setattr(pooled, "take_room", take)
        chunks = put(engine)
        assert store(engine).stored == COUNT
        assert pool("stored_chunks") == 2
        assert_alike(stored(space), by_host(space, chunks))
        assert load(engine) == decoded(space, stored(space), engine.layout.chunk_bytes)
        assert pool("loaded_chunks") == 2


@pytest.mark.parametrize(
    "space",
    [(CodecPolicy(codec="lz4"), {}), (CodecPolicy(codec="int8kv", checksum=True), {})],
    ids=["variable rate", "sealed payload"],
    indirect=True,
)
def test_what_the_device_has_no_form_for_is_brought_to_the_host(daemon, space, pool) -> None:
    with engine_of(daemon, space) as engine:
        chunks = put(engine)
        containers = by_host(space, chunks)
        put_there(engine, containers)
        assert load(engine) == decoded(space, containers, engine.layout.chunk_bytes)
        counters = engine.on_gpu.counters
        assert counters.brought_chunks == counters.host_decoded_chunks == COUNT
        assert pool("loaded_chunks") == COUNT


@pytest.mark.parametrize("space", [(CodecPolicy(codec="int8kv", checksum=True), {})], indirect=True)
def test_a_payload_that_the_host_seals_is_stored_in_the_host_tier(daemon, space, pool) -> None:
    with engine_of(daemon, space) as engine:
        chunks = put(engine)
        assert store(engine).stored == COUNT
        assert engine.on_gpu.counters.encoded_chunks == COUNT
        assert_alike(stored(space), by_host(space, chunks))
        assert pool("stored_chunks") == 0


def test_pages_that_are_nowhere_are_filled_by_the_host(daemon, space) -> None:
    with engine_of(daemon, space) as engine:
        chunks = put(engine)
        assert store(engine).stored == COUNT
        load_with_gap(engine)
        first, *rest = decoded(space, by_host(space, chunks), len(chunks[0]))
        assert engine.take(0) == with_gap(engine, first)
        assert [engine.take(number) for number in range(1, COUNT)] == rest
        assert engine.on_gpu.counters.brought_chunks == 1


@pytest.mark.parametrize(
    ("place", "brought"),
    [("payload", False), ("table", False), ("header", False), ("payload", True)],
)
def test_damage_is_a_miss_and_the_chunk_is_dropped(daemon, space, place: str, brought) -> None:
    with engine_of(daemon, space) as engine:
        put(engine)
        assert store(engine).stored == COUNT
        wait_until(lambda: space[0].lookup(DIGESTS).tiers == [(3, COUNT)], what="copied down")
        section = open_container(stored(space)[2]).sections[1]
        at = {"payload": section.offset + 5, "table": HEADER_BYTES + ENTRY.size, "header": 9}
        memory, start = place_of(engine, 2)
        memory[start + at[place]] ^= 1
        if brought:
            pages = [list(each) for each in engine.pages[:COUNT]]
            pages[2][0] = NOWHERE
            assert engine.on_gpu.load(DIGESTS, pages, after=engine.fence()) == 2
        else:
            assert len(load(engine)) == 2
        assert engine.on_gpu.counters.damaged_chunks == 1
        assert space[0].lookup(DIGESTS).hits == 2
        put(engine)
        assert store(engine).stored == 1
        assert len(load(engine)) == COUNT


@pytest.mark.parametrize(
    ("fault", "after"), [("pin", 0), ("launch", 4), ("launch", 9), ("copy", 3), ("copy", 6)]
)
def test_a_call_that_fails_costs_its_chunks_and_leaves_no_room_behind(
    daemon, space, pool, fault, after: int
) -> None:
    with engine_of(daemon, space, seed=after) as engine:
        chunks = put(engine)
        size = len(by_host(space, chunks)[0])
        engine.device.fail(fault, after=after)
        report = store(engine)
        assert report.stored < COUNT
        assert report.stored + report.refused == COUNT
        assert engine.on_gpu.counters.failed_transfers == 1
        assert pool("used_bytes") <= report.stored * (size + 4096)
        put(engine)
        assert store(engine).stored == COUNT - report.stored
        engine.device.fail(fault, after=after)
        assert len(load(engine)) < COUNT or fault == "pin"
        assert load(engine) == decoded(space, by_host(space, chunks), len(chunks[0]))
        assert engine.on_gpu.off == ""


def test_a_head_that_gets_stuck_keeps_its_room_until_it_is_over(daemon, space, pool) -> None:
    waits = 0

    def lose_patience(event: Event) -> None:
        nonlocal waits
        waits += 1
        if waits > 1:  # for the heads of the first transfer, and for what was begun behind it
            engine.device.stall()
            raise StuckError("told to lose patience")
        patient(event)

    with engine_of(daemon, space) as engine, daemon.connect() as client:
        put(engine)
        lane = engine.on_gpu._stores
        lane.settings = engine.settings._replace(wait=lose_patience)
        assert store(engine, DIGESTS[:2]).stored == 0
        assert engine.on_gpu.counters.stuck_transfers > 0
        assert client.stats().reservations == 2
        held = pool("used_bytes")
        assert held > 0
        # Nobody else gets that room, and no heads go before these have gone.
        lane.settings = engine.settings
        engine.device.resume()
        engine.device.drain()
        assert engine.on_gpu.held == 0
        wait_until(lambda: client.stats().reservations == 0)
        assert pool("used_bytes") == 0
        assert store(engine).stored == COUNT


def test_a_load_whose_heads_get_stuck_is_a_miss_and_keeps_its_lease_until_it_is_over(
    daemon, space
) -> None:
    with engine_of(daemon, space) as engine, daemon.connect() as client:
        put(engine)
        assert store(engine).stored == COUNT
        assert len(load(engine)) == COUNT
        lane = engine.on_gpu._loads
        lane.settings = engine.settings._replace(wait=Impatience(5))
        engine.device.stall()
        assert load(engine) == []
        assert engine.on_gpu.held == client.stats().leases == 1
        assert space[0].delete(DIGESTS).busy == COUNT
        engine.device.resume()
        engine.device.drain()
        assert engine.on_gpu.held == 0
        wait_until(lambda: client.stats().leases == 0)
        lane.settings = engine.settings
        assert len(load(engine)) == COUNT


def test_an_engine_killed_between_encoding_and_commit_leaves_nothing(daemon, space, pool) -> None:
    manifest = make_manifest(model="headless", codec="int8kv")
    command = [sys.executable, "-m", "tests.support.coded_engine", str(daemon.socket)]
    with (
        daemon.connect() as client,
        subprocess.Popen(
            command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process,
    ):
        assert process.stdout.readline() == b"headless\n"
        assert client.stats().reservations == 8
        assert pool("used_bytes") > 0
        process.kill()
        wait_until(lambda: pool("used_bytes") == 0, what="its room is free")
        assert client.attach(manifest).lookup(DIGESTS).hits == 0


def test_what_came_from_the_pool_is_encoded_again_for_a_tier_below_and_comes_up_as_that(
    start_daemon, tmp_path
) -> None:
    below = {
        "tiers.disk.path": tmp_path / "disk",
        "tiers.disk.capacity": "16MiB",
        "tiers.disk.codec": "int4kv",
    }
    daemon = start_daemon(SETTINGS | below)
    policies = [POLICIES["int8kv"], CodecPolicy(codec="raw")]
    manifests = [make_manifest(codec=policy.codec, layers=6) for policy in policies]
    for manifest, policy in zip(manifests, policies, strict=True):
        with daemon.connect() as client:
            space = client.attach(manifest), policy
            with engine_of(daemon, space) as engine:
                put(engine)
                assert store(engine).stored == COUNT
    assert daemon.stop() == 0
    daemon.launch()
    daemon.wait_ready()
    for manifest, policy in zip(manifests, policies, strict=True):
        with daemon.connect() as client:
            space = client.attach(manifest), policy
            containers = stored(space)
            assert {open_container(one).header.codec.name for one in containers} == {"INT4KV"}
            expected = decoded(space, containers, manifest.plain_bytes(manifest.all_heads))
            with engine_of(daemon, space) as engine:

                def is_up(client=client, engine=engine, expected=expected) -> bool:
                    before = _device_tier(client).counters["loaded_chunks"]
                    assert load(engine) == expected
                    return _device_tier(client).counters["loaded_chunks"] == before + COUNT

                wait_until(is_up, what="it is loaded from the pool, in the form of the disk")
                assert engine.on_gpu.counters.host_decoded_chunks == 0
                assert engine.on_gpu.counters.damaged_chunks == 0


@pytest.mark.parametrize(
    "space",
    [(POLICIES["int4kv"], {}), (CodecPolicy(codec="lz4"), {})],
    ids=["int4kv", "lz4"],
    indirect=True,
)
def test_what_hosts_have_encoded_comes_up_where_devices_decode_it(daemon, space, pool) -> None:
    is_for_devices = space[1].codec == "int4kv"
    with engine_of(daemon, space) as engine:
        sources = [Runs.of_buffer(np.frombuffer(chunk, np.uint8).copy()) for chunk in put(engine)]
        assert engine.cache.store(DIGESTS, sources).stored == COUNT
        expected = decoded(space, stored(space), engine.layout.chunk_bytes)
        assert [load(engine) for _ in range(2)] == [expected, expected]
        done = "promoted_chunks" if is_for_devices else "promote_chunks_dropped"
        wait_until(lambda: pool(done) == COUNT)
        assert pool("loaded_chunks") == 0
        assert load(engine) == expected
        assert pool("loaded_chunks") == (COUNT if is_for_devices else 0)
        assert engine.on_gpu.counters.damaged_chunks == 0

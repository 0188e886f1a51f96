"""Chunks whose size is known only when the device has encoded them, and a live daemon.

The device is the stand-in. What comes out without trouble is in test_device_codecs.py.
"""

from __future__ import annotations

import numpy as np
import pytest

from kvstore.client.sync import StoreReport
from kvstore.compression.container import open_container
from kvstore.compression.shapes import CodecId
from kvstore.gpu.device import Event
from tests.support.coded_engine import (
    COUNT,
    DIGESTS,
    POLICIES,
    assert_alike,
    by_host,
    decoded,
    engine_of,
    load,
    put,
    store,
    stored,
)
from tests.support.daemon import Daemon
from tests.support.device_engine import DeviceEngine, Impatience, patient
from tests.support.making import make_manifest
from tests.support.waiting import wait_until

SETTINGS = {"tiers.host.verify_load": False}
TYPES = [
    ("rans", "float16"),
    ("rans", "float32"),
    ("ecsq-mid", "float16"),
    ("nvfp4-compat", "float16"),
    ("nvfp4-compat", "float32"),
]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    with Daemon(tmp_path_factory.mktemp("measured"), SETTINGS) as started:
        yield started


@pytest.fixture
def space(daemon, request):
    """A namespace of its own for each test, as one sees it who has no device."""
    name, dtype = getattr(request, "param", ("exp3", "bfloat16"))
    manifest = make_manifest(model=request.node.name, codec=POLICIES[name].codec, dtype=dtype)
    with daemon.connect() as client:
        yield client.attach(manifest), POLICIES[name]
        wait_until(lambda: client.stats().reservations == client.stats().leases == 0)


def assert_nothing_is_held(engine: DeviceEngine) -> None:
    assert engine.on_gpu.held == 0
    for lane in (engine.on_gpu._stores, engine.on_gpu._loads):
        assert lane.ring.free_slots == lane.ring.shape.slots


@pytest.mark.parametrize("space", TYPES, ids=map("-".join, TYPES), indirect=True)
def test_values_of_other_types(daemon, space) -> None:
    with engine_of(daemon, space) as engine:
        chunks = put(engine)
        assert store(engine).stored == COUNT
        assert_alike(stored(space), by_host(space, chunks))
        assert load(engine) == decoded(space, stored(space), engine.layout.chunk_bytes)
        counters = engine.on_gpu.counters
        assert counters.encoded_chunks == counters.decoded_chunks == COUNT


def test_what_does_not_become_smaller_is_stored_as_it_is(daemon, space) -> None:
    with engine_of(daemon, space) as engine:
        chunks = put(engine)
        noise = np.random.default_rng(1).bytes(len(chunks[1]))
        size = len(noise) // 4
        for number, part in ((1, noise), (3, noise[:size] + chunks[3][size:])):
            chunks[number] = part
            engine.put(number, part)
        assert store(engine).stored == COUNT
        assert engine.on_gpu.counters.encoded_chunks == COUNT
        assert engine.cache.codec_counters.fallbacks == {("exp3", "raw"): 5}
        assert_alike(stored(space), by_host(space, chunks))
        assert load(engine) == chunks
        assert engine.on_gpu.counters.decoded_chunks == COUNT


@pytest.mark.parametrize("space", [("ecsq-lo", "bfloat16")], indirect=True)
def test_what_is_not_finite_is_encoded_by_the_host(daemon, space) -> None:
    with engine_of(daemon, space) as engine:
        chunks = put(engine)
        # Layer 0 has a fixed rate: what is wrong there is known behind the sizes.
        for number, at in ((1, 7), (3, -40)):
            broken = np.frombuffer(chunks[number], "<u2").copy()
            broken[at] = 0x7F80
            chunks[number] = broken.tobytes()
            engine.put(number, chunks[number])
        assert store(engine).stored == COUNT
        counters = engine.on_gpu.counters
        assert (counters.misfit_chunks, counters.host_encoded_chunks) == (2, 2)
        assert counters.encoded_chunks == COUNT - 1
        assert_alike(stored(space), by_host(space, chunks))
        assert load(engine) == decoded(space, stored(space), engine.layout.chunk_bytes)


@pytest.mark.parametrize("space", [("exp3", "bfloat16"), ("ecsq-mid", "bfloat16")], indirect=True)
def test_decoders_say_what_is_damaged(daemon, space) -> None:
    """Nobody takes checksums here, and the table is right: the section itself is not believed."""
    attached, _ = space
    with engine_of(daemon, space) as engine:
        put(engine)
        assert store(engine).stored == COUNT
        with attached.load(DIGESTS) as loaded:
            shard = loaded.chunks[2].shards[0]
            section = open_container(bytes(shard.view)).sections[1]
        assert section.codec in {CodecId.EXP3, CodecId.ECSQ}
        attached.attached.arena.view[shard.offset + section.offset + 2] ^= 0x40
        assert len(load(engine)) == 2
        assert engine.on_gpu.counters.damaged_chunks == 1
        put(engine)
        assert store(engine) == StoreReport(1, COUNT - 1, 0, shard.size_bytes)
        assert len(load(engine)) == COUNT
        assert_nothing_is_held(engine)


# Two transfers of seven launches and two copies each come before one is brought to its room.
FAULTS = [
    *(("launch", n) for n in (1, 8, 14)),
    *(("copy", n) for n in (0, 3, 4, 5, 6)),
    ("allocate", 0),  # what kernels note
]


@pytest.mark.parametrize(("fault", "after"), FAULTS)
def test_a_call_that_fails_gives_room_and_staging_back(
    daemon, space, fault: str, after: int
) -> None:
    """In either phase of a store, and of one that is encoded while the one before asks for room."""
    with engine_of(daemon, space, seed=after) as engine:
        put(engine)
        engine.device.fail(fault, after=after)
        report = store(engine)
        assert report.stored + report.refused == COUNT
        assert report.refused > 0
        assert engine.on_gpu.counters.failed_transfers == 1
        assert_nothing_is_held(engine)
        assert store(engine).stored == COUNT - report.stored
        engine.device.fail(fault, after=after // 3)
        assert len(load(engine)) < COUNT
        assert len(load(engine)) == COUNT
        assert_nothing_is_held(engine)


@pytest.mark.parametrize("after", [6, 12])
def test_a_device_that_is_lost_stores_nothing_more(daemon, space, after: int) -> None:
    with engine_of(daemon, space, seed=after) as engine:
        put(engine)
        fence = engine.fence()
        engine.device.fail("lost", after=after)
        assert store(engine).stored == 0
        assert engine.on_gpu.off
        assert engine.on_gpu.load(DIGESTS, engine.pages[:COUNT], after=fence) == 0


@pytest.mark.parametrize("waits", range(4))
def test_a_device_that_is_stuck_in_either_phase_keeps_what_it_touches(
    daemon, space, waits: int
) -> None:
    with engine_of(daemon, space) as engine:
        put(engine)
        left = waits

        def wait(event: Event) -> None:
            nonlocal left
            left -= 1
            if left >= 0:
                patient(event)
                return
            engine.device.stall()
            Impatience(3)(event)

        engine.on_gpu._stores.settings = engine.settings._replace(wait=wait)
        report = store(engine)
        assert report.stored < COUNT
        assert engine.on_gpu.counters.stuck_transfers > 0
        assert engine.on_gpu.held > 0
        engine.device.resume()
        wait_until(lambda: engine.on_gpu.held == 0)
        assert_nothing_is_held(engine)
        engine.on_gpu._stores.settings = engine.settings
        assert store(engine).stored == COUNT - report.stored
        assert len(load(engine)) == COUNT


def test_a_daemon_killed_between_the_phases_leaves_nothing_behind(tmp_path) -> None:
    policy = POLICIES["exp3"]
    manifest = make_manifest(model="killed", codec=policy.codec)
    with (
        Daemon(tmp_path, SETTINGS) as daemon,
        DeviceEngine(daemon.socket, manifest=manifest, policy=policy) as engine,
    ):
        put(engine)

        def kill_first(event: Event) -> None:
            engine.on_gpu._stores.settings = engine.settings
            daemon.kill()
            patient(event)

        engine.on_gpu._stores.settings = engine.settings._replace(wait=kill_first)
        assert store(engine).stored == 0
        assert engine.on_gpu.counters.encoded_chunks == 0
        assert engine.on_gpu.off == ""
        assert_nothing_is_held(engine)


def test_what_there_is_no_room_for_ends_a_store(tmp_path) -> None:
    policy = POLICIES["exp3"]
    manifest = make_manifest(model="full", codec=policy.codec, layers=32)
    settings = SETTINGS | {"tiers.host.capacity": "1MiB"}
    with (
        Daemon(tmp_path, settings) as daemon,
        DeviceEngine(daemon.socket, manifest=manifest, policy=policy) as engine,
    ):
        put(engine)
        report = store(engine)
        assert 0 < report.stored < COUNT
        assert report.refused == COUNT - report.stored
        assert len(load(engine)) == report.stored
        assert_nothing_is_held(engine)

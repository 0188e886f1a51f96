"""Chunks that the device encodes and decodes itself, and a live daemon.

What it stores is what the host would have stored, byte for byte, and either reads the other's.
The device is the stand-in.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kvstore.client.sync import StoreReport
from kvstore.compression.container import ENTRY, HEADER_BYTES, open_container
from kvstore.compression.policy import CodecPolicy
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
from tests.support.daemon import Daemon
from tests.support.making import make_manifest
from tests.support.waiting import wait_until


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    settings = {"tiers.host.verify_commit": "full"}
    with Daemon(tmp_path_factory.mktemp("codecs"), settings) as started:
        yield started


@pytest.fixture
def space(daemon, request):
    """A namespace of its own for each test, as one sees it who has no device."""
    policy = request.param if hasattr(request, "param") else POLICIES["int4kv"]
    manifest = make_manifest(model=request.node.name, codec=policy.codec)
    with daemon.connect() as client:
        yield client.attach(manifest), policy
        wait_until(lambda: client.stats().reservations == client.stats().leases == 0)


@pytest.mark.parametrize("space", POLICIES.values(), ids=POLICIES, indirect=True)
def test_the_device_stores_and_loads_what_the_host_would(daemon, space) -> None:
    with engine_of(daemon, space) as engine:
        chunks = put(engine)
        expected = by_host(space, chunks)
        size = sum(len(container) for container in expected)
        assert store(engine) == StoreReport(COUNT, 0, 0, size)
        assert store(engine) == StoreReport(0, COUNT, 0, 0)
        assert_alike(stored(space), expected)
        assert load(engine) == decoded(space, expected, engine.layout.chunk_bytes)
        counters = engine.on_gpu.counters
        assert counters.encoded_chunks == counters.decoded_chunks == COUNT
        assert counters.host_encoded_chunks == counters.host_decoded_chunks == 0
        assert engine.cache.codec_counters.stored_bytes == size


def test_what_the_host_has_encoded_the_device_decodes(daemon, space) -> None:
    with engine_of(daemon, space) as engine:
        chunks = put(engine)
        sources = [Runs.of_buffer(np.frombuffer(chunk, np.uint8).copy()) for chunk in chunks]
        assert engine.cache.store(DIGESTS, sources).stored == COUNT
        found = load(engine)
        assert found == decoded(space, stored(space), engine.layout.chunk_bytes)
        assert engine.on_gpu.counters.decoded_chunks == COUNT


def test_values_beyond_the_bound_are_encoded_by_the_host_and_safer(daemon, space) -> None:
    with engine_of(daemon, space) as engine:
        chunks = put(engine)
        for number, value in ((1, 0x7F80), (3, 0x7FC0)):
            broken = np.frombuffer(chunks[number], "<u2").copy()
            broken[7] = value
            chunks[number] = broken.tobytes()
            engine.put(number, chunks[number])
        assert store(engine).stored == COUNT
        counters, codecs = engine.on_gpu.counters, engine.cache.codec_counters
        assert (counters.encoded_chunks, counters.misfit_chunks) == (COUNT, 2)
        assert codecs.fallbacks == {("int4kv", "raw"): 2}
        assert_alike(stored(space), by_host(space, chunks))
        # Sections that fell back lie elsewhere in their containers: transfers of their own.
        assert load(engine) == decoded(space, stored(space), engine.layout.chunk_bytes)
        assert counters.decoded_chunks == COUNT


@pytest.mark.parametrize(
    "space", [CodecPolicy(codec="lz4"), CodecPolicy(codec="int8kv", checksum=True)], indirect=True
)
def test_what_the_device_cannot_do_the_host_does(daemon, space) -> None:
    is_fixed = space[1].codec == "int8kv"
    with engine_of(daemon, space) as engine:
        chunks = put(engine)
        assert store(engine).stored == COUNT
        assert_alike(stored(space), by_host(space, chunks))
        assert load(engine) == decoded(space, stored(space), engine.layout.chunk_bytes)
        counters = engine.on_gpu.counters
        assert counters.host_encoded_chunks == (0 if is_fixed else COUNT)
        assert counters.host_decoded_chunks == COUNT


def test_pages_that_are_nowhere_are_left_to_the_host(daemon, space) -> None:
    with engine_of(daemon, space) as engine:
        chunks = put(engine)
        assert store(engine).stored == COUNT
        load_with_gap(engine)
        (first, *_) = decoded(space, stored(space), len(chunks[0]))
        assert engine.take(0) == with_gap(engine, first)
        assert engine.on_gpu.counters.host_decoded_chunks == 1


@pytest.mark.parametrize("place", ["payload", "table", "header"])
def test_damage_is_found_and_the_chunk_computed_anew(daemon, space, place: str) -> None:
    attached, _ = space
    with engine_of(daemon, space) as engine:
        put(engine)
        store(engine)
        with attached.load(DIGESTS) as loaded:
            shard = loaded.chunks[2].shards[0]
            section = open_container(bytes(shard.view)).sections[1]
        at = {"payload": section.offset + 5, "table": HEADER_BYTES + ENTRY.size, "header": 9}
        attached.attached.arena.view[shard.offset + at[place]] ^= 1
        assert len(load(engine)) == 2
        assert engine.on_gpu.counters.damaged_chunks == 1
        put(engine)
        assert store(engine).stored == 1
        assert len(load(engine)) == COUNT


@pytest.mark.parametrize("fault", ["launch", "copy"])
@pytest.mark.parametrize("after", [0, 2, 5])
def test_a_call_that_fails_costs_its_transfer_and_no_more(
    daemon, space, fault: str, after: int
) -> None:
    with engine_of(daemon, space, seed=after) as engine:
        put(engine)
        engine.device.fail(fault, after=after)
        report = store(engine)
        assert report.stored + report.refused == COUNT
        assert engine.on_gpu.counters.failed_transfers == 1
        assert store(engine).stored == COUNT - report.stored
        engine.device.fail(fault, after=after)
        assert len(load(engine)) < COUNT
        assert engine.on_gpu.counters.failed_transfers == 2
        assert len(load(engine)) == COUNT
        assert engine.on_gpu.off == ""


def test_a_chunk_whose_sections_all_stay_as_they_are_has_its_head(daemon, space) -> None:
    attached, policy = space
    raw = replace(policy, layers={0: "raw", 1: "raw"})
    with engine_of(daemon, (attached, raw)) as engine:
        chunks = put(engine)
        assert store(engine).stored == COUNT
        assert stored(space) == by_host((attached, raw), chunks)
        assert load(engine) == chunks
        assert engine.on_gpu.counters.decoded_chunks == COUNT


def test_chunks_without_room_in_staging_go_through_the_host(daemon, space) -> None:
    """Where all sections fell back to what they were, a container is larger than a chunk."""
    attached, policy = space
    raw = replace(policy, layers={0: "raw", 1: "raw"})
    with engine_of(daemon, (attached, raw), chunks=COUNT) as engine:
        engine.on_gpu._parts.forms._size_max = engine.layout.chunk_bytes
        chunks = put(engine)
        assert store(engine).stored == COUNT
        assert load(engine) == chunks
        assert engine.on_gpu.counters.host_encoded_chunks == COUNT

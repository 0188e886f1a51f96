"""Traces of engines go on in the daemon: real spans, over a real socket, to a real receiver."""

from __future__ import annotations

import asyncio
import socket

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON

from kvstore.client.aio import AsyncClient
from kvstore.client.tracing import joined
from tests.support.daemon import Daemon
from tests.support.handoffs import store_one, take_all
from tests.support.hosts import called, caller, free_port
from tests.support.making import empty_targets, make_digests, make_manifest, sources_of
from tests.support.spans import SpanReceiver
from tests.support.waiting import DEADLINE_SECONDS, wait_until

MANIFEST = make_manifest(model="traced")
# Twice what the host tier holds.
CHUNKS = 64
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
# The receiver is as slow as the machine: nothing is to be lost for that.
PATIENT = {"SPANS_TIMEOUT_SECONDS": DEADLINE_SECONDS}


@pytest.fixture
def receiver():
    with SpanReceiver() as running:
        yield running


def in_span(sampler=ALWAYS_ON):
    """Return a context in which a span of the engine is current."""
    tracer = TracerProvider(sampler=sampler, shutdown_on_exit=False).get_tracer("engine")
    return tracer.start_as_current_span("engine request")


def store_all(space, digests) -> None:
    for start in range(0, len(digests), 16):
        parent = digests[start - 1] if start else None
        batch = digests[start : start + 16]
        space.store(batch, sources_of(MANIFEST, batch), parent=parent)


def test_requests_join_the_trace_of_whoever_calls_with_what_was_read_inside(tmp_path, receiver):
    digests = make_digests(CHUNKS)
    settings = {
        "tiers.host.capacity": "1MiB",
        "tiers.disk.path": tmp_path / "disk",
        "tiers.disk.capacity": "64MiB",
        "tiers.disk.write": "through",
        "tracing.endpoint": receiver.endpoint,
    }
    with Daemon(tmp_path, settings, PATIENT) as daemon, daemon.connect() as client:
        space = client.attach(MANIFEST)
        store_all(space, digests)
        with in_span(ALWAYS_OFF):
            space.lookup(digests, name="nobody records it")
        with in_span() as mine:
            assert space.lookup(digests, name="cmpl-7").hits == CHUNKS
            with space.load(digests[:8]) as loaded:
                loaded.copy_to(empty_targets(MANIFEST, 8)[1])
            fresh = make_digests(2, prompt=1)
            space.store(fresh, sources_of(MANIFEST, fresh))
        with joined(f"00-{TRACE}-{'1' * 16}-01"):
            space.lookup(digests)
        wait_until(lambda: len(receiver.named("kvstore lookup")) == 2, what="spans have come")
        assert daemon.stop() == 0

    lookup, handed_over = receiver.named("kvstore lookup")
    context = mine.get_span_context()
    assert (lookup.trace, lookup.parent) == (f"{context.trace_id:032x}", f"{context.span_id:016x}")
    assert lookup.fields == {
        "kvstore.chunks": CHUNKS,
        "kvstore.name": "cmpl-7",
        "kvstore.hits": CHUNKS,
        "kvstore.arriving": 0,
    }
    assert (handed_over.trace, handed_over.parent) == (TRACE, "1" * 16)
    (load,), (read,) = receiver.named("kvstore load"), receiver.named("kvstore read disk")
    assert (read.trace, read.parent) == (load.trace, load.span)
    assert load.began_ns <= read.began_ns < read.ended_ns <= load.ended_ns
    assert (load.fields["kvstore.loaded"], read.fields["kvstore.shards"]) == (8, 8)
    assert read.fields["kvstore.bytes"] == 8 * MANIFEST.chunk_bytes
    (reserve,), (commit,) = receiver.named("kvstore reserve"), receiver.named("kvstore commit")
    assert (reserve.fields["kvstore.reserved"], commit.fields["kvstore.volatile"]) == (2, 0)
    assert len(receiver.spans) == 6, "what nobody records is not told"


def test_hand_offs_between_hosts_are_part_of_the_trace(tmp_path, receiver):
    port, digests = free_port(), make_digests(3)
    traced = {"tracing.endpoint": receiver.endpoint}
    with (
        called(tmp_path / "prefill", port) as prefill,
        caller(tmp_path / "decode", port, traced, PATIENT) as decode,
        prefill.connect() as producer,
        decode.connect() as consumer,
    ):
        source, target = producer.attach(MANIFEST), consumer.attach(MANIFEST)
        source.handoffs.open("one")
        for number in range(3):
            store_one(source, digests, number)
        source.handoffs.publish("one", 0, digests)
        source.handoffs.close("one")
        with joined(f"00-{TRACE}-{'1' * 16}-01"):
            assert take_all(target, "one", "prefill") == digests
        wait_until(lambda: receiver.named("kvstore pull"), what="the pull is told")
        wait_until(lambda: receiver.named("kvstore handoffawait"), what="waits are told")
    (pull,) = receiver.named("kvstore pull")
    assert (pull.trace, pull.parent) == (TRACE, "1" * 16)
    assert pull.fields == {"kvstore.handoff": "one", "kvstore.peer": "prefill", "kvstore.chunks": 3}


def test_a_receiver_that_never_answers_holds_up_nobody_nor_the_end(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}/v1/traces"
        limits = {"SPANS_WAITING_MAX": 8, "SPANS_PER_EXPORT_MAX": 4, "SPANS_TIMEOUT_SECONDS": 0.2}
        with Daemon(tmp_path, {"tracing.endpoint": endpoint}, limits) as daemon:
            asyncio.run(look_up_often(daemon))
            wait_until(lambda: "spans are not exported" in daemon.log(), what="it is told")
            assert daemon.stop() == 0
        assert daemon.log().count("spans are not exported") == 1


async def look_up_often(daemon: Daemon) -> None:
    async with await AsyncClient.connect(
        daemon.socket, name="test", timeout_seconds=DEADLINE_SECONDS
    ) as client:
        space = await client.attach(MANIFEST)
        with in_span():
            for _ in range(100):
                assert (await space.lookup(make_digests(4))).hits == 0

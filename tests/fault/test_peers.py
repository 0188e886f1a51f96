"""Hand-offs between two daemons: streamed, cut, mended, lost; and nothing is left behind."""

from __future__ import annotations

import contextlib
import threading
from itertools import count

import numpy as np
import pytest

from kvstore.client.handoff import Awaited
from kvstore.daemon.peer_link import PeerAddress, _greet
from kvstore.hashing import root_of
from kvstore.protocol import peering as p
from kvstore.transfer.wire import Wire, dial
from kvstore.types import HandoffState, HeadRange
from tests.support.handoffs import is_right, store_one, take_all, wait
from tests.support.hosts import TOKEN, ProxiedHosts
from tests.support.making import make_digests, make_manifest, make_payload, make_root, runs_of
from tests.support.redis_proxy import cut, dripping, late, lost
from tests.support.waiting import DEADLINE_SECONDS, wait_until

MANIFEST = make_manifest(model="between hosts")
COUNT = 6
PROMPTS = count(100)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    with ProxiedHosts(tmp_path_factory.mktemp("hosts")) as running:
        yield running


@pytest.fixture
def ends(hosts):
    """A producer at one host, a consumer at the other; fails when anything is left behind."""
    hosts.mend()
    with hosts.prefill.connect("producer") as one, hosts.decode.connect("consumer") as other:
        yield one.attach(MANIFEST), other.attach(MANIFEST)
    hosts.mend()
    for daemon in (hosts.prefill, hosts.decode):
        wait_until(lambda one=daemon: left_behind(one) == [0] * 4, what="all has ended")


def left_behind(daemon) -> list[int]:
    stats = daemon.stats()
    return [stats.handoffs, stats.handoff_chunks, stats.leases, stats.reservations]


def counter(daemon, name: str) -> int:
    return daemon.stats().counters[name]


class Taking(threading.Thread):
    """Takes all of a hand-off in the background, and notes how it ended."""

    def __init__(self, space, name: str) -> None:
        super().__init__()
        self.space, self.name_taken = space, name
        self.taken: list = []
        self.end: Awaited | None = None
        self.start()

    def run(self) -> None:
        self.taken = take_all(self.space, self.name_taken, "prefill")
        self.end = wait(self.space, self.name_taken, len(self.taken), "prefill")

    def result(self):
        self.join(DEADLINE_SECONDS)
        assert self.end is not None, "it has an end in time"
        self.space.handoffs.leave(self.name_taken, peer="prefill")
        return self.taken, self.end.state


def publish(space, name, digests, numbers) -> None:
    for number in numbers:
        space.handoffs.publish(name, number, digests[number : number + 1])
        store_one(space, digests, number)


@pytest.mark.parametrize("when", ["before", "during", "after"])
def test_chunks_stream_to_a_consumer_whenever_it_comes(ends, when):
    producer, consumer = ends
    digests = make_digests(COUNT, next(PROMPTS))
    taking = Taking(consumer, when) if when == "before" else None
    assert producer.handoffs.open(when).host == "prefill"
    publish(producer, when, digests, range(3))
    if when == "during":
        taking = Taking(consumer, when)
        assert wait(consumer, when, 2, "prefill").digests == digests[2:3]
    publish(producer, when, digests, range(3, COUNT))
    producer.handoffs.close(when, b"first token")
    taking = taking or Taking(consumer, when)
    taking.join(DEADLINE_SECONDS)
    assert taking.end.payload == b"first token"
    assert taking.result() == (digests, HandoffState.CLOSED)


def test_each_chunk_comes_while_the_next_is_not_yet_published(ends):
    producer, consumer = ends
    digests = make_digests(COUNT, next(PROMPTS))
    producer.handoffs.open("streamed")
    for number in range(COUNT):
        publish(producer, "streamed", digests, [number])
        ready = wait(consumer, "streamed", number, "prefill")
        assert (ready.digests, ready.is_last) == (digests[number : number + 1], False)
        assert is_right(consumer, ready.digests)
    producer.handoffs.close("streamed")
    assert Taking(consumer, "streamed").result() == (digests, HandoffState.CLOSED)


def test_the_first_of_two_consumers_that_leaves_ends_nothing_for_the_other(ends, hosts):
    producer, early = ends
    digests = make_digests(COUNT, next(PROMPTS))
    producer.handoffs.open("for two", consumers=2)
    publish(producer, "for two", digests, range(2))
    with hosts.decode.connect("another consumer") as client:
        late = client.attach(MANIFEST)
        for consumer in (early, late):
            assert wait(consumer, "for two", 0, "prefill").digests
        early.handoffs.leave("for two", peer="prefill")
        publish(producer, "for two", digests, range(2, COUNT))
        producer.handoffs.close("for two")
        assert Taking(late, "for two").result() == (digests, HandoffState.CLOSED)


def test_a_chunk_of_two_ranks_comes_whole(ends):
    producer, consumer = ends
    (digest,) = make_digests(1, next(PROMPTS))
    producer.handoffs.open("ranks")
    producer.handoffs.publish("ranks", 0, [digest])
    for heads in (HeadRange(0, 2), HeadRange(2, 4)):
        with producer.reserve([digest], heads=heads) as (vacancy,):
            vacancy.view[:] = make_payload(digest, vacancy.size_bytes)
            vacancy.seal()
    producer.handoffs.close("ranks")
    assert wait(consumer, "ranks", 0, "prefill", early=True).digests == [digest]
    with consumer.load([digest], heads=HeadRange(2, 4)) as loaded:
        (shard,) = loaded.chunks[0].shards
        shard.verify()
        assert bytes(shard.view) == make_payload(digest, shard.size_bytes)
    consumer.handoffs.leave("ranks", peer="prefill")


@pytest.mark.parametrize("codec", ["raw", "int4kv"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_producer_and_consumer_of_other_parallel_sizes_agree(hosts, codec, ranks):
    """What *ranks* of the producer have stored, the other number of the consumer's reads."""
    manifest = make_manifest(model=f"ranks {codec}", codec=codec, chunk_tokens=64)
    digests = make_digests(2, next(PROMPTS))
    halves = [HeadRange(0, 2), HeadRange(2, 4)]
    stored, read = (halves, [HeadRange(0, 4)]) if ranks == 2 else ([HeadRange(0, 4)], halves)
    name = f"{codec} of {ranks}"
    with hosts.prefill.connect() as one, hosts.decode.connect() as other:
        producer, consumer = one.attach(manifest), other.attach(manifest)
        producer.handoffs.open(name)
        producer.handoffs.publish(name, 0, digests)
        for heads in stored:
            size = manifest.plain_bytes(heads)
            plain = np.random.default_rng(heads.start).standard_normal(size // 2, np.float32)
            kv = (plain.view(np.uint32) >> 16).astype(np.uint16).tobytes()
            assert producer.store(digests, runs_of([kv, kv]), heads=heads).stored == 2
        producer.handoffs.close(name)
        assert wait(consumer, name, 1, "prefill", early=True).digests == digests[1:]
        for heads in read:
            there, here = (load_heads(space, digests, heads) for space in (producer, consumer))
            assert there == here
            assert any(here[0])
        consumer.handoffs.leave(name, peer="prefill")


def load_heads(space, digests, heads) -> list[bytearray]:
    """Return the decoded KV of *heads* of all *digests*."""
    buffers = [bytearray(space.manifest.plain_bytes(heads)) for _ in digests]
    with space.load(digests, heads=heads) as loaded:
        loaded.copy_to(runs_of(buffers))
    return buffers


def test_what_both_hosts_have_is_not_sent(hosts, ends):
    producer, consumer = ends
    digests = make_digests(3, next(PROMPTS))
    for number in range(2):
        store_one(consumer, digests, number)
    before = counter(hosts.decode, "peer_received_bytes")
    producer.handoffs.open("shared")
    publish(producer, "shared", digests, range(3))
    producer.handoffs.close("shared")
    assert Taking(consumer, "shared").result() == (digests, HandoffState.CLOSED)
    received = counter(hosts.decode, "peer_received_bytes") - before
    assert received == MANIFEST.chunk_bytes


def test_a_link_that_is_cut_again_and_again_loses_nothing(hosts, ends):
    producer, consumer = ends
    digests = make_digests(COUNT, next(PROMPTS))
    hosts.proxy.fault = cut(MANIFEST.chunk_bytes + 4096, with_reset=True)
    producer.handoffs.open("cut")
    publish(producer, "cut", digests, range(COUNT))
    producer.handoffs.close("cut")
    before = counter(hosts.decode, "handoff_chunks_pulled")
    assert Taking(consumer, "cut").result() == (digests, HandoffState.CLOSED)
    assert counter(hosts.decode, "handoff_chunks_pulled") - before == COUNT
    assert counter(hosts.decode, "pull_failures") > 0


@pytest.mark.parametrize("fault", [late(0.02), dripping(8192, 0.001)], ids=["late", "dripping"])
def test_a_slow_link_is_slow_and_nothing_else(hosts, ends, fault):
    producer, consumer = ends
    digests = make_digests(3, next(PROMPTS))
    hosts.proxy.fault = fault
    producer.handoffs.open(f"slow {fault}")
    publish(producer, f"slow {fault}", digests, range(3))
    producer.handoffs.close(f"slow {fault}")
    assert Taking(consumer, f"slow {fault}").result() == (digests, HandoffState.CLOSED)


def test_over_a_link_that_swallows_everything_the_consumer_hears_that_it_is_over(hosts, ends):
    producer, consumer = ends
    digests = make_digests(COUNT, next(PROMPTS))
    producer.handoffs.open("hole")
    publish(producer, "hole", digests, range(2))
    taking = Taking(consumer, "hole")
    assert wait(consumer, "hole", 1, "prefill").digests == digests[1:2]
    hosts.proxy.fault, hosts.proxy.is_swallowing = lost, True
    publish(producer, "hole", digests, range(2, COUNT))
    producer.handoffs.close("hole")
    assert taking.result() == (digests[:2], HandoffState.BROKEN)
    producer.handoffs.leave("hole")


def test_a_link_that_heals_in_time_goes_on_where_it_was(hosts, ends):
    producer, consumer = ends
    digests = make_digests(COUNT, next(PROMPTS))
    producer.handoffs.open("healed")
    publish(producer, "healed", digests, range(2))
    taking = Taking(consumer, "healed")
    assert wait(consumer, "healed", 1, "prefill").digests == digests[1:2]
    failures = counter(hosts.decode, "pull_failures")
    hosts.proxy.fault, hosts.proxy.is_swallowing = lost, True
    wait_until(lambda: counter(hosts.decode, "pull_failures") > failures, what="it notices")
    hosts.mend()
    publish(producer, "healed", digests, range(2, COUNT))
    producer.handoffs.close("healed")
    assert taking.result() == (digests, HandoffState.CLOSED)


def test_the_producers_end_breaks_it_here_too(hosts, ends):
    _, consumer = ends
    digests = make_digests(COUNT, next(PROMPTS))
    with hosts.prefill.connect("dies") as client:
        space = client.attach(MANIFEST)
        space.handoffs.open("dies")
        publish(space, "dies", digests, range(2))
        taking = Taking(consumer, "dies")
        assert wait(consumer, "dies", 1, "prefill").digests == digests[1:2]
    assert taking.result() == (digests[:2], HandoffState.BROKEN)


def test_what_was_evicted_there_ends_it_here_and_nothing_hangs(ends):
    producer, consumer = ends
    digests = make_digests(3, next(PROMPTS))
    producer.handoffs.open("evicted", ttl_seconds=30)
    publish(producer, "evicted", digests, range(3))
    producer.handoffs.leave("evicted")
    assert producer.delete(digests[1:]).count == 2
    assert Taking(consumer, "evicted").result() == (digests[:1], HandoffState.BROKEN)
    producer.handoffs.abort("evicted")


def test_what_is_wanted_at_once_is_answered_in_its_order_whatever_is_missing(hosts, ends):
    producer, _ = ends
    digests = make_digests(3, next(PROMPTS))
    size, space = MANIFEST.chunk_bytes, MANIFEST.namespace_id()
    payloads = [make_payload(digest, size) for digest in digests]
    for number in range(2):
        store_one(producer, digests, number)
    wants = [
        p.Want(space, digest, p.OfferedShard(0, MANIFEST.kv_heads, size, make_root(payload)))
        for digest, payload in zip(digests, payloads, strict=True)
    ]
    leave = p.PeerLeave(space, "", "nobody's")
    address = PeerAddress("prefill", "127.0.0.1", hosts.proxy.port, TOKEN.strip().encode())
    connection = dial(address.host, address.port, None, timeout_seconds=DEADLINE_SECONDS)
    with contextlib.closing(Wire(connection, DEADLINE_SECONDS)) as wire:
        _greet(wire, address, "decode")
        wire.begin(DEADLINE_SECONDS)
        wire.send_frames([p.encode(one) for one in (wants[0], wants[2], wants[1], leave)])
        for payload in (payloads[0], None, payloads[1]):
            answer = p.decode(wire.receive_frame())
            assert answer == (p.Gone() if payload is None else p.Sending(size))
            if payload is not None:
                target = bytearray(size)
                assert root_of(wire.receive_bytes(memoryview(target))) == make_root(payload)
                assert target == payload
        assert p.decode(wire.receive_frame()) == p.Left()
        assert wire.is_quiet()


def test_a_name_that_nobody_has_opened_is_absent_at_once(ends):
    _, consumer = ends
    ready = wait(consumer, "nobody's", 0, "prefill")
    assert (ready.state, ready.is_last) == (HandoffState.ABSENT, True)


def test_one_of_another_manifest_is_refused(hosts, ends):
    producer, _ = ends
    producer.handoffs.open("other model")
    with hosts.decode.connect() as client:
        other = client.attach(make_manifest(model="another"))
        ready = wait(other, "other model", 0, "prefill")
        assert (ready.state, ready.is_last) == (HandoffState.BROKEN, True)
        other.handoffs.leave("other model", peer="prefill")
    assert "of another manifest" in hosts.decode.log()
    producer.handoffs.abort("other model")
    producer.handoffs.leave("other model")


def test_a_mirror_without_room_ends_where_the_room_ended(hosts, ends):
    producer, consumer = ends
    fit = 16 * 1024 // 36
    digests = make_digests(fit, next(PROMPTS))
    for number in range(fit):
        store_one(consumer, digests, number)
    consumer.pin(digests, hard=True)
    new = make_digests(fit // 2, next(PROMPTS))
    producer.handoffs.open("full")
    publish(producer, "full", new, range(len(new)))
    producer.handoffs.close("full")
    taken, state = Taking(consumer, "full").result()
    assert state is HandoffState.BROKEN
    assert taken == new[: len(taken)]
    consumer.unpin(digests)


def test_either_daemon_killed_ends_it_for_the_other(tmp_path):
    with ProxiedHosts(tmp_path) as hosts:
        digests = make_digests(COUNT, next(PROMPTS))
        with hosts.prefill.connect() as one, hosts.decode.connect() as other:
            producer, consumer = one.attach(MANIFEST), other.attach(MANIFEST)
            producer.handoffs.open("killed", ttl_seconds=1.0)
            publish(producer, "killed", digests, range(2))
            assert wait(consumer, "killed", 1, "prefill").digests == digests[1:2]
            hosts.decode.kill()
            producer.handoffs.close("killed")
            wait_until(lambda: left_behind(hosts.prefill) == [0] * 4, what="it expires")
        with hosts.decode, hosts.decode.connect() as other, hosts.prefill.connect() as one:
            producer, consumer = one.attach(MANIFEST), other.attach(MANIFEST)
            producer.handoffs.open("killed too")
            publish(producer, "killed too", digests, range(2))
            taking = Taking(consumer, "killed too")
            assert wait(consumer, "killed too", 1, "prefill").digests == digests[1:2]
            hosts.prefill.kill()
            assert taking.result() == (digests[:2], HandoffState.BROKEN)
            wait_until(lambda: left_behind(hosts.decode) == [0] * 4, what="it ends here")

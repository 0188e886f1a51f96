"""Hand-offs through one live daemon: both ends in time, ends that die, and what is left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import threading

import pytest

from kvstore.client.aio import AsyncClient
from kvstore.client.cache import PrefixCache
from kvstore.client.handoff import NOTHING_AWAITED, Opened
from kvstore.client.sync import Client
from kvstore.errors import HandoffError, KVStoreError, RequestError, UnavailableError
from kvstore.types import HandoffState
from tests.support.daemon import Daemon
from tests.support.handoffs import is_right, store_one, take_all, wait
from tests.support.making import make_digests, make_manifest, sources_of
from tests.support.waiting import DEADLINE_SECONDS, wait_until

MANIFEST = make_manifest(model="handed over")
COUNT = 5


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    directory = tmp_path_factory.mktemp("handoff")
    with Daemon(directory, {"tenants.blue.uids": "[]", "tenants.red.uids": "[]"}) as running:
        yield running


@pytest.fixture
def ends(daemon, request):
    """A producer's and a consumer's session; fails when a hand-off leaves anything behind."""
    with daemon.connect("producer") as producer, daemon.connect("consumer") as consumer:
        yield producer.attach(MANIFEST), consumer.attach(MANIFEST)
    wait_until(lambda: not daemon.stats().leases, what="leases end")
    stats = daemon.stats()
    assert (stats.handoffs, stats.handoff_chunks, stats.reservations) == (0, 0, 0)


@pytest.fixture
def digests(request):
    return make_digests(COUNT, prompt=hash_of(request.node.name))


def hash_of(name: str) -> int:
    return int.from_bytes(name.encode()[-6:], "little") % 10**6


def wait_in_vain(space, name):
    try:
        return wait(space, name, 0)
    except KVStoreError as error:
        return error


def produce(space, name, digests):
    space.handoffs.open(name)
    for number in range(len(digests)):
        space.handoffs.publish(name, number, digests[number : number + 1])
        store_one(space, digests, number)
    space.handoffs.close(name, b"first token")


@pytest.mark.parametrize("when", ["before", "during", "after"])
def test_a_consumer_takes_every_chunk_whenever_it_comes(ends, digests, when):
    producer, consumer = ends
    taken = []
    taking = threading.Thread(target=lambda: taken.extend(take_all(consumer, when)))
    if when == "before":
        taking.start()
    producer.handoffs.open(when)
    for number in range(COUNT):
        if when == "during" and number == 2:
            taking.start()
        producer.handoffs.publish(when, number, digests[number : number + 1])
        store_one(producer, digests, number)
    producer.handoffs.close(when, b"first token")
    if when == "after":
        taking.start()
    taking.join(DEADLINE_SECONDS)
    assert taken == digests
    last = wait(consumer, when, COUNT)
    assert (last.is_complete, last.payload) == (True, b"first token")
    consumer.handoffs.leave(when)
    assert wait(consumer, when, 0).state is HandoffState.TAKEN


def test_a_chunk_can_be_loaded_as_soon_as_it_is_committed(ends, digests):
    producer, consumer = ends
    producer.handoffs.open("steps")
    for number in range(COUNT):
        producer.handoffs.publish("steps", number, digests[number : number + 1])
        store_one(producer, digests, number)
        ready = wait(consumer, "steps", number)
        assert (ready.digests, ready.is_last) == (digests[number : number + 1], False)
        assert is_right(consumer, ready.digests)
    producer.handoffs.abort("steps")
    consumer.handoffs.leave("steps")


def test_nothing_new_by_the_deadline_is_an_answer_too(ends, digests):
    producer, consumer = ends
    producer.handoffs.open("slow")
    ready = consumer.handoffs.wait("slow", 0, timeout_seconds=0.05)
    assert (ready.state, ready.digests, ready.is_last) == (HandoffState.OPEN, [], False)
    early = consumer.handoffs.wait("never opened", 0, timeout_seconds=0.05, early=True)
    assert (early.state, early.is_last) == (HandoffState.ABSENT, True)
    producer.handoffs.abort("slow")
    consumer.handoffs.leave("slow")


def test_the_sessions_end_of_its_producer_breaks_it_and_what_came_is_there(daemon, ends, digests):
    _, consumer = ends
    with daemon.connect("dies") as client:
        space = client.attach(MANIFEST)
        space.handoffs.open("dies")
        space.handoffs.publish("dies", 0, digests)
        store_one(space, digests, 0)
        assert wait(consumer, "dies", 0).digests == digests[:1]
        answers = []
        waiting = threading.Thread(target=lambda: answers.append(wait(consumer, "dies", 1)))
        waiting.start()
    waiting.join(DEADLINE_SECONDS)
    assert (answers[0].state, answers[0].is_last) == (HandoffState.BROKEN, True)
    assert take_all(consumer, "dies") == digests[:1]
    consumer.handoffs.leave("dies")


def test_a_consumer_that_dies_waiting_leaves_the_handoff_to_the_next(daemon, ends, digests):
    producer, consumer = ends
    producer.handoffs.open("retried")
    with daemon.connect("dies") as client:
        space = client.attach(MANIFEST)
        ended = []
        waiting = threading.Thread(target=lambda: ended.append(wait_in_vain(space, "retried")))
        waiting.start()
        wait_until(lambda: daemon.stats().sessions >= 3, what="it waits")
    waiting.join(DEADLINE_SECONDS)
    assert isinstance(ended[0], UnavailableError)
    producer.handoffs.publish("retried", 0, digests[:1])
    store_one(producer, digests, 0)
    producer.handoffs.close("retried")
    assert take_all(consumer, "retried") == digests[:1]
    consumer.handoffs.leave("retried")


def test_one_that_nobody_takes_expires_and_its_chunks_are_ordinary_again(daemon, ends, digests):
    producer, consumer = ends
    producer.handoffs.open("unwanted", ttl_seconds=0.3)
    store_one(producer, digests, 0)
    producer.handoffs.publish("unwanted", 0, digests[:1])
    assert daemon.stats().handoff_chunks == 1
    assert producer.delete(digests[:1]).busy == 1
    producer.handoffs.close("unwanted")
    wait_until(lambda: not daemon.stats().handoffs, what="it expires")
    assert wait(consumer, "unwanted", 0).state is HandoffState.EXPIRED
    assert producer.delete(digests[:1]).count == 1


def test_two_producers_of_one_name_are_refused(daemon, ends, digests):
    producer, consumer = ends
    producer.handoffs.open("mine")
    with pytest.raises(HandoffError, match="open while it is open"):
        consumer.handoffs.open("mine")
    with pytest.raises(HandoffError, match="another session"):
        consumer.handoffs.publish("mine", 0, digests)
    producer.handoffs.abort("mine")
    producer.handoffs.leave("mine")


def test_another_tenants_name_is_unknown(daemon, digests):
    with (
        Client.connect(daemon.socket, tenant="blue") as one,
        Client.connect(daemon.socket, tenant="red") as other,
    ):
        blue, red = one.attach(MANIFEST), other.attach(MANIFEST)
        blue.handoffs.open("secret")
        assert wait(red, "secret", 0) == NOTHING_AWAITED._replace(digests=[])
        with pytest.raises(HandoffError, match="unknown"):
            red.handoffs.publish("secret", 0, digests)
        blue.handoffs.abort("secret")
        blue.handoffs.leave("secret")


def test_a_peer_that_is_not_configured_is_refused(ends):
    _, consumer = ends
    with pytest.raises(RequestError, match=r"peer 'evil.example:7' is not configured"):
        wait(consumer, "any", 0, "evil.example:7")


def test_an_asyncio_consumer_takes_what_a_blocking_producer_gives(daemon, ends, digests):
    producer, _ = ends

    async def take():
        async with await AsyncClient.connect(daemon.socket) as client:
            space = await client.attach(MANIFEST)
            ready = await space.handoffs.wait("mixed", 0, timeout_seconds=DEADLINE_SECONDS)
            await space.handoffs.leave("mixed")
            return ready

    produce(producer, "mixed", digests)
    ready = asyncio.run(take())
    assert (ready.digests, ready.is_complete) == (digests, True)


def test_a_connectors_handoffs_fail_open(daemon, digests):
    with PrefixCache(MANIFEST, socket=daemon.socket, timeout_seconds=DEADLINE_SECONDS) as cache:
        handoffs = cache.handoffs
        assert handoffs.open("cached") == Opened("")
        assert handoffs.open("cached") is None
        assert handoffs.publish("cached", 0, digests)
        assert not handoffs.publish("cached", COUNT + 1, digests[:1])
        cache.store(digests, sources_of(MANIFEST, digests))
        assert handoffs.close("cached", b"7")
        assert not handoffs.close("cached")
        ready = handoffs.wait("cached", 0, timeout_seconds=DEADLINE_SECONDS)
        assert (ready.digests, ready.is_complete, ready.payload) == (digests, True, b"7")
        assert handoffs.wait("cached", 0, timeout_seconds=1, peer="evil") == NOTHING_AWAITED
        handoffs.leave("cached")


def test_a_daemon_that_dies_ends_every_wait(tmp_path, digests):
    with (
        Daemon(tmp_path) as daemon,
        PrefixCache(MANIFEST, socket=daemon.socket, timeout_seconds=DEADLINE_SECONDS) as cache,
    ):
        cache.handoffs.open("lost")
        answers = []
        waiting = threading.Thread(
            target=lambda: answers.append(
                cache.handoffs.wait("lost", 0, timeout_seconds=2 * DEADLINE_SECONDS)
            )
        )
        waiting.start()
        os.kill(daemon.pid, signal.SIGKILL)
        waiting.join(DEADLINE_SECONDS)
        assert answers == [NOTHING_AWAITED]
        assert cache.handoffs.open("next") is None

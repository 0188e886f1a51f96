"""The three clients against a live daemon: blocking, asyncio, and the one that fails open.

Every promise is asked of the blocking and of the asyncio client by the same test; `settled`
and `reserved` make their calls look alike.
"""

from __future__ import annotations

import asyncio
import errno
import inspect
import select
import socket
import time
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from itertools import count

import numpy as np
import pytest

from kvstore.client.aio import AsyncClient
from kvstore.client.cache import PrefixCache
from kvstore.client.connection import deadline_ms
from kvstore.client.sync import Client
from kvstore.errors import (
    ChecksumError,
    KVStoreError,
    LeaseError,
    ManifestError,
    RequestError,
    ReservationError,
    TooLargeError,
    UnavailableError,
)
from kvstore.limits import KEYS_PER_REQUEST_MAX, MIB
from kvstore.protocol import messages as m
from kvstore.transfer.copies import Runs
from kvstore.types import HeadRange, ReserveOutcome
from tests.support.making import (
    empty_targets,
    loose_digest,
    make_digests,
    make_manifest,
    make_payload,
    opaque_manifest,
    runs_of,
    sources_of,
)
from tests.support.waiting import DEADLINE_SECONDS, wait_until

MANIFEST = make_manifest(model="clients")
DIGESTS = make_digests(4)
LOWER, UPPER = HeadRange(0, 2), HeadRange(2, 4)


@pytest.fixture(params=[Client, AsyncClient], ids=["sync", "async"])
def kind(request):
    return request.param


async def settled(answer):
    """Return *answer*, awaited when it must be."""
    return await answer if inspect.isawaitable(answer) else answer


async def opened(stack: AsyncExitStack, kind, daemon, manifest=MANIFEST):
    """Return a client of this *kind* and the namespace of *manifest*, entered through it."""
    client = await settled(kind.connect(daemon.socket, name="clients", timeout_seconds=10))
    stack.callback(client.close)
    return client, await settled(client.attach(manifest))


@asynccontextmanager
async def reserved(space, digests):
    """Reserve through either client."""
    room = space.reserve(digests)
    if hasattr(room, "__aenter__"):
        async with room as vacancies:
            yield vacancies
    else:
        with room as vacancies:
            yield vacancies


async def put(space, digests):
    """Reserve, fill and commit *digests*; return what became of each."""
    async with reserved(space, digests) as vacancies:
        fill(vacancies)
    return [vacancy.outcome for vacancy in vacancies]


def fill(vacancies) -> None:
    for vacancy in vacancies:
        if vacancy.is_reserved:
            vacancy.fill(Runs.of_buffer(make_payload(vacancy.digest, vacancy.size_bytes)))


async def test_what_one_stores_the_other_loads(daemon, kind):
    async with AsyncExitStack() as stack:
        _, space = await opened(stack, kind, daemon)
        _, reader = await opened(stack, AsyncClient if kind is Client else Client, daemon)
        assert await put(space, DIGESTS) == [ReserveOutcome.RESERVED] * 4
        assert await put(space, DIGESTS) == [ReserveOutcome.PRESENT] * 4
        loaded = await settled(reader.load(DIGESTS))
        buffers, targets = empty_targets(MANIFEST, 4)
        loaded.copy_to(targets)
        loaded.release()
        for digest, buffer in zip(DIGESTS, buffers, strict=True):
            assert buffer == make_payload(digest, MANIFEST.chunk_bytes)


async def test_shards_of_two_writers_are_joined_for_readers_of_any_width(daemon, kind):
    planes = MANIFEST.layers * 2
    whole = np.frombuffer(make_payload(DIGESTS[0], MANIFEST.chunk_bytes), np.uint8)
    heads = whole.reshape(planes, MANIFEST.kv_heads, -1)
    async with AsyncExitStack() as stack:
        _, space = await opened(stack, kind, daemon)
        for half in (LOWER, UPPER):
            part = np.ascontiguousarray(heads[:, half.start : half.stop])
            with ExitStack() as inner:
                _, writer = sync_space(inner, daemon)
                assert writer.store(DIGESTS[:1], runs_of([part]), heads=half).stored == 1
        for wanted in (HeadRange(0, 4), LOWER, HeadRange(1, 3), HeadRange(3, 4)):
            loaded = await settled(space.load(DIGESTS[:1], heads=wanted))
            target = np.zeros((planes, wanted.width, heads.shape[2]), np.uint8)
            loaded.copy_to([Runs.of_buffer(target)])
            assert np.array_equal(target, heads[:, wanted.start : wanted.stop])
            loaded.release()


def sync_space(stack: ExitStack, daemon):
    client = stack.enter_context(daemon.connect())
    return client, client.attach(MANIFEST)


async def test_pins_deletes_and_leases_do_as_they_say(daemon, kind):
    async with AsyncExitStack() as stack:
        client, space = await opened(stack, kind, daemon)
        await put(space, DIGESTS)
        assert await settled(space.pin(DIGESTS[:1], hard=True)) == 1
        found = await settled(space.lookup(DIGESTS, lease=True))
        assert (found.hits, found.lease > 0) == (4, True)
        assert (await settled(space.delete(DIGESTS))).busy == 4
        await settled(space.release(found.lease))
        with pytest.raises(LeaseError):
            await settled(space.release(found.lease))
        assert (await settled(space.delete(DIGESTS))).count == 3
        assert await settled(space.unpin(DIGESTS)) == 1
        assert (await settled(client.stats())).tiers[0].chunks == 1
        assert await settled(client.ping(b"echo")) == b"echo"


async def test_an_exception_while_filling_gives_everything_back(daemon, kind):
    async with AsyncExitStack() as stack:
        client, space = await opened(stack, kind, daemon)
        with pytest.raises(ZeroDivisionError):
            await fill_one_and_fail(space)
        assert await settled(client.ping()) == b""
        stats = await settled(client.stats())
        assert (stats.reservations, stats.tiers[0].used_bytes) == (0, 0)


async def fill_one_and_fail(space) -> None:
    async with reserved(space, DIGESTS) as vacancies:
        fill(vacancies[:1])
        raise ZeroDivisionError


async def test_a_lookup_that_waits_is_answered_when_the_chunk_arrives(daemon, kind):
    async with AsyncExitStack() as stack:
        client, writer = await opened(stack, kind, daemon)
        async with reserved(writer, DIGESTS) as vacancies:
            requests = (await settled(client.stats())).counters["requests"]
            waiting = asyncio.get_running_loop().run_in_executor(None, wait_in_thread, daemon)
            # A hello, an attach and the look-up of the one who waits, beside our own questions.
            for asked in count(1):
                now = (await settled(client.stats())).counters["requests"]
                if now >= requests + asked + 3:
                    break
            assert not waiting.done()
            fill(vacancies)
        assert await waiting == 4


def wait_in_thread(daemon) -> int:
    with ExitStack() as stack:
        _, space = sync_space(stack, daemon)
        return space.lookup(DIGESTS, wait=True).hits


async def test_a_lookup_that_waits_in_vain_says_what_is_here(daemon, kind):
    async with AsyncExitStack() as stack:
        _, writer = await opened(stack, AsyncClient, daemon)
        async with writer.reserve(DIGESTS):
            found = await found_in_vain(stack, kind, daemon)
            assert (found.hits, found.arriving) == (0, 4)


async def found_in_vain(stack: AsyncExitStack, kind, daemon):
    """Wait for what nobody fills; on a busy machine the daemon's tenth of the time may be short."""
    for seconds in (0.5, 4.0):
        _, space = await opened(stack, kind, daemon)
        with suppress(UnavailableError):
            return await settled(space.lookup(DIGESTS, wait=True, timeout_seconds=seconds))
    _, space = await opened(stack, kind, daemon)
    return await settled(space.lookup(DIGESTS, wait=True, timeout_seconds=DEADLINE_SECONDS))


def test_a_reply_that_is_here_counts_though_the_thread_was_held_up_beyond_its_time(daemon):
    with daemon.connect() as client:
        connection = client._connection
        ping = m.Ping(connection.next_id(), deadline_ms(DEADLINE_SECONDS), b"echo")
        asked = connection.begin(ping)
        wait_until(lambda: select.select([connection._socket], [], [], 0)[0], what="reply")
        assert connection.finish(asked, m.Pong, 0.0).payload == b"echo"
        assert client_is_open(client)


async def test_a_reply_that_is_here_counts_though_the_loop_was_held_up_beyond_its_time(daemon):
    async with AsyncExitStack() as stack:
        client, _ = await opened(stack, AsyncClient, daemon)
        connection = client._connection
        ping = m.Ping(connection.next_id(), deadline_ms(DEADLINE_SECONDS), b"echo")
        ends_at = time.monotonic() + 0.3
        asked = asyncio.ensure_future(connection.call(ping, m.Pong, 0.3))
        await asyncio.sleep(0)
        # From here on nothing runs in this loop until the reply lies there and its time is over.
        wait_until(lambda: select.select([connection._socket], [], [], 0)[0], what="reply")
        wait_until(lambda: time.monotonic() > ends_at + 0.05)
        assert (await asked).payload == b"echo"
        assert client_is_open(client)


async def test_the_daemons_refusals_come_as_their_errors(daemon, kind):
    async with AsyncExitStack() as stack:
        client, space = await opened(stack, kind, daemon)
        with pytest.raises(TooLargeError):
            await settled(client.attach(opaque_manifest(64 * MIB)))
        with pytest.raises(RequestError):
            await settled(space.load(DIGESTS, heads=HeadRange(0, 9)))
        assert await put(space, DIGESTS) == [ReserveOutcome.RESERVED] * 4
        async with reserved(space, DIGESTS) as vacancies:
            with pytest.raises(ReservationError, match="the chunk is present"):
                vacancies[0].seal()


async def test_a_daemon_that_is_gone_is_unavailable_for_every_call(daemon, kind):
    async with AsyncExitStack() as stack:
        client, space = await opened(stack, kind, daemon)
        daemon.kill()
        for ask in (client.ping, client.stats, lambda: space.lookup(DIGESTS)):
            with pytest.raises(UnavailableError):
                await settled(ask())
        assert not client_is_open(client)
    with pytest.raises(UnavailableError):
        await settled(kind.connect(daemon.socket, timeout_seconds=1))


def client_is_open(client) -> bool:
    return client._connection.is_open


# --- bytes that are not what they were ---------------------------------------------------


def spoil(space, digest) -> None:
    """Flip one stored bit of *digest*."""
    with space.load([digest]) as loaded:
        loaded.chunks[0].shards[0]._bytes[1000] ^= 4


def test_altered_bytes_are_caught_and_the_chunk_can_be_stored_anew(daemon):
    with ExitStack() as stack:
        _, space = sync_space(stack, daemon)
        space.store(DIGESTS, sources_of(MANIFEST, DIGESTS))
        spoil(space, DIGESTS[2])
        buffers, targets = empty_targets(MANIFEST, 4)
        with pytest.raises(ChecksumError), space.load(DIGESTS) as loaded:
            loaded.copy_to(targets)
        cache = stack.enter_context(PrefixCache(MANIFEST, socket=daemon.socket, timeout_seconds=5))
        assert cache.load(DIGESTS, targets) == 2
        assert bytes(buffers[1]) == make_payload(DIGESTS[1], MANIFEST.chunk_bytes)
        assert cache.lookup(DIGESTS) == 2
        assert cache.store(DIGESTS, sources_of(MANIFEST, DIGESTS)).stored == 1
        assert cache.load(DIGESTS, targets) == 4


def test_with_verification_off_altered_bytes_are_served(start_daemon):
    """The negative control: it is the checksum that catches them."""
    daemon = start_daemon({"tiers.host.verify_load": "false"})
    with ExitStack() as stack:
        _, space = sync_space(stack, daemon)
        space.store(DIGESTS, sources_of(MANIFEST, DIGESTS))
        spoil(space, DIGESTS[0])
        buffers, targets = empty_targets(MANIFEST, 1)
        with space.load(DIGESTS[:1]) as loaded:
            loaded.copy_to(targets)
            with pytest.raises(ChecksumError):
                loaded.chunks[0].shards[0].verify()
        assert bytes(buffers[0]) != make_payload(DIGESTS[0], MANIFEST.chunk_bytes)


def test_without_verification_a_lease_that_ended_meanwhile_is_an_error(start_daemon):
    daemon = start_daemon({"tiers.host.verify_load": "false", "leases.ttl": "1s"})
    with ExitStack() as stack:
        _, space = sync_space(stack, daemon)
        space.store(DIGESTS, sources_of(MANIFEST, DIGESTS))
        loaded = space.load(DIGESTS)
        wait_until(lambda: not loaded.is_valid, what="the lease ends")
        with pytest.raises(LeaseError):
            loaded.copy_to(empty_targets(MANIFEST, 4)[1])


def test_a_chunk_of_another_size_is_refused(daemon):
    with ExitStack() as stack:
        _, space = sync_space(stack, daemon)
        refusal = pytest.raises(RequestError, match=r"100 bytes for heads .0, 2. .* takes 16384")
        with refusal, space.reserve(DIGESTS[:1], heads=LOWER, sizes=[100]):
            pass


# --- failing open -------------------------------------------------------------------------


@pytest.fixture
def cache(daemon):
    with PrefixCache(MANIFEST, socket=daemon.socket, timeout_seconds=5) as made:
        yield made


def test_a_prefix_longer_than_one_request_is_found_whole(cache):
    digests = [loose_digest(number) for number in range(KEYS_PER_REQUEST_MAX + 10)]
    cache.store(digests[:3], sources_of(MANIFEST, digests[:3]))
    assert cache.lookup(digests) == 3
    assert cache.lookup(digests, window=2) == 3


@pytest.mark.parametrize("window", [2, KEYS_PER_REQUEST_MAX // 2])
@pytest.mark.parametrize("stop", [3, 4000, 5000])
def test_a_window_is_found_in_a_prefix_of_several_requests(cache, window, stop):
    digests = [loose_digest(number) for number in range(6000)]
    stored = digests[max(0, stop - window) : stop] if window == 2 else digests[:3]
    cache.store(stored, sources_of(MANIFEST, stored))
    assert cache.lookup(digests, window=window) == (stop if window == 2 else 3)


@pytest.mark.parametrize("window", [KEYS_PER_REQUEST_MAX, KEYS_PER_REQUEST_MAX + 1, 10_000])
def test_a_window_as_long_as_a_request_or_longer_is_answered_by_what_leads(cache, window):
    digests = [loose_digest(number) for number in range(6000)]
    cache.store(digests[:3], sources_of(MANIFEST, digests[:3]))
    before = requests_of(cache)
    assert cache.lookup(digests, window=window) == 3
    assert cache.lookup(digests[:100], window=window) == 3
    assert requests_of(cache) - before < 10


def requests_of(cache: PrefixCache) -> int:
    return cache._breaker.link.client.stats().counters["requests"]


def test_nothing_asked_is_nothing_found(cache):
    assert (cache.lookup([]), cache.load([], []), cache.store([], []).stored) == (0, 0, 0)


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENOMEM])
def test_an_engine_without_descriptors_to_spare_goes_on_without_the_daemon(
    daemon, monkeypatch, code
):
    real = socket.socket

    def refuse(*_args: object, **_fields: object) -> None:
        raise OSError(code, "none left")

    monkeypatch.setattr(socket, "socket", refuse)
    with PrefixCache(MANIFEST, socket=daemon.socket) as cache:
        assert cache.lookup(DIGESTS) == 0
        monkeypatch.setattr(socket, "socket", real)
        wait_until(lambda: cache.is_connected, what="it connects once it can")


def test_a_manifest_that_the_daemon_refuses_is_a_miss(daemon):
    manifest = opaque_manifest(64 * MIB)
    with PrefixCache(manifest, socket=daemon.socket) as cache:
        assert cache.lookup(DIGESTS) == 0
    with daemon.connect() as client, pytest.raises(KVStoreError):
        client.attach(manifest)
    assert issubclass(ManifestError, KVStoreError)

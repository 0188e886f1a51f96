"""Two daemons, a real Redis: what one holds is a hit on the other, whatever is lost or forged."""

from __future__ import annotations

import contextlib
import socket
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import pytest

from kvstore.client.sync import Client
from kvstore.daemon.peer_link import PeerAddress, _greet
from kvstore.hashing import root_of
from kvstore.limits import PEER_SPARE_SENDS_MAX
from kvstore.protocol import messages as m, peering as p
from kvstore.transfer.wire import Wire, dial
from kvstore.types import Digest
from tests.support.daemon import Daemon
from tests.support.handoffs import is_right
from tests.support.hosts import TOKEN, called, caller, free_port
from tests.support.making import (
    make_digests,
    make_manifest,
    make_payload,
    make_root,
    sources_of,
)
from tests.support.redis import SERVER, RedisServer
from tests.support.waiting import DEADLINE_SECONDS, wait_until

pytestmark = pytest.mark.skipif(SERVER is None, reason="redis-server is not installed")

MANIFEST = make_manifest(model="shared between hosts")
SPACE = MANIFEST.namespace_id()
HELD = f"kvstore:{SPACE.hex()}:held:prefill"
COUNT = 6
LIMITS = {
    "DIRECTORY_TTL_SECONDS": 2.0,
    "DIRECTORY_BEAT_SECONDS": 0.25,
    # Nothing here is silent for long: who has gone is refused at once.
    "PEER_TIMEOUT_SECONDS": 5.0,
    "BREAKER_PAUSE_MIN_SECONDS": 0.1,
    "BREAKER_PAUSE_MAX_SECONDS": 0.2,
    # A look-up hears what there is to hear, however busy this machine is.
    "FIND_WAIT_MAX_SECONDS": 10.0,
}
PROMPTS = count(100)


def settings(redis: RedisServer) -> dict[str, object]:
    return {
        "peer.share": "true",
        "tiers.redis.url": redis.unix_url,
        # The directory alone: what is found, peers have.
        "tiers.redis.write": "never",
        "tiers.redis.timeout": "300ms",
        "tenants.blue.quota": "4MiB",
    }


class Hosts:
    """The daemon *one* that holds, the daemon *other* that asks, and the directory between them."""

    def __init__(self, directory) -> None:
        self.redis = RedisServer(directory / "redis")
        self.port = free_port()
        chosen = settings(self.redis)
        self.one = called(directory / "one", self.port, chosen, LIMITS)
        self.other = caller(directory / "other", self.port, chosen, LIMITS)

    def told(self, digest: Digest) -> bool:
        """Return whether the directory says that *one* holds *digest*."""
        is_set = self.redis.do("TYPE", HELD) == b"set"
        return is_set and self.redis.do("SISMEMBER", HELD, digest[:16]) == 1

    def counter(self, name: str) -> int:
        """Return what the peer tier of *other* has counted."""
        return tier_of(self.other, "peer").counters[name]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    made = Hosts(tmp_path_factory.mktemp("sharing"))
    with made.redis, made.one, made.other:
        yield made
        with made.one.connect() as client:
            stored(made, client.attach(MANIFEST))
        assert made.one.stop() == 0
        assert not made.redis.do("EXISTS", HELD), "who stops says that it holds nothing"


@pytest.fixture
def ends(hosts):
    with hosts.one.connect("writer") as writer, hosts.other.connect("reader") as reader:
        yield writer.attach(MANIFEST), reader.attach(MANIFEST)
    for daemon in (hosts.one, hosts.other):
        wait_until(lambda one=daemon: left_behind(one) == [0, 0], what="all has ended")


def left_behind(daemon: Daemon) -> list[int]:
    stats = daemon.stats()
    return [stats.leases, stats.reservations]


def tier_of(daemon: Daemon, name: str) -> m.TierStats:
    return next(tier for tier in daemon.stats().tiers if tier.tier == name)


def stored(hosts: Hosts, writer) -> list[Digest]:
    """Store a prefix at *one*, and wait until the directory knows of all of it."""
    digests = make_digests(COUNT, next(PROMPTS))
    assert writer.store(digests, sources_of(MANIFEST, digests)).stored == COUNT
    wait_until(lambda: all(map(hosts.told, digests)), what="the directory is told")
    return digests


def find(reader, digests: list[Digest]) -> None:
    """Wait until *other* knows that all of *digests* are at *one*."""
    wait_until(lambda: reader.lookup(digests).hits == COUNT, what="all are found")


def test_what_one_host_stores_is_a_hit_on_the_other_and_comes_once(hosts, ends):
    writer, reader = ends
    digests = stored(hosts, writer)
    wait_until(lambda: 0 < hosts.redis.do("PTTL", HELD) <= 2000, what="it ends by itself")
    find(reader, digests)
    before, received = tier_of(hosts.other, "peer"), hosts.other.stats().counters
    found = reader.lookup(digests)
    assert (found.hits, found.tiers) == (COUNT, [(16, COUNT)])
    with ThreadPoolExecutor(4) as threads, hosts.other.connect() as client:
        spaces = [client.attach(MANIFEST) for _ in range(4)]
        assert all(threads.map(lambda space: is_right(space, digests), spaces))
    after, counters = tier_of(hosts.other, "peer"), hosts.other.stats().counters
    assert after.hit_chunks - before.hit_chunks == COUNT
    size = COUNT * MANIFEST.chunk_bytes
    assert counters["peer_received_bytes"] - received["peer_received_bytes"] == size
    assert after.counters["read_bytes"] - before.counters["read_bytes"] == size
    assert reader.lookup(digests).tiers == [(2 + 16, COUNT)]
    assert tier_of(hosts.other, "redis").counters["write_chunks"] == 0


def test_what_a_tier_wants_at_once_is_answered_in_its_order_and_no_turn_is_lost(hosts, ends):
    writer, _ = ends
    digests = stored(hosts, writer)
    order = [*digests[:2], *make_digests(1, next(PROMPTS)), *digests[2:]]
    size = MANIFEST.chunk_bytes
    wants = []
    for digest in order:
        root = make_root(make_payload(digest, size))
        wants.append(p.Want(SPACE, digest, p.OfferedShard(0, MANIFEST.kv_heads, size, root), True))
    address = PeerAddress("prefill", "127.0.0.1", hosts.port, TOKEN.strip().encode())
    connection = dial(address.host, address.port, None, timeout_seconds=DEADLINE_SECONDS)
    with contextlib.closing(Wire(connection, DEADLINE_SECONDS)) as wire:
        _greet(wire, address, "decode")
        for _ in range(PEER_SPARE_SENDS_MAX + 1):
            wire.begin(DEADLINE_SECONDS)
            wire.send_frames([p.encode(want) for want in wants])
            for want in wants:
                answer = p.decode(wire.receive_frame())
                assert answer == (p.Gone() if want.digest == order[2] else p.Sending(size))
                if isinstance(answer, p.Sending):
                    blocks = wire.receive_bytes(memoryview(bytearray(size)))
                    assert root_of(blocks) == want.shard.root
        assert wire.is_quiet()


def test_neither_another_manifest_nor_another_tenant_sees_any_of_it(hosts, ends):
    writer, reader = ends
    digests = stored(hosts, writer)
    others = [make_manifest(model="other"), make_manifest(model=MANIFEST.model, revision="2")]
    with hosts.other.connect() as client:
        assert [client.attach(other).lookup(digests).hits for other in others] == [0, 0]
    # What a tenant stores is that tenant's on every host, and nobody else's.
    theirs = make_digests(COUNT, next(PROMPTS))
    with blue(hosts.one) as one, blue(hosts.other) as other:
        assert other.attach(MANIFEST).lookup(digests).hits == 0
        one.attach(MANIFEST).store(theirs, sources_of(MANIFEST, theirs))
        space = other.attach(MANIFEST)
        wait_until(lambda: space.lookup(theirs).hits == COUNT, what="it is found by its tenant")
        assert is_right(space, theirs)
        assert reader.lookup(theirs).hits == 0
    find(reader, digests)


def blue(daemon: Daemon) -> Client:
    return Client.connect(daemon.socket, tenant="blue", timeout_seconds=DEADLINE_SECONDS)


def test_what_has_left_the_other_host_is_a_miss_and_leaves_the_directory(hosts, ends):
    writer, reader = ends
    digests = stored(hosts, writer)
    find(reader, digests)
    assert writer.delete(digests).count == COUNT
    # What was found before is not there any more; what is stored anew is found again.
    with reader.load(digests) as loaded:
        assert len(loaded) == 0
    assert reader.lookup(digests).hits == 0
    wait_until(lambda: not any(map(hosts.told, digests)), what="the directory forgets them")
    writer.store(digests, sources_of(MANIFEST, digests))
    wait_until(lambda: all(map(hosts.told, digests)), what="the directory is told anew")
    find(reader, digests)
    assert is_right(reader, digests)


def test_forged_entries_cost_a_question_and_contact_nobody(hosts, ends):
    writer, reader = ends
    digests = stored(hosts, writer)
    absent = make_digests(COUNT, next(PROMPTS))
    stale = hosts.counter("stale")
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.setblocking(False)
        address = f"tcp://127.0.0.1:{trap.getsockname()[1]}"
        for name in (address, "stranger", "decode", ""):
            hosts.redis.do("SADD", f"kvstore:{SPACE.hex()}:held:{name}", *(d[:16] for d in absent))
        assert reader.lookup(absent).hits == 0
        assert hosts.counter("stale") == stale

        def is_asked() -> bool:
            hosts.redis.do("SADD", HELD, *(d[:16] for d in absent), address, b"\0" * 4096)
            assert reader.lookup(absent).hits == 0
            return hosts.counter("stale") > stale

        # Its host may have taken them out again, before anybody looks.
        wait_until(is_asked, what="the host is asked, and does not have them")
        wait_until(lambda: not any(map(hosts.told, absent)), what="they are taken out")
        with pytest.raises(BlockingIOError):
            trap.accept()
    # Something else under that name is nothing, and is told anew once it has gone.
    hosts.redis.do("DEL", HELD)
    hosts.redis.do("SET", HELD, "of another program", "PX", 300)
    assert reader.lookup(absent).hits == 0
    wait_until(lambda: all(map(hosts.told, digests)), what="all is told anew")
    find(reader, digests)
    assert is_right(reader, digests)


def test_a_directory_that_is_silent_or_gone_delays_nobody_and_is_told_again(hosts, ends):
    writer, reader = ends
    digests = stored(hosts, writer)
    find(reader, digests)
    assert is_right(reader, digests)
    hosts.redis.pause()
    try:
        unknown = make_digests(COUNT, next(PROMPTS))
        assert reader.lookup(unknown).hits == 0
        assert reader.lookup(digests).hits == COUNT
        assert is_right(reader, digests)
        assert is_right(writer, digests)
    finally:
        hosts.redis.kill()
        hosts.redis.start()
    wait_until(lambda: all(map(hosts.told, digests)), what="an empty directory is told anew")
    wait_until(lambda: tier_of(hosts.other, "peer").state == "ready", what="it is asked again")
    find(reader, stored(hosts, writer))


def test_a_host_that_is_killed_is_a_miss_and_vanishes_and_comes_back_empty(hosts, ends):
    writer, reader = ends
    found, unknown = stored(hosts, writer), stored(hosts, writer)
    find(reader, found)
    hosts.one.kill()
    try:
        with reader.load(found) as loaded:
            assert len(loaded) == 0
        assert reader.lookup(found).hits == reader.lookup(unknown).hits == 0
        wait_until(lambda: not hosts.redis.do("EXISTS", HELD), what="its entries end by themselves")
        assert reader.lookup(unknown).hits == 0
        # What was computed instead is stored here.
        assert reader.store(found, sources_of(MANIFEST, found)).stored == COUNT
        assert is_right(reader, found)
    finally:
        hosts.one.__enter__()
    with hosts.one.connect() as client:
        digests = stored(hosts, client.attach(MANIFEST))
    find(reader, digests)
    assert is_right(reader, digests)

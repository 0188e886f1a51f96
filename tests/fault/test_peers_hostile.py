"""Nobody across the network is trusted: callers without the token, and peers that lie."""

from __future__ import annotations

import contextlib
import signal
import socket
import ssl
import struct

import pytest

from kvstore.daemon.peer_link import PeerAddress, PeerLink
from kvstore.errors import LimitError, ProtocolError, TierError
from kvstore.metrics import Counters
from kvstore.protocol import peering as p
from kvstore.types import HandoffState
from tests.support.daemon import Daemon
from tests.support.handoffs import is_right, store_one, take_all, wait
from tests.support.hosts import TOKEN, called, caller, free_port
from tests.support.liars import MANIFEST, SIZE, Liar, frame, offer, read, right
from tests.support.making import make_digests, make_payload
from tests.support.redis import SERVER, RedisServer
from tests.support.redis_tls import make_certificates
from tests.support.waiting import DEADLINE_SECONDS, wait_until

DIGESTS = make_digests(3)
LIMITS = {"PULL_TROUBLE_SECONDS": 1.0, "PEER_TIMEOUT_SECONDS": 1.0}


def other_bytes(want: p.Want) -> bytes:
    wrong = bytearray(right(want))
    wrong[-1] ^= 1
    return bytes(wrong)


ONE = [offer(DIGESTS[0])]
LIES = {
    "other bytes": (ONE, other_bytes),
    "bytes of another chunk": (
        ONE,
        lambda want: right(p.Want(want.namespace, DIGESTS[1], want.shard)),
    ),
    "more than it announced": (ONE, lambda _: frame(p.Sending(SIZE + 1)) + bytes(SIZE + 1)),
    "less than it announced": (ONE, lambda _: frame(p.Sending(SIZE - 1)) + bytes(SIZE - 1)),
    "another answer": (ONE, lambda _: frame(p.Left())),
    "no message at all": (ONE, lambda _: struct.pack("<I", 3) + b"xyz"),
    "a frame without end": (ONE, lambda _: struct.pack("<I", 2**32 - 1)),
}
ABSURD = {
    "a chunk of another size": [offer(DIGESTS[0], size=SIZE - 1)],
    "a chunk with a head missing": [offer(DIGESTS[0], size=SIZE // 4 * 3, heads=(0, 3))],
    "a chunk with too many heads": [offer(DIGESTS[0], size=SIZE // 4 * 5, heads=(0, 5))],
    "heads the wrong way round": [offer(DIGESTS[0], heads=(4, 0))],
}


@pytest.fixture
def decode(tmp_path):
    """Start the calling daemon, whose only peer is a liar."""
    started = []

    def start(liar: Liar) -> Daemon:
        daemon = caller(tmp_path, liar.port, limits=LIMITS)
        started.extend((liar, daemon))
        return daemon.__enter__()

    yield start
    liar, daemon = started
    daemon.stop()
    liar.close()


def nothing_comes(daemon: Daemon, name: str = "lies") -> None:
    """The consumer is told in time that nothing comes, and nothing is left behind."""
    with daemon.connect() as client:
        space = client.attach(MANIFEST)
        ready = wait(space, name, 0, "prefill")
        while not ready.is_last:
            ready = wait(space, name, 0, "prefill")
        assert (ready.digests, ready.state) == ([], HandoffState.BROKEN), name
        assert space.lookup(DIGESTS).hits == 0
        space.handoffs.leave(name, peer="prefill")
        stats = client.stats()
        wait_until(lambda: not client.stats().handoffs, what="it ends")
        assert (stats.reservations, stats.leases, stats.tiers[0].used_bytes) == (0, 0, 0)


def test_a_peer_that_lies_about_bytes_is_found_out_and_left(decode):
    liar = Liar(ONE, right)
    daemon = decode(liar)
    for name, (offers, answer) in LIES.items():
        liar.offers, liar.answer = offers, answer
        before = daemon.stats().counters["peer_faults"]
        nothing_comes(daemon, name)
        assert daemon.stats().counters["peer_faults"] > before, name
        assert daemon.used_bytes() == 0
    liar.offers, liar.answer = [offer(digest) for digest in DIGESTS], right
    with daemon.connect() as client:
        space = client.attach(MANIFEST)
        assert take_all(space, "truth", "prefill") == DIGESTS
        assert is_right(space, DIGESTS)


def test_offers_that_cannot_be_are_refused(decode):
    liar = Liar(ONE, right)
    daemon = decode(liar)
    for name, offers in ABSURD.items():
        liar.offers = offers
        nothing_comes(daemon, name)


def test_a_peer_of_another_version_is_not_used(decode):
    daemon = decode(Liar(ONE, right, version=3))
    nothing_comes(daemon)
    assert "peer protocol 3 to 3, this daemon 1 to 2" in daemon.log()


@contextlib.contextmanager
def link_to(liar: Liar, counters: Counters):
    address = PeerAddress("prefill", "127.0.0.1", liar.port, TOKEN.strip().encode())
    link = PeerLink(address, "decode", counters)
    with contextlib.closing(liar), contextlib.closing(link):
        yield link


async def test_a_peer_of_the_first_version_is_followed_and_not_asked_what_it_holds():
    liar = Liar(ONE, right, version=1)
    with link_to(liar, Counters()) as link:
        for _ in range(2):
            with pytest.raises(TierError, match="it speaks peer protocol 1, 2 is needed"):
                await link.have(p.Have(bytes(16), DIGESTS))
        following = await link.follow(p.Follow(bytes(16), "", "name", 0, 1000, early=False))
        assert following.offers == ONE
        assert liar.asked == [p.Follow]


async def test_a_peer_that_says_why_it_sends_nothing_has_not_lied():
    counters = Counters()
    liar = Liar(ONE, lambda _: frame(p.PeerFault(LimitError.code, "too many leases")))
    want = p.Want(MANIFEST.namespace_id(), DIGESTS[0], ONE[0].shards[0], spare=True)
    with link_to(liar, counters) as link:
        for _ in range(2):
            with pytest.raises(LimitError, match="too many leases"):
                await link.take([(want, memoryview(bytearray(SIZE)))], lambda *_: None)
    assert counters.peer_faults == 0


async def take_some(liar: Liar, counters: Counters) -> None:
    """Want three chunks of *liar* at once; raise what it leads to, once what came is right."""
    order = [DIGESTS[0], DIGESTS[2], DIGESTS[1]]
    wants = [p.Want(bytes(16), digest, offer(digest).shards[0], spare=True) for digest in order]
    targets = [memoryview(bytearray(SIZE)) for _ in order]
    came: list[int] = []
    with link_to(liar, counters) as link:
        try:
            wanted = list(zip(wants, targets, strict=True))
            await link.take(wanted, lambda number, _: came.append(number))
        finally:
            assert came == [0]
            assert targets[0] == make_payload(order[0], SIZE)


@pytest.mark.parametrize("lie", LIES)
async def test_what_came_before_a_lie_is_good_and_nothing_behind_it_comes(lie):
    _, lying = LIES[lie]
    counters = Counters()
    liar = Liar([], lambda want: (right if want.digest == DIGESTS[0] else lying)(want))
    with pytest.raises(ProtocolError):
        await take_some(liar, counters)
    assert (counters.peer_faults, counters.peer_received_bytes) == (1, SIZE)


async def test_what_came_before_the_end_of_a_peer_is_good():
    answers = iter([right, lambda want: right(want)[: SIZE // 2]])

    def answer(want: p.Want) -> bytes:
        answering = next(answers, None)
        if answering is None:
            raise ConnectionResetError("killed")
        return answering(want)

    counters = Counters()
    with pytest.raises(TierError):
        await take_some(Liar([], answer), counters)
    assert (counters.peer_faults, counters.peer_received_bytes) == (0, SIZE)


@pytest.mark.skipif(SERVER is None, reason="redis-server is not installed")
def test_a_peer_that_lies_to_the_tier_is_left_alone_and_nothing_of_it_is_served(tmp_path):
    pauses = {"BREAKER_PAUSE_MIN_SECONDS": 0.05, "BREAKER_PAUSE_MAX_SECONDS": 0.05}
    liar = Liar(ONE, right)
    key = f"kvstore:{MANIFEST.namespace_id().hex()}:held:prefill"
    with RedisServer(tmp_path / "redis") as redis:
        sharing = {
            "peer.share": "true",
            "tiers.redis.url": redis.unix_url,
            "tiers.redis.write": "never",
        }
        redis.do("SADD", key, *(digest[:16] for digest in DIGESTS))
        limits = LIMITS | pauses
        with caller(tmp_path, liar.port, sharing, limits) as daemon, daemon.connect() as client:
            space = client.attach(MANIFEST)

            def lies() -> int:
                return client.stats().tiers[-1].counters["lies"]

            for number, (name, (_, answer)) in enumerate(LIES.items(), 1):
                liar.answer = answer
                wait_until(lambda: space.lookup(DIGESTS).hits == 1, what="it is asked again")
                assert not is_right(space, DIGESTS[:1]), name
                assert lies() == number, name
                assert daemon.used_bytes() == 0
            liar.answer = right
            wait_until(lambda: space.lookup(DIGESTS).hits == 1, what="it is asked again")
            assert is_right(space, DIGESTS[:1])
            stats = client.stats()
            assert (stats.reservations, stats.leases) == (0, 0)
            assert stats.tiers[-1].state == "ready", "others would be asked on"
    liar.close()


def test_a_peer_that_does_not_know_the_token_is_not_used(decode):
    daemon = decode(Liar(ONE, right, token="guessed, and wrongly"))
    nothing_comes(daemon)
    assert "does not know the token" in daemon.log()
    assert TOKEN.strip() not in daemon.log()


GREETINGS = {
    "nothing": b"",
    "noise": b"\xff" * 64,
    "a web browser": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "a proof of nothing": frame(p.PeerHello(1, "evil", bytes(32), bytes(32))),
    "another version": frame(p.PeerHello(3, "evil", bytes(32), bytes(32))),
    "a request without a greeting": frame(
        p.Want(bytes(16), DIGESTS[0], p.OfferedShard(0, 4, 1, 0))
    ),
}


def test_callers_without_the_token_see_nothing_and_disturb_nobody(tmp_path):
    port = free_port()
    with (
        called(tmp_path, port, limits={"PEER_TIMEOUT_SECONDS": DEADLINE_SECONDS}) as daemon,
        daemon.connect() as client,
    ):
        space = client.attach(MANIFEST)
        store_one(space, DIGESTS, 0)
        for greeting in GREETINGS.values():
            with socket.create_connection(("127.0.0.1", port), DEADLINE_SECONDS) as connection:
                challenge = read(connection)
                assert isinstance(challenge, p.PeerNonce)
                # It may hang up as soon as it has seen enough.
                with contextlib.suppress(OSError):
                    connection.sendall(greeting)
                    connection.shutdown(socket.SHUT_WR)
                    while True:
                        assert isinstance(read(connection), p.PeerFault)
        wait_until(lambda: client.stats().counters["peer_faults"] == 5, what="all are counted")
        assert client.stats().counters["peer_sent_bytes"] == 0
        assert is_right(space, DIGESTS[:1])


def test_over_tls_a_handoff_comes_and_a_foreign_authority_is_refused(tmp_path):
    port = free_port()
    ours = make_certificates(tmp_path / "ours")
    theirs = make_certificates(tmp_path / "theirs")
    secret = {"peer.tls_cert_file": ours.certificate, "peer.tls_key_file": ours.key}
    with (
        called(tmp_path / "a", port, secret) as prefill,
        prefill.connect() as one,
    ):
        producer = one.attach(MANIFEST)
        producer.handoffs.open("secret")
        producer.handoffs.publish("secret", 0, DIGESTS)
        for number in range(len(DIGESTS)):
            store_one(producer, DIGESTS, number)
        producer.handoffs.close("secret")
        for authority, expected in ((theirs.authority, []), (ours.authority, DIGESTS)):
            way = {
                "peers.prefill.url": f"tls://127.0.0.1:{port}",
                "peers.prefill.ca_file": authority,
            }
            with (
                caller(tmp_path / authority.parent.name, port, way, LIMITS) as decode,
                decode.connect() as other,
            ):
                assert take_all(other.attach(MANIFEST), "secret", "prefill") == expected


def test_who_is_still_greeting_when_the_daemon_ends_is_let_go(tmp_path):
    port, ours = free_port(), make_certificates(tmp_path / "ours")
    secret = {"peer.tls_cert_file": ours.certificate, "peer.tls_key_file": ours.key}
    context = ssl.create_default_context(cafile=ours.authority)
    limits = {"PEER_TIMEOUT_SECONDS": DEADLINE_SECONDS}

    def call() -> socket.socket:
        return socket.create_connection(("127.0.0.1", port), DEADLINE_SECONDS)

    def is_closed() -> bool:
        try:
            call().close()
        except ConnectionError:
            return True
        return False

    with called(tmp_path, port, secret, limits) as daemon, call() as slow:
        with call() as other, context.wrap_socket(other, server_hostname="127.0.0.1") as greeted:
            assert greeted.recv(1), "both have been taken, in their order"
        daemon.send(signal.SIGTERM)
        wait_until(is_closed, what="nobody is taken any more")
        with (
            contextlib.suppress(OSError),
            context.wrap_socket(slow, server_hostname="127.0.0.1") as late,
        ):
            assert late.recv(1) == b""
        # Not by SIGTERM once more: at its very end it heeds none any more.
        assert daemon.end(signal.SIGCONT) == 0

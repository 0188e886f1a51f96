"""Too much at once: requests, waits, sessions, and readers that never read.

What is too much is refused alone or held back; memory stays bounded and nobody else waits.
"""

from __future__ import annotations

import array
import fcntl
import termios
from functools import partial

from kvstore.client.sync import Client
from kvstore.errors import LimitError
from kvstore.limits import (
    IN_FLIGHT_PER_SESSION_MAX,
    MIB,
    WRITE_BUFFER_MAX_BYTES,
)
from kvstore.protocol import messages as m
from kvstore.protocol.framing import frame
from tests.support.making import loose_digest, make_manifest
from tests.support.peer import RawPeer, error_codes
from tests.support.waiting import DEADLINE_SECONDS, wait_until

MANIFEST = make_manifest()


def test_the_65th_request_in_flight_is_refused_alone_and_all_others_are_answered(peer, other):
    digest = loose_digest(7)
    slot = other.reserve(digest)
    peer.enter(MANIFEST)
    ids = range(100, 100 + IN_FLIGHT_PER_SESSION_MAX)
    peer.send(*(m.Lookup(n, 50_000, 0, [digest], 0, wait=True) for n in ids))
    peer.send(m.Ping(999, 50))
    refusal = peer.receive()
    assert (refusal.request_id, refusal.code) == (999, LimitError.code)
    other.abort(slot)
    assert {peer.receive().request_id for _ in ids} == set(ids)
    assert peer.is_alive()


def test_a_reader_that_never_reads_is_not_read_either_and_costs_bounded_memory(daemon):
    """Small questions with large answers, as fast as the socket takes them."""
    with daemon.connect() as client, RawPeer(daemon.socket) as peer:
        ask_and_never_read(peer.enter(MANIFEST), client)


def ask_and_never_read(peer: RawPeer, client: Client) -> None:
    # Ids of one width make frames of one size.
    question = [frame(m.Stats(number, 50_000)) for number in range(70_000, 170_000)]
    before = client.stats().resident_bytes
    sent = flood(peer, b"".join(question), client.ping)
    assert client.stats().resident_bytes - before < 2 * WRITE_BUFFER_MAX_BYTES
    whole, part = divmod(sent, len(question[0]))
    for number in range(whole):
        assert peer.receive().request_id == 70_000 + number
    peer.send_raw(question[whole][part:])
    assert peer.receive().request_id == 70_000 + whole
    assert peer.is_alive()


def flood(peer: RawPeer, data: bytes, breathe) -> int:
    """Send *data* without reading until nothing more is taken; return how many bytes went."""
    peer.socket.setblocking(False)
    sent = refused = 0
    while refused < 50 and sent < len(data):
        try:
            sent += peer.socket.send(data[sent : sent + 100_000])
            refused = 0
        except BlockingIOError:
            refused += 1
            breathe()
    peer.socket.settimeout(DEADLINE_SECONDS)
    assert sent < len(data), "the daemon reads on although nobody reads its replies"
    return sent


def test_a_reader_that_never_reads_and_breaks_the_protocol_is_ended_all_the_same(
    watched, bystander
):
    client, _, _ = bystander
    with RawPeer(watched.socket) as peer:
        peer.enter(MANIFEST).reserve(loose_digest(8))
        fill_to_the_brim(peer, lambda: client.stats().counters["requests"])
        peer.send_raw(bytes(4))
        wait_until(lambda: client.stats().reservations == 0, what="the session ends")


def fill_to_the_brim(peer: RawPeer, count_requests) -> None:
    """Have answers wait for *peer* until its socket holds no more, and the daemon has to."""
    waiting = -1
    while waiting != (waiting := unread_bytes(peer)):
        # Every count is a request as well: the one that makes it two is the ping.
        handled = partial(lambda before: count_requests() > before + 1, count_requests())
        peer.send(m.Ping(peer.next_id(), 50, bytes(8000)))
        wait_until(handled)


def unread_bytes(peer: RawPeer) -> int:
    (count,) = array.array("i", fcntl.ioctl(peer.socket, termios.FIONREAD, bytes(4)))
    return count


def test_waiting_over_and_over_for_what_never_arrives_leaves_nothing_behind(peer, other, bystander):
    client, _, _ = bystander
    digest = loose_digest(9)
    slot = other.reserve(digest)
    peer.enter(MANIFEST)
    digests = [digest, *(loose_digest(number) for number in range(4000))]

    def wait_in_vain(times: int) -> int:
        for _ in range(times):
            assert peer.ask_for(1, m.Lookup, 0, digests, 0, True).arriving == 1
        return client.stats().resident_bytes

    before = wait_in_vain(50)
    assert wait_in_vain(150) - before < 8 * MIB
    other.abort(slot)


def test_an_id_that_waited_before_gets_the_answer_to_its_last_question(peer, other):
    """The chunk that the first question waited for is given up during the second one."""
    first, second = (other.reserve(loose_digest(number)) for number in (10, 11))
    peer.enter(MANIFEST)
    peer.send(m.Lookup(70, 1, 0, [loose_digest(10)], 0, wait=True))
    assert peer.receive() == m.Found(70, 0, 1, [])
    peer.send(m.Lookup(70, 50_000, 0, [loose_digest(11)], 0, wait=True))
    assert peer.is_alive()
    other.abort(first)
    assert peer.is_alive()
    other.abort(second)
    assert peer.receive() == m.Found(70, 0, 0, [])


def test_a_daemon_with_all_the_sessions_it_may_have_says_so(start_daemon):
    daemon = start_daemon({"server.sessions_max": 2})
    with RawPeer(daemon.socket) as first, RawPeer(daemon.socket) as second:
        assert first.hello().is_alive()
        assert second.hello().is_alive()
        with RawPeer(daemon.socket) as third:
            assert error_codes(third.receive_all()) == [(0, LimitError.code)]
        assert first.is_alive()

"""Bad input against a live daemon: a typed error, the end of that session, and nobody else hurt.

The table "Bad input" of the daemon, row by row, over bare sockets. Before and after every test
of a shared daemon a bystander's session answers, holds its lease and sees nothing left behind.
"""

from __future__ import annotations

import msgpack
import pytest

from kvstore.errors import (
    ChecksumError,
    DeadlineError,
    FrameError,
    LeaseError,
    LimitError,
    ManifestError,
    OrderError,
    RequestError,
    ReservationError,
    TooLargeError,
    VersionError,
)
from kvstore.limits import (
    ATTACHMENTS_PER_SESSION_MAX,
    FRAME_SIZE_MAX_BYTES,
    MIB,
)
from kvstore.protocol import messages as m
from kvstore.protocol.framing import frame
from tests.support.goldens import REQUESTS, golden_bytes
from tests.support.making import (
    loose_digest,
    make_manifest,
    make_payload,
    opaque_manifest,
)
from tests.support.peer import RawPeer, error_codes, framed

MANIFEST = make_manifest()


# --- frames -----------------------------------------------------------------------------

GARBAGE = {
    "a length of zero": bytes(4),
    "a length beyond the limit": (FRAME_SIZE_MAX_BYTES + 1).to_bytes(4, "little"),
    "the largest length there is": b"\xff" * 4,
    "another protocol": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "random bytes": bytes(range(255, 0, -7)) * 40,
    "an empty array": framed(b"\x90"),
    "no MessagePack": framed(b"\xc1"),
    "a truncated message": framed(golden_bytes("hello")[:-3]),
    "an unknown tag": framed(msgpack.packb([64, 1, 50])),
    "a reply": framed(golden_bytes("pong")),
    "a map": framed(msgpack.packb({"tag": 1})),
    "text that is not UTF-8": framed(b"\x95\x01\x01\x32\x01\xa2\xff\xfe"),
    "a list that claims 4 billion items": framed(b"\x95\x03\x01\x32\x00\xdd\xff\xff\xff\xff"),
    "a deep nest": framed(b"\x95\x01\x01\x32\x01" + b"\x91" * 100_000),
}


@pytest.mark.parametrize("what", GARBAGE)
@pytest.mark.parametrize("state", ["new", "attached"])
def test_garbage_gets_a_frame_error_and_ends_its_session(peer, what, state):
    if state == "attached":
        peer.enter(MANIFEST)
    peer.send_raw(GARBAGE[what])
    assert error_codes(peer.receive_all()) == [(0, FrameError.code)]


@pytest.mark.parametrize("cut", range(0, len(golden_bytes("hello")) + 4, 3))
def test_a_connection_cut_inside_a_frame_is_forgotten(watched, cut):
    with RawPeer(watched.socket) as peer:
        peer.send_raw(framed(golden_bytes("hello"))[:cut])


def test_what_was_asked_before_the_garbage_is_still_answered(peer):
    peer.enter(MANIFEST)
    peer.send_raw(frame(m.Ping(70, 50, b"first")) + bytes(4))
    replies = peer.receive_all()
    assert replies[0] == m.Pong(70, b"first")
    assert error_codes(replies) == [(0, FrameError.code)]


def test_requests_behind_the_garbage_are_not_carried_out(peer, other):
    other_before = other.ask(m.Stats).stats.counters["reserve_chunks_reserved"]
    peer.enter(MANIFEST)
    peer.send_raw(bytes(4) + frame(m.Reserve(70, 50, 0, [loose_digest(0)])))
    assert error_codes(peer.receive_all()) == [(0, FrameError.code)]
    assert other.ask(m.Stats).stats.counters["reserve_chunks_reserved"] == other_before


def test_frames_may_come_byte_by_byte(peer):
    for byte in frame(m.Hello(1, 50, 1)) + frame(m.Ping(2, 50, b"slow")):
        peer.send_raw(bytes([byte]))
    assert [peer.receive(), peer.receive()][1] == m.Pong(2, b"slow")


# --- order ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in REQUESTS if not name.startswith("hello")])
def test_any_request_before_hello_is_refused_and_ends_the_session(peer, name):
    peer.send(REQUESTS[name].message)
    request_id = REQUESTS[name].message.request_id
    found = error_codes(peer.receive_all())
    assert found == [(request_id, OrderError.code), (0, OrderError.code)]


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, golden in REQUESTS.items()
        if not isinstance(golden.message, (m.Hello, m.Attach, m.Ping, m.Stats))
    ],
)
def test_work_before_attach_is_refused_and_ends_the_session(peer, name):
    request = REQUESTS[name].message
    peer.hello().send(request)
    found = error_codes(peer.receive_all())
    assert found == [(request.request_id, OrderError.code), (0, OrderError.code)]


@pytest.mark.parametrize("state", ["greeted", "attached"])
def test_a_second_hello_ends_the_session(peer, state):
    peer.hello() if state == "greeted" else peer.enter(MANIFEST)
    peer.send(m.Hello(90, 50, m.PROTOCOL_VERSION))
    assert error_codes(peer.receive_all()) == [(90, OrderError.code), (0, OrderError.code)]


def test_another_version_is_refused_and_told_which_is_spoken(peer):
    peer.send(m.Hello(1, 50, 7))
    replies = peer.receive_all()
    assert error_codes(replies) == [(1, VersionError.code), (0, VersionError.code)]
    assert "protocol 7, this daemon 1" in replies[0].message


def test_an_id_of_zero_ends_the_session(peer):
    peer.hello().send(m.Ping(0, 50))
    assert error_codes(peer.receive_all()) == [(0, OrderError.code)] * 2


def test_an_id_that_is_still_in_flight_ends_the_session(peer, other):
    digest = loose_digest(1)
    slot = other.reserve(digest)
    peer.enter(MANIFEST).send(m.Lookup(70, 50_000, 0, [digest], 0, wait=True), m.Ping(70, 50))
    assert error_codes(peer.receive_all()) == [(70, OrderError.code), (0, OrderError.code)]
    other.abort(slot)


def test_no_hello_within_the_deadline_ends_the_session(start_daemon):
    hasty = start_daemon(limits={"HELLO_DEADLINE_SECONDS": 0.2})
    with RawPeer(hasty.socket) as silent:
        assert error_codes(silent.receive_all()) == [(0, DeadlineError.code)]
    with RawPeer(hasty.socket) as slow:
        slow.send_raw(frame(m.Hello(1, 50, 1))[:-1])
        assert error_codes(slow.receive_all()) == [(0, DeadlineError.code)]
    assert hasty.stats().pid == hasty.pid


# --- manifests --------------------------------------------------------------------------

MANIFESTS = {
    "no JSON": (b"layers", "does not parse"),
    "a list": (b"[]", "Expected `object`, got `array`"),
    "no layers": (MANIFEST.encode().replace(b'"layers":2', b'"layers":0'), "manifest.layers is 0"),
    "too many heads": (
        MANIFEST.encode().replace(b'"kv_heads":4', b'"kv_heads":99999'),
        "manifest.kv_heads is 99999, must lie in [1, 1024]",
    ),
    "an unknown field": (
        MANIFEST.encode().replace(b'"rope"', b'"rpoe"'),
        "unknown field `rpoe`",
    ),
    "a deep nest": (b'{"model":' * 1500, "does not parse"),
}


@pytest.mark.parametrize("what", MANIFESTS)
def test_a_manifest_that_makes_no_sense_is_refused_at_attach_with_its_field(peer, what):
    raw, said = MANIFESTS[what]
    refusal = peer.hello().ask(m.Attach, raw, 1)
    assert refusal.code == ManifestError.code
    assert said in refusal.message
    assert isinstance(peer.attach(MANIFEST), m.Attached)


def test_another_idea_of_the_chunk_size_is_refused_with_both_numbers(peer):
    refusal = peer.hello().ask(m.Attach, MANIFEST.encode(), 4096)
    assert refusal.code == ManifestError.code
    assert "4096" in refusal.message
    assert str(MANIFEST.chunk_bytes) in refusal.message


def test_a_chunk_larger_than_the_arena_is_refused_with_both_numbers(peer):
    refusal = peer.hello().attach(opaque_manifest(17 * MIB))
    assert refusal.code == TooLargeError.code
    assert f"{17 * MIB} bytes in an arena of {16 * MIB} bytes" in refusal.message


def test_a_session_enters_only_so_many_namespaces(peer):
    peer.hello()
    for number in range(ATTACHMENTS_PER_SESSION_MAX):
        assert isinstance(peer.attach(make_manifest(revision=str(number))), m.Attached)
    assert peer.attach(MANIFEST).code == LimitError.code
    assert peer.is_alive()


def test_manifests_with_the_longest_names_do_not_make_the_daemon_unaskable(peer, other):
    peer.hello()
    for number in range(ATTACHMENTS_PER_SESSION_MAX):
        manifest = make_manifest(model="m" * 10_000, revision=f"{'r' * 3000}{number}")
        assert isinstance(peer.attach(manifest), m.Attached)
    assert isinstance(other.ask(m.Stats), m.StatsReply)


# --- what belongs to others, or to nobody -----------------------------------------------


@pytest.mark.parametrize("kind", [m.Lookup, m.Load, m.Reserve, m.Pin, m.Unpin, m.Delete])
def test_a_namespace_that_was_not_entered_here_is_refused(peer, kind):
    refusal = peer.enter(MANIFEST).ask(kind, 1, [loose_digest(0)])
    assert refusal.code == RequestError.code
    assert "space 1 was not attached" in refusal.message
    assert peer.is_alive()


@pytest.mark.parametrize("kind", [m.Load, m.Reserve])
def test_heads_that_the_model_has_not_are_refused(peer, kind):
    fields = (0, [loose_digest(0)], *((b"",) if kind is m.Reserve else ()), 2, 9)
    refusal = peer.enter(MANIFEST).ask(kind, *fields)
    assert refusal.code == RequestError.code
    assert "heads [2, 9) of a model with 4" in refusal.message


def test_a_parent_that_is_no_digest_is_refused(peer):
    refusal = peer.enter(MANIFEST).ask(m.Reserve, 0, [loose_digest(0)], b"short")
    assert refusal.code == RequestError.code


def test_sizes_that_fit_nothing_are_refused_and_reserve_nothing(peer):
    peer.enter(MANIFEST)
    digests = [loose_digest(0), loose_digest(1)]
    refusal = peer.ask(m.Reserve, 0, digests, b"", 0, 0, [100])
    assert refusal.code == RequestError.code
    refusal = peer.ask(m.Reserve, 0, digests, b"", 0, 0, [100, 17 * MIB])
    assert refusal.code in {RequestError.code, TooLargeError.code}


def test_reservations_of_another_session_can_be_neither_committed_nor_aborted(peer, other):
    digest = loose_digest(2)
    slot = other.reserve(digest)
    peer.enter(MANIFEST)
    assert peer.commit(slot, 0) == [ReservationError.code]
    assert peer.ask(m.Abort, [slot.reservation]).code == ReservationError.code
    assert peer.ask(m.Lookup, 0, [digest]).hits == 0
    other.abort(slot)


def test_a_lease_of_another_session_cannot_be_released(peer, shared_daemon, bystander):
    _, space, digests = bystander
    peer.enter(space.manifest)
    for lease in range(1, 20):
        assert peer.ask(m.Release, [lease]).code == LeaseError.code
    assert peer.ask(m.Delete, 0, digests) == m.Done(peer._last_id, 0, 3)


def test_a_lease_is_released_once_and_all_or_none(peer, bystander):
    _, space, digests = bystander
    peer.enter(space.manifest)
    first, second = (peer.ask(m.Load, 0, digests).lease for _ in range(2))
    assert peer.ask(m.Release, [first, first + 1000]).code == LeaseError.code
    assert peer.ask(m.Release, [first, second]).count == 2
    assert peer.ask(m.Release, [first]).code == LeaseError.code


def test_a_wrong_checksum_publishes_nothing_and_frees_the_room(peer, other):
    digest = loose_digest(3)
    used = other.ask(m.Stats).stats.tiers[0].used_bytes
    slot = peer.enter(MANIFEST).reserve(digest)
    assert peer.commit(slot, 12_345) == [ChecksumError.code]
    assert other.ask(m.Lookup, 0, [digest]).hits == 0
    assert other.ask(m.Stats).stats.tiers[0].used_bytes == used
    assert peer.commit(slot, 12_345) == [ReservationError.code]


def test_committing_twice_fails_the_second_time_and_the_chunk_stays(peer):
    digest = loose_digest(4)
    slot = peer.enter(MANIFEST).reserve(digest)
    root = peer.write_chunk(slot.offset, make_payload(digest, MANIFEST.chunk_bytes))
    assert peer.commit(slot, root) == []
    assert peer.commit(slot, root) == [ReservationError.code]
    assert peer.ask(m.Lookup, 0, [digest]).hits == 1
    assert peer.ask(m.Delete, 0, [digest]).count == 1


def test_one_bad_commit_among_good_ones_fails_alone(peer):
    peer.enter(opaque_manifest(100))
    reserved = peer.ask(m.Reserve, 0, [loose_digest(5), loose_digest(6)])
    first, second = (slot.reservation for slot in reserved.slots)
    committed = peer.ask(m.Commit, [m.Filled(first, 1), m.Filled(second + 99, 1)])
    codes = {failure.reservation: failure.code for failure in committed.failures}
    assert codes == {first: ChecksumError.code, second + 99: ReservationError.code}
    assert peer.ask(m.Abort, [second]).count == 1

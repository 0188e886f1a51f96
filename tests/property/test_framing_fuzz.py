"""Whatever bytes come, in whatever pieces: typed errors, bounded memory, and nobody else hurt."""

from __future__ import annotations

import itertools
import socket
import tracemalloc

import msgpack
import pytest
from hypothesis import given, settings, strategies as st

from kvstore.errors import FrameError, KVStoreError, LimitError, ProtocolError
from kvstore.limits import FRAME_SIZE_MAX_BYTES, KIB, MIB
from kvstore.protocol import messages as m
from kvstore.protocol.framing import FrameReader, frame
from kvstore.protocol.machine import SessionMachine
from tests.support.goldens import REQUESTS, golden_bytes
from tests.support.making import make_digests, make_manifest, sources_of
from tests.support.peer import RawPeer, framed
from tests.support.waiting import wait_until

GOLDEN_FRAMES = [framed(golden_bytes(name)) for name in REQUESTS]

plain_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=5),
    max_leaves=12,
)
tags = st.integers(-1, 16) | st.integers(60, 75)
odd_messages = st.builds(
    lambda tag, items: framed(msgpack.packb([tag, *items])),
    tags,
    st.lists(plain_values, max_size=9),
)


@st.composite
def mutated(draw) -> bytes:
    """Return a golden frame with a few bytes changed, taken out or put in."""
    data = bytearray(draw(st.sampled_from(GOLDEN_FRAMES)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data) - 1))
        match draw(st.sampled_from(["change", "remove", "insert"])):
            case "change":
                data[at] = draw(st.integers(0, 255))
            case "remove" if len(data) > 1:
                del data[at]
            case _:
                data[at:at] = draw(st.binary(min_size=1, max_size=4))
    return bytes(data)


pieces = st.sampled_from(GOLDEN_FRAMES) | mutated() | odd_messages | st.binary(max_size=60)
streams = st.lists(pieces, max_size=8).map(b"".join)


def cut(data: bytes, at: list[int]) -> list[bytes]:
    """Return *data* in pieces."""
    edges = sorted({0, len(data), *(edge % (len(data) + 1) for edge in at)})
    return [data[a:b] for a, b in itertools.pairwise(edges)]


def judge(parts: list[bytes]) -> list[object]:
    """Do with a stream what a session does; return what was admitted and how it ended."""
    reader, machine, seen = FrameReader(), SessionMachine(), []
    try:
        for part in parts:
            for body in reader.feed(part):
                request = m.decode_request(body)
                try:
                    machine.receive(request)
                except LimitError:
                    continue
                seen.append(request)
                if isinstance(request, m.Attach):
                    machine.attached()
                machine.answered(request.request_id)
    except ProtocolError as error:
        seen.append((type(error), str(error)))
    return seen


@settings(max_examples=400)
@given(streams, st.lists(st.integers(0, 10_000), max_size=12))
def test_any_stream_ends_in_requests_or_one_protocol_error_wherever_it_is_cut(stream, edges):
    assert judge(cut(stream, edges)) == judge([stream])


@settings(max_examples=400)
@given(mutated() | odd_messages | st.binary(max_size=200))
def test_any_body_is_a_message_or_a_frame_error(data):
    for decode in (m.decode_request, m.decode_reply):
        try:
            message = decode(data[4:])
        except FrameError:
            continue
        # What was understood is understood again when it is written anew.
        assert decode(m.encode(message)) == message


CLAIMS = {
    "a list of 4 billion": b"\x95\x03\x01\x32\x00\xdd\xff\xff\xff\xff",
    "a message of 4 billion items": b"\xdd\xff\xff\xff\xff\x01",
    "text of 4 billion bytes": b"\x95\x01\x01\x32\x01\xdb\xff\xff\xff\xff",
    "bytes of 4 billion": b"\x94\x0d\x01\x32\xc6\xff\xff\xff\xff",
    "a map of 4 billion": b"\x94\x0d\x01\x32\xdf\xff\xff\xff\xff",
    "an extension of 4 billion": b"\x94\x0d\x01\x32\xc9\xff\xff\xff\xff\x01",
    "an unknown item of 4 billion": b"\x95\x0d\x01\x32\xc4\x00\xdd\xff\xff\xff\xff",
    "a nest without an end": b"\x93\x0c\x01" + b"\x91" * 500_000,
    "an unknown nest without an end": b"\x94\x0c\x01\x32" + b"\x91" * 500_000,
    "a map nest without an end": b"\x94\x0c\x01\x32" + b"\x81\xa0" * 250_000,
}


@pytest.mark.parametrize("what", CLAIMS)
def test_a_claim_is_not_believed_before_it_is_proved(what):
    body = CLAIMS[what]
    tracemalloc.start()
    try:
        with pytest.raises(FrameError):
            m.decode_request(body)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 * KIB


@pytest.mark.parametrize("step", [1000, 65_536])
def test_a_reader_holds_one_frame_and_what_was_last_fed_however_long_the_stream(step):
    body = framed(bytes(FRAME_SIZE_MAX_BYTES))
    reader = FrameReader()
    tracemalloc.start()
    try:
        for _ in range(3):
            for at in range(0, len(body), step):
                for _ in reader.feed(body[at : at + step]):
                    pass
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # The buffer, which grows by an eighth at a time, and the frame cut from it.
    assert peak < 4 * MIB


# --- against a live daemon ----------------------------------------------------------------


@pytest.fixture(scope="module")
def good(shared_daemon):
    """A session that works all the while: it holds a lease, and stores and loads."""
    with shared_daemon.connect("good") as client:
        space = client.attach(make_manifest(model="good"))
        digests = make_digests(4)
        space.store(digests, sources_of(space.manifest, digests))
        with space.load(digests[:2]):
            yield client, space, digests


@settings(max_examples=120)
@given(st.integers(0, 2), streams, st.lists(st.integers(0, 10_000), max_size=4))
def test_garbage_sessions_never_disturb_a_good_one(shared_daemon, good, progress, stream, edges):
    client, space, digests = good
    with RawPeer(shared_daemon.socket) as peer:
        if progress == 1:
            peer.hello()
        elif progress == 2:
            peer.enter(make_manifest())
        try:
            for part in cut(stream, edges):
                peer.send_raw(part)
            peer.socket.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # The daemon has closed already.
        for reply in peer.receive_all():
            assert isinstance(reply, m.Message)
    assert space.lookup(digests).hits == 4
    assert client.ping(b"fine") == b"fine"


def test_after_all_that_the_daemon_holds_what_the_good_session_holds(shared_daemon, good):
    client, _, _ = good
    wait_until(lambda: client.stats().sessions == 1)
    stats = client.stats()
    assert (stats.leases, stats.reservations) == (1, 0)
    assert "Traceback" not in shared_daemon.log()


def test_typed_errors_are_all_there_are():
    assert issubclass(FrameError, ProtocolError)
    assert issubclass(ProtocolError, KVStoreError)
    with pytest.raises(FrameError):
        frame(m.Pong(1, bytes(FRAME_SIZE_MAX_BYTES)))

"""A wire and a lane that are idle are used again, over TLS too; one that has ended is not."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from kvstore.hashing import block_digests
from kvstore.transfer.wire import Wire, WireError
from tests.support.redis_tls import make_certificates
from tests.support.waiting import DEADLINE_SECONDS, wait_until

# Whoever waits for so long has not come back when the test ends by itself.
STALL_SECONDS = 3600.0


class Ends(NamedTuple):
    """A wire, and the wire at the other end of it."""

    near: Wire
    far: Wire


@pytest.fixture(scope="module")
def contexts(tmp_path_factory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    made = make_certificates(tmp_path_factory.mktemp("tls"))
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(made.certificate, made.key)
    return ssl.create_default_context(cafile=made.authority), serving


@pytest.fixture(params=["plain", "tls"])
def ends(request, contexts) -> Iterator[Ends]:
    pair = list(socket.socketpair())
    for end in pair:
        end.settimeout(DEADLINE_SECONDS)
    if request.param == "tls":
        calling, serving = contexts

        def accept() -> None:
            pair[1] = serving.wrap_socket(pair[1], server_side=True)

        accepting = threading.Thread(target=accept)
        accepting.start()
        pair[0] = calling.wrap_socket(pair[0], server_hostname="127.0.0.1")
        accepting.join()
    made = Ends(*(Wire(end, STALL_SECONDS) for end in pair))
    for wire in made:
        wire.begin(DEADLINE_SECONDS)
    yield made
    for wire in made:
        wire.close()


def test_what_is_idle_is_quiet_at_once_and_still_works(ends):
    for word in (b"one", b"two"):
        assert ends.near.is_quiet()
        ends.near.send_frame(word)
        assert ends.far.receive_frame() == word
        assert ends.far.is_quiet()
        ends.far.send_frame(word[::-1])
        assert ends.near.receive_frame() == word[::-1]


def test_a_connection_with_an_unasked_frame_or_an_end_is_not_quiet(ends):
    ends.far.send_frames([b"asked", b"unasked"])
    assert ends.near.receive_frame() == b"asked"
    assert not ends.near.is_quiet()
    assert ends.near.receive_frame() == b"unasked"
    ends.far.abort()
    wait_until(lambda: not ends.near.is_quiet(), what="the end is seen")


def test_bytes_come_whole_with_their_digests_and_are_counted(ends):
    source = bytes(range(256)) * 1000
    sending = threading.Thread(target=ends.far.send_bytes, args=(b"head", memoryview(source)))
    sending.start()
    assert ends.near.receive_frame() == b"head"
    target = bytearray(len(source))
    blocks = ends.near.receive_bytes(memoryview(target))
    sending.join()
    assert target == source
    assert blocks.tolist() == block_digests(source).tolist()
    # Each frame has its length before it; nothing is left to come.
    assert ends.far.sent_bytes == 4 + len(b"head") + len(source)
    assert ends.near.is_quiet()


def test_a_wire_that_is_aborted_ends_its_thread(ends):
    ended = threading.Event()

    def wait() -> None:
        with pytest.raises(WireError):
            ends.near.receive_frame()
        ended.set()

    threading.Thread(target=wait).start()
    ends.near.abort()
    assert ended.wait(DEADLINE_SECONDS)
    assert not ends.near.is_quiet()

"""Bad input against a live daemon: a typed error, the end of that session, and nobody else hurt.

The table "Bad input" of the daemon, row by row, over bare sockets. Before and after every test
of a shared daemon a bystander's session answers, holds its lease and sees nothing left behind.
"""

from __future__ import annotations

import array
import fcntl
import json
import os
import re
import stat
import subprocess
import sys
import tempfile
import termios
from functools import partial
from pathlib import Path

import msgpack
import pytest

from kvstore.client.sync import Client
from kvstore.errors import (
    ChecksumError,
    DeadlineError,
    FrameError,
    LeaseError,
    LimitError,
    ManifestError,
    OrderError,
    RefusedError,
    RequestError,
    ReservationError,
    TooLargeError,
    VersionError,
)
from kvstore.limits import (
    ATTACHMENTS_PER_SESSION_MAX,
    FRAME_SIZE_MAX_BYTES,
    IN_FLIGHT_PER_SESSION_MAX,
    MIB,
    TIB,
    WRITE_BUFFER_MAX_BYTES,
)
from kvstore.protocol import messages as m
from kvstore.protocol.framing import FrameReader, frame
from kvstore.transfer.arena import memory_limit_bytes
from kvstore.types import ReserveOutcome
from tests.support.daemon import Daemon
from tests.support.goldens import REQUESTS, golden_bytes
from tests.support.making import (
    loose_digest,
    make_digests,
    make_manifest,
    make_payload,
    opaque_manifest,
    sources_of,
)
from tests.support.peer import RawPeer, error_codes, framed
from tests.support.waiting import DEADLINE_SECONDS, wait_until

MANIFEST = make_manifest()
USAGE = 2
FAILED = 1


@pytest.fixture(scope="module")
def bystander(shared_daemon):
    """A session that does nothing wrong: it has stored a prefix and holds a lease on it."""
    with shared_daemon.connect("bystander") as client:
        space = client.attach(make_manifest(model="bystander"))
        digests = make_digests(3)
        space.store(digests, sources_of(space.manifest, digests))
        with space.load(digests) as loaded:
            assert len(loaded) == 3
            yield client, space, digests


@pytest.fixture
def watched(shared_daemon, bystander):
    """The shared daemon; fails when the test has disturbed the bystander or left things behind."""
    client, space, digests = bystander
    before = client.stats()
    assert before.sessions == 1
    yield shared_daemon
    assert client.ping(b"still here") == b"still here"
    assert space.lookup(digests).hits == 3
    wait_until(lambda: client.stats().sessions == before.sessions, what="its session ends")
    after = client.stats()
    assert after.pid == before.pid
    assert (after.leases, after.reservations) == (before.leases, before.reservations) == (1, 0)


@pytest.fixture
def peer(watched):
    with RawPeer(watched.socket) as connected:
        yield connected


@pytest.fixture
def other(watched):
    with RawPeer(watched.socket) as connected:
        yield connected.enter(MANIFEST)


def reserve(peer: RawPeer, digest, **fields) -> m.Slot:
    reserved = peer.ask(m.Reserve, 0, [digest], *fields.values())
    assert isinstance(reserved, m.Reserved), reserved
    assert reserved.slots[0].outcome == ReserveOutcome.RESERVED
    return reserved.slots[0]


def commit(peer: RawPeer, slot: m.Slot, root: int) -> list[int]:
    """Commit one reservation and return the codes of what failed."""
    committed = peer.ask(m.Commit, [m.Filled(slot.reservation, root)])
    assert isinstance(committed, m.Committed)
    return [failure.code for failure in committed.failures]


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


@pytest.mark.parametrize("name", [name for name in REQUESTS if name != "hello"])
def test_any_request_before_hello_is_refused_and_ends_the_session(peer, name):
    peer.send(REQUESTS[name].message)
    request_id = REQUESTS[name].message.request_id
    found = error_codes(peer.receive_all())
    assert found == [(request_id, OrderError.code), (0, OrderError.code)]


@pytest.mark.parametrize(
    "name", [name for name in REQUESTS if name not in {"hello", "attach", "ping", "stats"}]
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
    slot = reserve(other, digest)
    peer.enter(MANIFEST).send(m.Lookup(70, 50_000, 0, [digest], 0, wait=True), m.Ping(70, 50))
    assert error_codes(peer.receive_all()) == [(70, OrderError.code), (0, OrderError.code)]
    assert other.ask(m.Abort, [slot.reservation]).count == 1


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
    slot = reserve(other, digest)
    peer.enter(MANIFEST)
    assert commit(peer, slot, 0) == [ReservationError.code]
    assert peer.ask(m.Abort, [slot.reservation]).code == ReservationError.code
    assert peer.ask(m.Lookup, 0, [digest]).hits == 0
    assert other.ask(m.Abort, [slot.reservation]) == m.Done(other._last_id, 1)


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
    slot = reserve(peer.enter(MANIFEST), digest)
    assert commit(peer, slot, 12_345) == [ChecksumError.code]
    assert other.ask(m.Lookup, 0, [digest]).hits == 0
    assert other.ask(m.Stats).stats.tiers[0].used_bytes == used
    assert commit(peer, slot, 12_345) == [ReservationError.code]


def test_committing_twice_fails_the_second_time_and_the_chunk_stays(peer):
    digest = loose_digest(4)
    slot = reserve(peer.enter(MANIFEST), digest)
    root = peer.write_chunk(slot.offset, make_payload(digest, MANIFEST.chunk_bytes))
    assert commit(peer, slot, root) == []
    assert commit(peer, slot, root) == [ReservationError.code]
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


# --- too much at once -------------------------------------------------------------------


def test_the_65th_request_in_flight_is_refused_alone_and_all_others_are_answered(peer, other):
    digest = loose_digest(7)
    slot = reserve(other, digest)
    peer.enter(MANIFEST)
    ids = range(100, 100 + IN_FLIGHT_PER_SESSION_MAX)
    peer.send(*(m.Lookup(n, 50_000, 0, [digest], 0, wait=True) for n in ids))
    peer.send(m.Ping(999, 50))
    refusal = peer.receive()
    assert (refusal.request_id, refusal.code) == (999, LimitError.code)
    assert other.ask(m.Abort, [slot.reservation]).count == 1
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
        reserve(peer.enter(MANIFEST), loose_digest(8))
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
    slot = reserve(other, digest)
    peer.enter(MANIFEST)
    digests = [digest, *(loose_digest(number) for number in range(4000))]

    def wait_in_vain(times: int) -> int:
        for _ in range(times):
            assert peer.ask_for(1, m.Lookup, 0, digests, 0, True).arriving == 1
        return client.stats().resident_bytes

    before = wait_in_vain(50)
    assert wait_in_vain(150) - before < 8 * MIB
    assert other.ask(m.Abort, [slot.reservation]).count == 1


def test_an_id_that_waited_before_gets_the_answer_to_its_last_question(peer, other):
    """The chunk that the first question waited for is given up during the second one."""
    first, second = (reserve(other, loose_digest(number)) for number in (10, 11))
    peer.enter(MANIFEST)
    peer.send(m.Lookup(70, 1, 0, [loose_digest(10)], 0, wait=True))
    assert peer.receive() == m.Found(70, 0, 1, [])
    peer.send(m.Lookup(70, 50_000, 0, [loose_digest(11)], 0, wait=True))
    assert peer.is_alive()
    assert other.ask(m.Abort, [first.reservation]).count == 1
    assert peer.is_alive()
    assert other.ask(m.Abort, [second.reservation]).count == 1
    assert peer.receive() == m.Found(70, 0, 0, [])


def test_a_daemon_with_all_the_sessions_it_may_have_says_so(start_daemon):
    daemon = start_daemon({"server.sessions_max": 2})
    with RawPeer(daemon.socket) as first, RawPeer(daemon.socket) as second:
        assert first.hello().is_alive()
        assert second.hello().is_alive()
        with RawPeer(daemon.socket) as third:
            assert error_codes(third.receive_all()) == [(0, LimitError.code)]
        assert first.is_alive()


# --- who may come, and where the daemon listens -------------------------------------------


def as_nobody(socket_path: Path) -> str:
    """Connect as another local user, read until the daemon closes, and return what came."""
    program = (
        "import os, socket, sys\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "peer = socket.socket(socket.AF_UNIX); peer.connect(sys.argv[1])\n"
        "print(b''.join(iter(lambda: peer.recv(65536), b'')).hex())\n"
    )
    command = [sys.executable, "-c", program, os.fspath(socket_path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_local_user_is_refused_by_credentials_and_logged_once(start_daemon):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "open.sock"
        daemon = start_daemon({"server.socket": path, "server.socket_mode": "0666"})
        Path(directory).chmod(0o755)
        for _ in range(3):
            body = bytes.fromhex(as_nobody(path))[4:]
            refusal = m.decode_reply(body)
            assert (refusal.request_id, refusal.code) == (0, RefusedError.code)
            assert "uid 65534" in refusal.message
        assert daemon.stats().counters["sessions_refused"] == 3
        events = [json.loads(line) for line in daemon.log().splitlines()]
        refused = [event for event in events if event["message"] == "user refused"]
        assert [event["uid"] for event in refused] == [65534]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_the_socket_itself_keeps_other_users_out_by_default(daemon):
    assert stat.S_IMODE(daemon.socket.stat().st_mode) == 0o660
    with pytest.raises(subprocess.CalledProcessError):
        as_nobody(daemon.socket)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_user_who_is_allowed_is_let_in(start_daemon):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "open.sock"
        settings = {"server.socket_mode": "0666", "server.allowed_uids": "[65534]"}
        daemon = start_daemon(
            {"server.socket": path, **settings}, limits={"HELLO_DEADLINE_SECONDS": 0.1}
        )
        Path(directory).chmod(0o755)
        (body,) = FrameReader().feed(bytes.fromhex(as_nobody(path)))
        assert m.decode_reply(body).code == DeadlineError.code
        assert daemon.stats().counters["sessions_refused"] == 0


def test_a_second_daemon_on_the_same_socket_is_refused_and_harms_nothing(daemon, tmp_path):
    second = Daemon(tmp_path, {"server.socket": daemon.socket})
    status, log = second.run_to_end()
    assert status == FAILED
    assert f"another daemon (pid {daemon.pid}) already serves {daemon.socket}" in log
    assert daemon.stats().pid == daemon.pid


def test_a_stale_socket_is_replaced(daemon, tmp_path):
    daemon.kill()
    assert daemon.socket.is_socket()
    with Daemon(tmp_path, {"server.socket": daemon.socket}) as successor:
        assert successor.stats().pid == successor.pid


def test_a_socket_path_taken_by_a_file_is_refused_and_the_file_stays(tmp_path):
    precious = tmp_path / "kvstore.sock"
    precious.write_text("precious")
    status, log = Daemon(tmp_path).run_to_end()
    assert status == USAGE
    assert f"{precious} exists and is not a socket" in log
    assert precious.read_text() == "precious"


def test_a_socket_path_that_is_too_long_is_refused(tmp_path):
    status, log = Daemon(tmp_path, {"server.socket": tmp_path / ("x" * 200)}).run_to_end()
    assert status == USAGE
    assert "at most 107 bytes" in log


def test_a_socket_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "kvstore.sock"
    status, log = Daemon(tmp_path, {"server.socket": path}).run_to_end()
    assert status == USAGE
    assert f"server.socket {path} cannot be used" in log


def test_the_socket_goes_with_the_daemon(daemon):
    assert daemon.stop() == 0
    assert not daemon.socket.exists()


def test_an_arena_larger_than_memory_is_refused_with_both_numbers(tmp_path):
    status, log = Daemon(tmp_path, {"tiers.host.capacity": "15TiB"}).run_to_end()
    assert status == USAGE
    assert str(15 * TIB) in log
    assert str(memory_limit_bytes()) in log
    assert not (tmp_path / "kvstore.sock").exists()


def test_an_arena_larger_than_its_file_system_is_refused_with_both_numbers(tmp_path):
    arena = "/dev/shm/kvstore-test-arena"
    settings = {"tiers.host.capacity": "15TiB", "tiers.host.arena": arena}
    status, log = Daemon(tmp_path, settings).run_to_end()
    assert status == USAGE
    assert re.search(rf"{15 * TIB} bytes, /dev/shm has room for \d+", log)
    assert not Path(arena).exists()


def test_an_unknown_setting_is_refused_with_the_nearest_name(tmp_path):
    status, log = Daemon(tmp_path, {"tiers.host.capasity": "1GiB"}).run_to_end()
    assert status == USAGE
    assert "tiers.host.capacity" in log

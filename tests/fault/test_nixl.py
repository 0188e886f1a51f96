"""Hand-offs whose bytes go by NIXL, with the real library over TCP; and what happens without it."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import socket
import threading
from contextlib import closing, contextmanager
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvstore.daemon.peer_grants import Grants
from kvstore.errors import LimitError
from kvstore.limits import NIXL_METADATA_MAX_BYTES
from kvstore.protocol import peering as p
from kvstore.transfer.arena import Arena
from kvstore.transfer.nixl import LocalAgent, Nixl
from kvstore.types import HandoffState, SessionId
from tests.support.handoffs import store_one, take_all, wait
from tests.support.hosts import TOKEN, called, caller, free_port
from tests.support.liars import MANIFEST, SIZE, Liar, frame, offer, read, right
from tests.support.making import make_digests
from tests.support.waiting import DEADLINE_SECONDS, wait_until

with_library = pytest.mark.skipif(
    not any(importlib.util.find_spec(name) for name in ("nixl", "nixl_cu13", "nixl_cu12")),
    reason="NIXL is not installed",
)

BY_NIXL = {"peer.transport": "nixl", "peer.insecure": "true"}
LIMITS = {
    "PEER_TIMEOUT_SECONDS": 10.0,
    "PULL_TROUBLE_SECONDS": 1.0,
    "NIXL_GRACE_SECONDS": 0.1,
    "NIXL_PAUSE_SECONDS": 0.0,
    "NIXL_RESTART_SECONDS": 0.0,
}
# Who grants does not meet anybody, and is to be seen giving up.
GRANTING_LIMITS = LIMITS | {"PEER_TIMEOUT_SECONDS": 2.0, "NIXL_MEET_SECONDS": 0.1}
COUNT = 6
PROMPTS = count(7000)


@contextmanager
def only_tcp():
    """Let UCX use what both sides must work for, and what every machine has."""
    before = os.environ.get("UCX_TLS")
    os.environ["UCX_TLS"] = "tcp"
    try:
        yield
    finally:
        if before is None:
            del os.environ["UCX_TLS"]
        else:
            os.environ["UCX_TLS"] = before


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    directory, port = tmp_path_factory.mktemp("nixl"), free_port()
    with (
        only_tcp(),
        called(directory / "prefill", port, BY_NIXL, GRANTING_LIMITS) as prefill,
        caller(directory / "decode", port, BY_NIXL, LIMITS) as decode,
    ):
        for daemon in (prefill, decode):
            wait_until(lambda one=daemon: has_agent(one), what="its agent is there")
        prefill.port = port
        yield prefill, decode


def has_agent(daemon) -> bool:
    return daemon.stats().peer_transport.startswith("nixl (UCX")


def counter(daemon, name: str) -> int:
    return daemon.stats().counters[name]


def left_behind(daemon) -> list[int]:
    stats = daemon.stats()
    return [stats.handoffs, stats.handoff_chunks, stats.leases, stats.reservations]


def agent_of(daemon) -> int:
    """Return the process that has the agent of *daemon*."""
    children = Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text().split()
    (agent,) = [int(pid) for pid in children if b"nixl_process" in command_of(int(pid))]
    return agent


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


class Taking(threading.Thread):
    """Takes all of a hand-off in the background."""

    def __init__(self, space, name: str) -> None:
        super().__init__()
        self._space, self._name_taken = space, name
        self._taken: list | None = None
        self.start()

    def run(self) -> None:
        self._taken = take_all(self._space, self._name_taken, "prefill")

    def result(self) -> list:
        self.join(DEADLINE_SECONDS)
        self._space.handoffs.leave(self._name_taken, peer="prefill")
        assert self._taken is not None, "it has an end in time"
        return self._taken


def publish(space, name: str, digests) -> None:
    space.handoffs.open(name)
    space.handoffs.publish(name, 0, digests)
    for number in range(len(digests)):
        store_one(space, digests, number)
    space.handoffs.close(name)


@with_library
def test_bytes_go_by_nixl_and_are_those_that_were_stored(hosts):
    prefill, decode = hosts
    digests = make_digests(COUNT, next(PROMPTS))
    names = ("peer_nixl_bytes", "peer_received_bytes", "peer_nixl_fallbacks")
    before = [counter(decode, name) for name in names]
    sent = counter(prefill, "peer_sent_bytes")
    with prefill.connect() as one, decode.connect() as other:
        publish(one.attach(MANIFEST), "by NIXL", digests)
        assert Taking(other.attach(MANIFEST), "by NIXL").result() == digests
    came = [counter(decode, name) - was for name, was in zip(names, before, strict=True)]
    assert came == [COUNT * SIZE, COUNT * SIZE, 0]
    wait_until(lambda: counter(prefill, "peer_sent_bytes") - sent == COUNT * SIZE, what="it counts")
    for daemon in hosts:
        wait_until(lambda one=daemon: left_behind(one) == [0] * 4, what="all has ended")
    wait_until(lambda: "tcp/" in decode.stats().peer_transport, what="the transport is shown")


@with_library
def test_the_daemon_itself_has_nothing_of_the_library(hosts):
    for daemon in hosts:
        maps = Path(f"/proc/{daemon.pid}/maps").read_text()
        assert not any(word in maps for word in ("nixl", "libucp", "ibverbs"))
        assert "nixl" in Path(f"/proc/{agent_of(daemon)}/maps").read_text()


@with_library
def test_an_agent_that_dies_in_the_middle_of_a_read_costs_a_fallback_and_no_byte(hosts):
    prefill, decode = hosts
    digests = make_digests(COUNT, next(PROMPTS))
    fallbacks = counter(decode, "peer_nixl_fallbacks")
    with prefill.connect() as one, decode.connect() as other:
        agent = agent_of(prefill)
        os.kill(agent, signal.SIGSTOP)
        publish(one.attach(MANIFEST), "agent dies", digests)
        taking = Taking(other.attach(MANIFEST), "agent dies")
        wait_until(lambda: prefill.stats().leases, what="shards are granted")
        os.kill(agent, signal.SIGKILL)
        assert taking.result() == digests
        assert counter(decode, "peer_nixl_fallbacks") > fallbacks
        assert "tcp in place of NIXL" in decode.log()
        for daemon in hosts:
            wait_until(lambda one=daemon: has_agent(one), what="there is another agent")
            wait_until(lambda one=daemon: left_behind(one) == [0] * 4, what="all has ended")
        # The next ones go by NIXL again.
        by_nixl = counter(decode, "peer_nixl_bytes")
        again = make_digests(COUNT, next(PROMPTS))
        publish(one.attach(MANIFEST), "agents again", again)
        assert Taking(other.attach(MANIFEST), "agents again").result() == again
        assert counter(decode, "peer_nixl_bytes") - by_nixl == COUNT * SIZE


@with_library
def test_a_producers_host_that_dies_in_the_middle_of_a_read_ends_the_handoff(hosts):
    prefill, decode = hosts
    digests = make_digests(COUNT, next(PROMPTS))
    with decode.connect() as other:
        consumer = other.attach(MANIFEST)
        with prefill.connect() as one:
            agent = agent_of(prefill)
            os.kill(agent, signal.SIGSTOP)
            publish(one.attach(MANIFEST), "host dies", digests)
            taking = Taking(consumer, "host dies")
            wait_until(lambda: prefill.stats().leases, what="shards are granted")
            prefill.kill()
            os.kill(agent, signal.SIGKILL)
        assert taking.result() == []
        assert consumer.lookup(digests).hits == 0
        wait_until(lambda: left_behind(decode) == [0] * 4, what="all has ended")
    prefill.launch()
    prefill.wait_ready()
    for daemon in hosts:
        wait_until(lambda one=daemon: has_agent(one), what="there is another agent")


def call(port: int) -> socket.socket:
    """Return a connection of a caller that knows the token."""
    connection = socket.create_connection(("127.0.0.1", port), DEADLINE_SECONDS)
    challenge, nonce = read(connection), bytes(32)
    proof = p.caller_proof(TOKEN.strip().encode(), challenge.nonce, nonce, "caller")
    connection.sendall(frame(p.PeerHello(p.PEER_VERSION, "caller", nonce, proof)))
    assert isinstance(read(connection), p.PeerWelcome)
    return connection


@with_library
def test_what_is_granted_is_held_until_given_back_or_until_link_or_time_end(hosts):
    prefill, _ = hosts
    here, elsewhere = make_digests(2, next(PROMPTS))
    with prefill.connect() as client:
        space = client.attach(MANIFEST)
        store_one(space, [here], 0)
        (shard,) = offer(here).shards
        wants = [p.Want(MANIFEST.namespace_id(), digest, shard) for digest in (here, elsewhere)]

        def granted(connection, agent: str = "") -> p.Granted:
            connection.sendall(frame(p.Grant(agent, wants)))
            answer = read(connection)
            assert isinstance(answer, p.Granted)
            assert [run.size_bytes for run in answer.runs] == [SIZE, 0]
            assert client.stats().leases == 1
            return answer

        with call(prefill.port) as connection:
            first = granted(connection)
            assert 0 < len(first.metadata) < NIXL_METADATA_MAX_BYTES
            connection.sendall(frame(p.Returned(is_read=True)))
            wait_until(lambda: not client.stats().leases, what="it is given back")
            assert granted(connection, first.agent).metadata == b""
        wait_until(lambda: not client.stats().leases, what="it ends with the link")
        with call(prefill.port) as connection:
            granted(connection)
            wait_until(lambda: not client.stats().leases, what="its time ends")
            assert connection.recv(1) == b""


async def test_a_grant_that_cannot_be_had_whole_keeps_nothing():
    arena = memoryview(bytearray(SIZE))
    kept = []

    async def begin(want: p.Want, _: SessionId) -> SimpleNamespace:
        if want.digest == digests[1]:
            raise LimitError("too many leases")
        await asyncio.sleep(0)
        kept.append(SimpleNamespace(view=arena))
        return kept[-1]

    server = SimpleNamespace(
        nixl=SimpleNamespace(agent=LocalAgent("prefill-1", b"", 0)),
        store=SimpleNamespace(host=SimpleNamespace(arena=SimpleNamespace(view=arena))),
    )
    grants = Grants(server, begin, lambda session, one, sent: kept.remove(one))
    digests = make_digests(3)
    wants = [p.Want(bytes(16), digest, offer(digest).shards[0]) for digest in digests]
    with pytest.raises(LimitError, match="too many leases"):
        await grants._hold(p.Grant("", wants), SessionId(1))
    # Nor does any of them come later.
    await asyncio.sleep(0)
    assert kept == []


async def test_granted_chunks_that_cannot_be_let_go_are_in_the_log(caplog):
    arena = memoryview(bytearray(SIZE))

    async def begin(_: p.Want, session: SessionId) -> SimpleNamespace:
        return SimpleNamespace(view=arena)

    async def watch() -> None:
        pass

    def end(*_: object) -> None:
        raise LookupError("no such lease")

    server = SimpleNamespace(
        loop=asyncio.get_running_loop(),
        nixl=SimpleNamespace(agent=LocalAgent("prefill-1", b"", 0), watch=watch, unwatch=watch),
        store=SimpleNamespace(host=SimpleNamespace(arena=SimpleNamespace(view=arena))),
    )
    wire = SimpleNamespace(
        begin=lambda *_, **__: None,
        send_frame=lambda _: None,
        receive_frame=lambda: p.encode(p.Returned(is_read=True)),
    )
    (digest,) = make_digests(1)
    wants = [p.Want(bytes(16), digest, offer(digest).shards[0])]
    serve = Grants(server, begin, end).serve
    await asyncio.to_thread(serve, wire, p.Grant("", wants), SessionId(1))
    await asyncio.to_thread(
        wait_until, lambda: "no such lease" in caplog.text, what="what went wrong is logged"
    )


# --- peers that lie -----------------------------------------------------------------------


def granting(**changes):
    """Return what answers every grant alike, and wants rightly."""
    fields = {
        "agent": "liar",
        "metadata": b"nothing that a library would write",
        "address": 4096,
        "runs": [p.GrantedRun(0, SIZE)],
    } | changes

    def answer(request) -> bytes:
        if isinstance(request, p.Want):
            return right(request)
        return frame(p.Granted(**fields))

    return answer


REFUSED = {
    "garbage": granting(),
    "nothing known": granting(metadata=b""),
    "no grant": lambda request: (
        right(request) if isinstance(request, p.Want) else frame(p.NotGranted("not today"))
    ),
}
BREAKING = {
    "too much metadata": granting(metadata=bytes(NIXL_METADATA_MAX_BYTES + 1)),
    "a longer run": granting(runs=[p.GrantedRun(0, SIZE + 1)]),
    "two runs for one": granting(runs=[p.GrantedRun(0, SIZE)] * 2),
    "another answer": lambda _: frame(p.Left()),
}


@with_library
def test_a_peer_that_lies_about_its_agent_is_found_out(tmp_path):
    liar = Liar([], granting())
    with only_tcp(), caller(tmp_path, liar.port, BY_NIXL, LIMITS) as daemon:
        wait_until(lambda: has_agent(daemon), what="its agent is there")
        with daemon.connect() as client:
            space = client.attach(MANIFEST)
            for name, liar.answer in REFUSED.items():
                (digest,) = make_digests(1, next(PROMPTS))
                liar.offers = [offer(digest)]
                before = counter(daemon, "peer_nixl_fallbacks")
                assert take_all(space, name, "prefill") == [digest], name
                assert counter(daemon, "peer_nixl_fallbacks") > before, name
                space.handoffs.leave(name, peer="prefill")
            # The reading side says when it reads no more, though it has not begun.
            wait_until(lambda: liar.returned == [False, False], what="grants are given back")
            for name, liar.answer in BREAKING.items():
                (digest,) = make_digests(1, next(PROMPTS))
                liar.offers = [offer(digest)]
                before = counter(daemon, "peer_faults")
                ready = wait(space, name, 0, "prefill")
                while not ready.is_last:
                    ready = wait(space, name, 0, "prefill")
                assert (ready.digests, ready.state) == ([], HandoffState.BROKEN), name
                assert counter(daemon, "peer_faults") > before, name
                space.handoffs.leave(name, peer="prefill")
            assert counter(daemon, "peer_nixl_bytes") == 0
            wait_until(lambda: left_behind(daemon) == [0] * 4, what="all has ended")
        agent = agent_of(daemon)
        assert daemon.stop() == 0
        assert b"nixl_process" not in command_of(agent), "it has ended with its daemon"
    liar.close()


async def test_a_process_that_answers_nonsense_is_ended_and_nothing_else():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    with ours, theirs, closing(Arena.create(1 << 20)) as arena:
        theirs.send(b"\xc1 is nothing in MessagePack")
        end = await Nixl(arena, "decode")._listen(ours, "decode-1")
    assert "it answers what is no answer" in end.reason
    assert not end.is_final


# --- without the library ------------------------------------------------------------------


def test_without_the_library_bytes_come_by_tcp_and_that_is_counted_and_said_once(
    tmp_path, monkeypatch
):
    for name in ("nixl", "nixl_cu13", "nixl_cu12"):
        (tmp_path / "absent" / name).mkdir(parents=True)
        missing = f"raise ModuleNotFoundError('not here', name={name!r})\n"
        (tmp_path / "absent" / name / "__init__.py").write_text(missing)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "absent"))
    digests = make_digests(COUNT, next(PROMPTS))
    liar = Liar([offer(digest) for digest in digests], right)
    with caller(tmp_path, liar.port, BY_NIXL) as daemon, daemon.connect() as client:
        wait_until(
            lambda: daemon.stats().peer_transport == "tcp (NIXL is not installed)",
            what="it knows that there is no library",
        )
        space = client.attach(MANIFEST)
        for name in ("first", "second"):
            assert take_all(space, name, "prefill") == digests
            space.handoffs.leave(name, peer="prefill")
            wait_until(lambda: not daemon.stats().handoffs, what="it is over")
            assert space.delete(digests).count == COUNT
        counters = daemon.stats().counters
        assert counters["peer_received_bytes"] == 2 * COUNT * SIZE
        assert counters["peer_nixl_bytes"] == 0
        assert counters["peer_nixl_fallbacks"] >= 2
        assert daemon.log().count("tcp in place of NIXL") == 1
    liar.close()

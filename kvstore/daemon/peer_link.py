"""The way to one other daemon: connections, the threads that use them, and what they ask.

The event loop decides; threads only move bytes. A call that is cancelled ends when its thread
has let go of the memory that it was given.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import ssl
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from kvstore.errors import FrameError, ProtocolError, TierError, VersionError, from_code
from kvstore.hashing import Digests64, root_of
from kvstore.limits import (
    PEER_ASKS_MAX,
    PEER_FOLLOWS_MAX,
    PEER_LANES,
    PEER_NONCE_SIZE_BYTES,
    PEER_SPEED_MIN_BYTES_PER_SECOND,
    PEER_TIMEOUT_SECONDS,
)
from kvstore.metrics import Counters
from kvstore.protocol import peering as p
from kvstore.tiers.peer_reads import Came, Wanted
from kvstore.transfer.settling import settle
from kvstore.transfer.wire import Wire, WireError, WireProtocolError, dial

if TYPE_CHECKING:
    from kvstore.daemon.peer_nixl import NixlReads

log = logging.getLogger(__name__)

Result = TypeVar("Result")
Kind = TypeVar("Kind", bound=p.PeerMessage)
Arrived = TypeVar("Arrived")


class PeerAddress(NamedTuple):
    """Where another daemon is called, and what it and we know."""

    name: str
    host: str
    port: int
    token: bytes
    tls: ssl.SSLContext | None = None


class Greeting(NamedTuple):
    """What another daemon calls itself, and the version that is spoken with it."""

    name: str
    version: int


class _Errand:
    """One use of a connection by a thread."""

    def __init__(self, wire: Wire | None) -> None:
        self.wire = wire
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True
        if self.wire is not None:
            self.wire.abort()


class PeerLink:
    """Asks one other daemon. What fails breaks one connection.

    It is a `TierError` where another try may go well, and a `ProtocolError` where the peer has
    sent what it may not.
    """

    def __init__(self, address: PeerAddress, own_name: str, counters: Counters) -> None:
        self.name: Final = address.name
        self._address = address
        self._own_name = own_name
        self._counters = counters
        self._lanes = asyncio.Semaphore(PEER_LANES)
        self._follows = asyncio.Semaphore(PEER_FOLLOWS_MAX)
        self._asks = asyncio.Semaphore(PEER_ASKS_MAX)
        self._threads = ThreadPoolExecutor(
            PEER_LANES + PEER_FOLLOWS_MAX + PEER_ASKS_MAX, f"peer-{address.name}"
        )
        self._version = p.PEER_VERSION_MIN
        self.nixl: NixlReads | None = None
        """How its bytes are read past the connection, where that is wanted."""
        self._idle: list[Wire] = []
        self._busy: set[_Errand] = set()
        self._is_closed = False

    async def follow(self, request: p.Follow) -> p.Following:
        """Return how a hand-off stands there, as soon as there is news."""
        seconds = request.wait_ms / 1000 + PEER_TIMEOUT_SECONDS
        async with self._follows:
            return await self._run(lambda wire: _ask(wire, request, p.Following, seconds))

    async def leave(self, request: p.PeerLeave) -> None:
        """Say that a consumer here needs no more."""
        async with self._follows:
            await self._run(lambda wire: _ask(wire, request, p.Left, PEER_TIMEOUT_SECONDS))

    async def have(self, request: p.Have) -> p.Holding:
        """Return what its host tier holds, without waiting behind hand-offs."""

        def work(wire: Wire) -> p.Holding:
            self._require(p.PEER_VERSION_HAVE)
            return _ask(wire, request, p.Holding, PEER_TIMEOUT_SECONDS)

        async with self._asks:
            return await self._run(work)

    async def take(self, wanted: Sequence[Wanted], arrived: Callable[[int, Came], None]) -> None:
        """Fill each target with the shard of its host tier that is wanted there, as in `fetch`.

        *arrived* is told why nothing came where nothing did.
        """

        def begin(wire: Wire) -> Iterator[Came]:
            self._require(p.PEER_VERSION_HAVE)
            return _fetch(wire, wanted)

        await self._carry(wanted, begin, arrived)

    async def fetch(
        self, wanted: Sequence[Wanted], arrived: Callable[[int, Digests64 | None], None]
    ) -> None:
        """Fill each target with the shard that is wanted there.

        *arrived* is told of each as it comes, in order: its number and the digests of its
        blocks, or None where it has gone. What came is what was announced: its length and its
        root have been compared.
        """
        loop = asyncio.get_running_loop()

        def begin(wire: Wire) -> Iterator[Came | None]:
            arriving = None
            if self.nixl is not None and self._version >= p.PEER_VERSION_NIXL:
                arriving = self.nixl.fetch(wire, wanted, loop)
            return arriving or _fetch(wire, wanted)

        def told(number: int, one: Came | None) -> None:
            arrived(number, None if isinstance(one, p.Gone | p.Busy) else one)

        await self._carry(wanted, begin, told)

    def close(self) -> None:
        """End everything that is under way. Idempotent."""
        self._is_closed = True
        for errand in self._busy:
            errand.cancel()
        self._forget()
        self._threads.shutdown(wait=False)

    async def _carry(
        self,
        wanted: Sequence[Wanted],
        begin: Callable[[Wire], Iterator[Arrived]],
        arrived: Callable[[int, Arrived], None],
    ) -> None:
        """Tell *arrived* of all that comes over one connection, behind what *begin* asks for."""
        loop = asyncio.get_running_loop()
        came: deque[tuple[int, Arrived]] = deque()

        def tell() -> None:
            while came:
                number, one = came.popleft()
                if one is not None and not isinstance(one, p.Gone | p.Busy):
                    self._counters.peer_received_bytes += len(wanted[number][1])
                arrived(number, one)

        def work(wire: Wire) -> None:
            for one in enumerate(begin(wire)):
                came.append(one)
                # What is told while the event loop is busy is told at once.
                if len(came) == 1:
                    loop.call_soon_threadsafe(tell)

        async with self._lanes:
            await self._run(work)

    async def _run(self, work: Callable[[Wire], Result]) -> Result:
        """Return what *work* does with a connection, in a thread."""
        if self._is_closed:
            raise TierError(f"peer {self.name} is not asked any more")
        errand = _Errand(self._take_idle())
        self._busy.add(errand)
        loop = asyncio.get_running_loop()
        working = loop.run_in_executor(self._threads, self._work, errand, work)
        try:
            return await asyncio.shield(working)
        except asyncio.CancelledError:
            errand.cancel()
            await settle(working)
            raise
        except WireProtocolError as error:
            self._counters.peer_faults += 1
            log.error("peer breaks the protocol", extra=self._fields(error))
            raise ProtocolError(f"peer {self.name}: {error}") from error
        except WireError as error:
            # What is idle is no better: the peer has gone, or does not answer.
            self._forget()
            raise TierError(f"peer {self.name}: {error}") from error
        finally:
            self._busy.discard(errand)
            if errand.wire is not None:
                self._put_back(errand.wire)

    def _work(self, errand: _Errand, work: Callable[[Wire], Result]) -> Result:
        if errand.wire is None:
            errand.wire, self._version = self._connect()
        if errand.is_cancelled:
            raise WireError("not wanted any more")
        return work(errand.wire)

    def _require(self, version: int) -> None:
        """Raise `WireError` unless the peer speaks *version*: it may be brought up to date."""
        if self._version < version:
            raise WireError(f"it speaks peer protocol {self._version}, {version} is needed")

    def _connect(self) -> tuple[Wire, int]:
        """Return a connection, and the version that is spoken on it."""
        address = self._address
        connection = dial(
            address.host, address.port, address.tls, timeout_seconds=PEER_TIMEOUT_SECONDS
        )
        wire = Wire(connection, PEER_TIMEOUT_SECONDS)
        try:
            return wire, _greet(wire, address, self._own_name).version
        except BaseException:
            wire.close()
            raise

    def _take_idle(self) -> Wire | None:
        while self._idle:
            wire = self._idle.pop()
            if wire.is_quiet():
                return wire
            wire.close()
        return None

    def _put_back(self, wire: Wire) -> None:
        if wire.is_broken or self._is_closed:
            wire.close()
        else:
            self._idle.append(wire)

    def _forget(self) -> None:
        idle, self._idle = self._idle, []
        for wire in idle:
            wire.close()

    def _fields(self, error: Exception) -> dict[str, object]:
        return {"peer": self.name, "reason": str(error)}


def greet_once(address: PeerAddress, own_name: str) -> Greeting:
    """Call, exchange greetings and hang up; raises `WireError` or what the peer refuses with."""
    connection = dial(address.host, address.port, address.tls, timeout_seconds=PEER_TIMEOUT_SECONDS)
    wire = Wire(connection, PEER_TIMEOUT_SECONDS)
    with contextlib.closing(wire):
        return _greet(wire, address, own_name)


def _greet(wire: Wire, address: PeerAddress, own_name: str) -> Greeting:
    """Show that we know the token, and see that they do."""
    wire.begin(PEER_TIMEOUT_SECONDS)
    challenge = _receive(wire, p.PeerNonce)
    try:
        version = p.agree(challenge.version, max(challenge.version, challenge.newest))
    except VersionError as error:
        raise WireProtocolError(str(error)) from error
    nonce = secrets.token_bytes(PEER_NONCE_SIZE_BYTES)
    proof = p.caller_proof(address.token, challenge.nonce, nonce, own_name)
    wire.send_frame(p.encode(p.PeerHello(version, own_name, nonce, proof)))
    welcome = _receive(wire, p.PeerWelcome)
    expected = p.called_proof(address.token, challenge.nonce, nonce, welcome.name)
    if not p.is_proof(expected, welcome.proof):
        raise WireProtocolError("it does not know the token (peers.*.token_file)")
    return Greeting(welcome.name, version)


def _ask(wire: Wire, request: p.PeerMessage, kind: type[Kind], seconds: float) -> Kind:
    wire.begin(seconds, patient=True)
    wire.send_frame(p.encode(request))
    return _receive(wire, kind)


def receive(wire: Wire) -> p.AnyPeerMessage:
    """Return the next message.

    What is none breaks the connection; so does a fault, which is raised as what the peer says.
    """
    try:
        message = p.decode(wire.receive_frame())
    except FrameError as error:
        wire.is_broken = True
        raise WireProtocolError(str(error)) from error
    if isinstance(message, p.PeerFault):
        wire.is_broken = True
        raise from_code(message.code, message.message)
    return message


def _receive(wire: Wire, kind: type[Kind]) -> Kind:
    """Return the next message, which is of *kind*; anything else breaks the connection."""
    message = receive(wire)
    if isinstance(message, kind):
        return message
    wire.is_broken = True
    raise WireProtocolError(f"{type(message).__name__} in place of {kind.__name__}")


def _fetch(wire: Wire, wanted: Sequence[Wanted]) -> Iterator[Came]:
    """Ask for all at once, so that the other side never waits for us; yield each as it comes."""
    size_bytes = sum(len(target) for _, target in wanted)
    wire.begin(PEER_TIMEOUT_SECONDS + size_bytes / PEER_SPEED_MIN_BYTES_PER_SECOND)
    wire.send_frames([p.encode(want) for want, _ in wanted])
    for want, target in wanted:
        yield _fetch_one(wire, want.shard, target)


def _fetch_one(wire: Wire, shard: p.OfferedShard, target: memoryview) -> Came:
    """Fill *target* with the next answer; return its digests, compared with the root announced."""
    assert len(target) == shard.size_bytes, "room for exactly what was offered"
    answer = receive(wire)
    if isinstance(answer, p.Gone | p.Busy):
        return answer
    if not isinstance(answer, p.Sending) or answer.size_bytes != shard.size_bytes:
        wire.is_broken = True
        raise WireProtocolError(f"{answer!r:.80} in place of {shard.size_bytes} bytes")
    blocks = wire.receive_bytes(target)
    if root_of(blocks) != shard.root:
        wire.is_broken = True
        raise WireProtocolError("bytes came that are not those announced")
    return blocks

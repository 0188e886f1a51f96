"""Hand-offs from a prefill engine to decode engines, as both sides use them.

The producer opens one, publishes its chunks in order and closes it. A consumer waits for what
is ready, loads it as it loads any chunk, and leaves. See docs/disaggregation.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple, Protocol, TypeVar

from kvstore.client.chunks import check_digests
from kvstore.client.connection import deadline_ms
from kvstore.protocol import messages as m
from kvstore.types import Digest, HandoffState

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvstore.client.aio import AsyncConnection
    from kvstore.client.chunks import AttachedSpace
    from kvstore.client.connection import Connection
    from kvstore.client.sync import Space

Answer = TypeVar("Answer")

_TTL_SECONDS: Final = 60.0


class Opened(NamedTuple):
    """A hand-off is open. *host* is the name under which consumers elsewhere ask for it.

    It is empty where this daemon has no peers: then only engines of this host can consume.
    """

    host: str


class Awaited(NamedTuple):
    """How a hand-off stands: *digests* are ready, from the chunk asked for on.

    With *is_last* nothing comes behind them. *published* counts all that was announced so far,
    *payload* is what `close` was given, once all is ready.
    """

    state: HandoffState
    digests: Sequence[Digest]
    is_last: bool
    published: int
    payload: bytes = b""
    first: int = 0

    @property
    def is_complete(self) -> bool:
        """Whether the hand-off was closed and these are the last of its chunks."""
        whole = self.first + len(self.digests) == self.published
        return self.is_last and self.state is HandoffState.CLOSED and whole


NOTHING_AWAITED: Final = Awaited(HandoffState.ABSENT, (), is_last=True, published=0)


class Handoffs:
    """The hand-offs of one namespace, through one session. Raises typed errors."""

    def __init__(
        self, connection: Connection, space: AttachedSpace, timeout_seconds: float
    ) -> None:
        self._connection = connection
        self._space = space
        self._timeout_seconds = timeout_seconds

    def open(self, name: str, *, consumers: int = 1, ttl_seconds: float = _TTL_SECONDS) -> Opened:
        """Open a hand-off, which breaks with this session.

        After *consumers* have left it keeps nothing any more. Raises `HandoffError` when the
        name has been used before, and `LimitError`.
        """
        request = m.HandoffOpen(*self._head(), name, consumers, round(ttl_seconds * 1000))
        return Opened(self._connection.call(request, m.HandoffOpened, self._timeout_seconds).host)

    def publish(self, name: str, first: int, digests: Sequence[Digest]) -> int:
        """Announce chunks from number *first* on; return how many are published in all.

        Each is ready once all its heads are committed, be that before or after. Raises
        `HandoffError` when the hand-off is not open, `RequestError` for a gap.
        """
        request = m.HandoffPublish(*self._head(), name, first, check_digests(digests))
        return self._connection.call(request, m.Done, self._timeout_seconds).count

    def close(self, name: str, payload: bytes = b"") -> int:
        """Say that all that comes has been published and stored; return how many chunks."""
        request = m.HandoffClose(*self._head(), name, payload)
        return self._connection.call(request, m.Done, self._timeout_seconds).count

    def abort(self, name: str) -> int:
        """Give the hand-off up: consumers compute what is not ready."""
        request = m.HandoffAbort(*self._head(), name)
        return self._connection.call(request, m.Done, self._timeout_seconds).count

    def wait(
        self, name: str, first: int, *, timeout_seconds: float, peer: str = "", early: bool = False
    ) -> Awaited:
        """Wait until chunk *first* is ready, the hand-off is over, or the time is.

        With *early* it may still have to be opened. Of the daemon *peer*, what is ready lies in
        this host's memory. Raises `RequestError` when that peer is not configured.
        """
        head, traceparent = self._head(timeout_seconds), self._space.traceparent()
        request = m.HandoffAwait(*head, name, first, peer, early, traceparent)
        ready = self._connection.finish_slowly(
            self._connection.begin(request),
            m.HandoffReady,
            timeout_seconds + self._timeout_seconds,
            self._timeout_seconds,
        )
        return _awaited(ready, first)

    def leave(self, name: str, *, peer: str = "") -> None:
        """Say that this consumer needs no more."""
        request = m.HandoffLeave(*self._head(), name, peer)
        self._connection.call(request, m.Done, self._timeout_seconds)

    def _head(self, seconds: float | None = None) -> tuple[int, int, int]:
        allowed = self._timeout_seconds if seconds is None else seconds
        return self._connection.next_id(), deadline_ms(allowed), self._space.number


class AsyncHandoffs:
    """The same for an event loop."""

    def __init__(
        self, connection: AsyncConnection, space: AttachedSpace, timeout_seconds: float
    ) -> None:
        self._connection = connection
        self._space = space
        self._timeout_seconds = timeout_seconds

    async def open(
        self, name: str, *, consumers: int = 1, ttl_seconds: float = _TTL_SECONDS
    ) -> Opened:
        """See `Handoffs.open`."""
        request = m.HandoffOpen(*self._head(), name, consumers, round(ttl_seconds * 1000))
        opened = await self._connection.call(request, m.HandoffOpened, self._timeout_seconds)
        return Opened(opened.host)

    async def publish(self, name: str, first: int, digests: Sequence[Digest]) -> int:
        """See `Handoffs.publish`."""
        return await self._done(m.HandoffPublish(*self._head(), name, first, list(digests)))

    async def close(self, name: str, payload: bytes = b"") -> int:
        """See `Handoffs.close`."""
        return await self._done(m.HandoffClose(*self._head(), name, payload))

    async def abort(self, name: str) -> int:
        """See `Handoffs.abort`."""
        return await self._done(m.HandoffAbort(*self._head(), name))

    async def wait(
        self, name: str, first: int, *, timeout_seconds: float, peer: str = "", early: bool = False
    ) -> Awaited:
        """See `Handoffs.wait`."""
        head, traceparent = self._head(timeout_seconds), self._space.traceparent()
        request = m.HandoffAwait(*head, name, first, peer, early, traceparent)
        ends = timeout_seconds + self._timeout_seconds
        return _awaited(await self._connection.call(request, m.HandoffReady, ends), first)

    async def leave(self, name: str, *, peer: str = "") -> None:
        """See `Handoffs.leave`."""
        await self._done(m.HandoffLeave(*self._head(), name, peer))

    async def _done(self, request: m.Request) -> int:
        return (await self._connection.call(request, m.Done, self._timeout_seconds)).count

    def _head(self, seconds: float | None = None) -> tuple[int, int, int]:
        allowed = self._timeout_seconds if seconds is None else seconds
        return self._connection.next_id(), deadline_ms(allowed), self._space.number


class Ask(Protocol):
    """Asks the daemon, if there is one; failing that, the answer is *miss*."""

    def __call__(self, question: Callable[[Space], Answer], miss: Answer, /) -> Answer:
        """Return the answer to *question*, or *miss*."""


class CacheHandoffs:
    """Hand-offs as connectors use them: what fails is a hand-off that never was.

    Thread-safe; never raises for the daemon.
    """

    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    def open(
        self, name: str, *, consumers: int = 1, ttl_seconds: float = _TTL_SECONDS
    ) -> Opened | None:
        """Open a hand-off; None when that cannot be: go on without."""
        return self._ask(lambda space: _opened(space, name, consumers, ttl_seconds), None)

    def publish(self, name: str, first: int, digests: Sequence[Digest]) -> bool:
        """Announce chunks from number *first* on; False when the hand-off is not open any more."""
        return self._ask(lambda space: space.handoffs.publish(name, first, digests) >= 0, False)

    def close(self, name: str, payload: bytes = b"") -> bool:
        """Say that all that comes has been published and stored; False when nobody knows of it."""
        return self._ask(lambda space: space.handoffs.close(name, payload) >= 0, False)

    def abort(self, name: str) -> None:
        """Give the hand-off up."""
        self._ask(lambda space: space.handoffs.abort(name), 0)

    def wait(
        self, name: str, first: int, *, timeout_seconds: float, peer: str = "", early: bool = False
    ) -> Awaited:
        """Wait for chunks from number *first* on; see `Handoffs.wait`.

        Without a daemon, or one that asks *peer*, there are none, and none will come.
        """
        return self._ask(
            lambda space: space.handoffs.wait(
                name, first, timeout_seconds=timeout_seconds, peer=peer, early=early
            ),
            NOTHING_AWAITED,
        )

    def leave(self, name: str, *, peer: str = "") -> None:
        """Say that this consumer needs no more."""
        self._ask(lambda space: space.handoffs.leave(name, peer=peer), None)


def _opened(space: Space, name: str, consumers: int, ttl_seconds: float) -> Opened | None:
    return space.handoffs.open(name, consumers=consumers, ttl_seconds=ttl_seconds)


def _awaited(ready: m.HandoffReady, first: int) -> Awaited:
    digests = [Digest(digest) for digest in ready.digests]
    return Awaited(ready.state, digests, ready.is_last, ready.published, ready.payload, first)

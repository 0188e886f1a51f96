"""All hand-offs of one daemon: what was published, what is ready, who waits, what is held.

Like the store, synchronous and without a clock of its own. A chunk that was published is ready
as soon as all its heads are in the store, whoever put them there. Ready chunks are held until
all consumers have left or nobody has been heard of for the hand-off's time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from kvstore.errors import HandoffError, LimitError, RequestError
from kvstore.limits import (
    HANDOFF_CHUNKS_MAX,
    HANDOFF_HOLD_SHARE,
    HANDOFFS_MAX,
    HANDOFFS_PER_SESSION_MAX,
    KEYS_PER_REQUEST_MAX,
)
from kvstore.transfer.handoff import FINAL, HandoffEvent, after
from kvstore.types import Digest, HandoffState, NamespaceId, SessionId

if TYPE_CHECKING:
    from kvstore.store.namespace import Namespace
    from kvstore.store.store import Store

_OVER: Final = frozenset({*FINAL, HandoffState.ABSENT})


class HandoffKey(NamedTuple):
    """Names one hand-off: those of other tenants, namespaces or *peer* daemons are others.

    *peer* is the daemon that it was opened at, empty for this one.
    """

    tenant: int
    namespace: NamespaceId
    name: str
    peer: str = ""


class Standing(NamedTuple):
    """How a hand-off stands for a consumer: *digests* are ready behind those it has seen.

    With *is_last* nothing comes behind them. *published* counts what was announced so far, and
    *consumers* those who were announced.
    """

    state: HandoffState
    digests: Sequence[Digest]
    is_last: bool
    published: int
    payload: bytes = b""
    consumers: int = 1


UNKNOWN: Final = Standing(HandoffState.ABSENT, (), is_last=True, published=0)


class _Handoff:
    """One hand-off. What it holds are slots of the store, each once."""

    def __init__(
        self, space: Namespace, owner: SessionId, consumers: int, ttl_seconds: float
    ) -> None:
        self.state = HandoffState.ABSENT
        self.space = space
        self.owner = owner
        self.consumers = consumers
        self.ttl_seconds = ttl_seconds
        self.quiet_at = 0.0
        self.digests: list[Digest] = []
        self.ready = 0
        self.payload = b""
        self.held: list[int] = []
        self.left: set[SessionId] = set()
        self.watched: tuple[Digest, Callable[[], None]] | None = None

    @property
    def is_wanted(self) -> bool:
        """Whether a consumer may still come for its chunks."""
        return self.state not in _OVER and len(self.left) < self.consumers


class Handoffs:
    """The hand-offs of one store, by tenant, namespace and name."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._counters = store.counters
        self._all: dict[HandoffKey, _Handoff] = {}
        self._of_session: dict[SessionId, set[HandoffKey]] = {}
        self._waiting: dict[HandoffKey, dict[Callable[[], None], None]] = {}
        self._held_bytes = 0

    @property
    def open_count(self) -> int:
        """How many hand-offs are not over."""
        return sum(one.state not in FINAL for one in self._all.values())

    @property
    def held_chunks(self) -> int:
        """How many chunks are held for consumers."""
        return sum(len(one.held) for one in self._all.values())

    # --- the producer's side ------------------------------------------------------------

    def open(
        self,
        owner: SessionId,
        key: HandoffKey,
        space: Namespace,
        now: float,
        *,
        consumers: int,
        ttl_seconds: float,
    ) -> None:
        """Open a hand-off for the session *owner*, whom it ends with.

        Raises `HandoffError` when there is, or was, one of that name, and `LimitError`.
        """
        known = self._all.get(key)
        if known is not None:
            after(known.state, HandoffEvent.OPENED, key.name)
        owned = len(self._of_session.get(owner, ()))
        if owned >= HANDOFFS_PER_SESSION_MAX:
            raise LimitError(f"session has {owned} hand-offs open")
        self._make_room()
        handoff = self._all[key] = _Handoff(space, owner, consumers, ttl_seconds)
        self._of_session.setdefault(owner, set()).add(key)
        # Its namespace stays, and with it the digests that are watched there.
        space.entered += 1
        self._counters.handoffs_opened += 1
        self._step(key, handoff, HandoffEvent.OPENED, now)

    def publish(
        self,
        owner: SessionId,
        key: HandoffKey,
        first: int,
        digests: Sequence[Digest],
        now: float,
    ) -> int:
        """Announce chunks from number *first* on; return how many are published in all.

        Those announced before must be the same. Raises `HandoffError`, and `RequestError` for a
        gap or too many.
        """
        handoff = self._owned(owner, key)
        known = handoff.digests[first : first + len(digests)]
        if first > len(handoff.digests):
            raise RequestError(
                f"hand-off {key.name!r}: chunk {first} published behind {len(handoff.digests)}"
            )
        if list(digests[: len(known)]) != known:
            raise HandoffError(f"hand-off {key.name!r}: other chunks published in the same place")
        new = digests[len(known) :]
        if len(handoff.digests) + len(new) > HANDOFF_CHUNKS_MAX:
            raise LimitError(
                f"hand-off {key.name!r}: more than {HANDOFF_CHUNKS_MAX} chunks published"
            )
        handoff.digests += new
        self._counters.handoff_chunks_published += len(new)
        self._advance(key, handoff)
        # Last, so that those who wait find what was stored before it was published.
        self._step(key, handoff, HandoffEvent.PUBLISHED, now)
        return len(handoff.digests)

    def expect(self, key: HandoffKey, consumers: int) -> None:
        """Change how many consumers are waited for, if there is such a hand-off."""
        if key in self._all:
            self._all[key].consumers = consumers

    def close(self, owner: SessionId, key: HandoffKey, payload: bytes, now: float) -> int:
        """Note that nothing more comes; return how many chunks were published."""
        handoff = self._owned(owner, key)
        published = len(handoff.digests)
        handoff.payload = payload
        self._step(key, handoff, HandoffEvent.CLOSED, now)
        self._finish_if_left(key, handoff, now)
        return published

    def abort(self, owner: SessionId, key: HandoffKey, now: float) -> int:
        """Give the hand-off up; what is ready can still be taken."""
        handoff = self._owned(owner, key)
        published = len(handoff.digests)
        self._break(key, handoff, HandoffEvent.ABORTED, now)
        return published

    def end_session(self, session: SessionId, now: float) -> None:
        """Break what *session* had open, and forget that it was a consumer."""
        for key in list(self._of_session.pop(session, ())):
            handoff = self._all[key]
            if handoff.state is HandoffState.OPEN:
                self._break(key, handoff, HandoffEvent.LOST, now)

    def expire(self, now: float) -> int:
        """End hand-offs that nobody has been heard of for their time; return their number."""
        quiet = [
            key
            for key, handoff in self._all.items()
            if handoff.state not in FINAL and handoff.quiet_at <= now
        ]
        for key in quiet:
            self._counters.handoffs_expired += 1
            self._step(key, self._all[key], HandoffEvent.QUIET, now)
        return len(quiet)

    # --- the consumers' side ------------------------------------------------------------

    def is_known(self, key: HandoffKey) -> bool:
        """Return whether there is, or was, a hand-off of that name."""
        return key in self._all

    def is_known_elsewhere(self, key: HandoffKey) -> bool:
        """Return whether the tenant has one of that name in another namespace."""
        return any(one._replace(namespace=key.namespace) == key for one in self._all)

    def is_wanted(self, key: HandoffKey) -> bool:
        """Return whether a consumer may still come for what is published."""
        handoff = self._all.get(key)
        return handoff is not None and handoff.is_wanted

    def has_left(self, session: SessionId, key: HandoffKey) -> bool:
        """Return whether *session* has left, or nobody is expected any more."""
        handoff = self._all.get(key)
        return handoff is None or session in handoff.left or not handoff.is_wanted

    def forget(self, owner: SessionId, key: HandoffKey) -> None:
        """Undo `open` of a hand-off without chunks, and the memory of its name."""
        handoff = self._owned(owner, key)
        assert not handoff.digests, "what was published has been seen"
        self._disown(key, handoff)
        self._bury(handoff)
        del self._all[key]
        self._tell(key)

    def standing(self, key: HandoffKey, first: int, now: float) -> Standing:
        """Return what is ready from chunk *first* on. A closed one lives on by being asked for."""
        handoff = self._all.get(key)
        if handoff is None:
            return UNKNOWN
        state = handoff.state
        if state in FINAL:
            return Standing(state, (), is_last=True, published=0, consumers=handoff.consumers)
        if state is not HandoffState.OPEN:
            handoff.quiet_at = now + handoff.ttl_seconds
        stop = min(handoff.ready, first + KEYS_PER_REQUEST_MAX)
        is_last = stop == handoff.ready and self._has_ended(handoff)
        payload = handoff.payload if is_last else b""
        digests = handoff.digests[first:stop]
        published = len(handoff.digests)
        return Standing(state, digests, is_last, published, payload, handoff.consumers)

    def wait(self, key: HandoffKey, changed: Callable[[], None]) -> None:
        """Call *changed* at every change of the hand-off, also of one that is yet to be opened."""
        self._waiting.setdefault(key, {})[changed] = None

    def unwait(self, key: HandoffKey, changed: Callable[[], None]) -> None:
        """End `wait`; idempotent."""
        waiting = self._waiting.get(key, {})
        waiting.pop(changed, None)
        if not waiting:
            self._waiting.pop(key, None)

    def leave(self, session: SessionId, key: HandoffKey, now: float) -> bool:
        """Note that one consumer needs no more; return whether the hand-off was known.

        Behind the last of them nothing is held any more.
        """
        handoff = self._all.get(key)
        if handoff is None or handoff.state in FINAL:
            return handoff is not None
        handoff.left.add(session)
        if not handoff.is_wanted:
            self._let_go(handoff)
        self._finish_if_left(key, handoff, now)
        return True

    # --- the law ------------------------------------------------------------------------

    def check(self) -> None:
        """Raise `AssertionError` unless what is held belongs to what is not over."""
        held_bytes = 0
        for key, handoff in self._all.items():
            assert handoff.ready <= len(handoff.digests), f"{key.name}: ready and published"
            assert not (handoff.held and handoff.state in FINAL), f"{key.name} is over and holds"
            assert (handoff.watched is None) or handoff.state not in FINAL, f"{key.name} watches"
            is_owned = key in self._of_session.get(handoff.owner, ())
            assert is_owned == (handoff.state is HandoffState.OPEN), f"{key.name}: its owner"
            held_bytes += len(handoff.held) * self._footprint(handoff)
        assert held_bytes == self._held_bytes, "bytes held by hand-offs"

    # --- inside -------------------------------------------------------------------------

    def _owned(self, owner: SessionId, key: HandoffKey) -> _Handoff:
        handoff = self._all.get(key)
        if handoff is None:
            raise HandoffError(f"hand-off {key.name!r} is unknown")
        if handoff.owner != owner:
            raise HandoffError(f"hand-off {key.name!r} was opened by another session")
        if handoff.state is not HandoffState.OPEN:
            raise HandoffError(f"hand-off {key.name!r} is {handoff.state.name.lower()}")
        return handoff

    def _break(self, key: HandoffKey, handoff: _Handoff, event: HandoffEvent, now: float) -> None:
        self._counters.handoffs_broken += 1
        self._step(key, handoff, event, now)
        self._finish_if_left(key, handoff, now)

    def _finish_if_left(self, key: HandoffKey, handoff: _Handoff, now: float) -> None:
        is_done = handoff.state not in {HandoffState.OPEN, *FINAL}
        if is_done and not handoff.is_wanted:
            self._counters.handoffs_taken += 1
            self._step(key, handoff, HandoffEvent.TAKEN, now)

    def _step(self, key: HandoffKey, handoff: _Handoff, event: HandoffEvent, now: float) -> None:
        """Go where *event* leads, and let all who wait know; raises `HandoffError`."""
        was_open = handoff.state is HandoffState.OPEN
        handoff.state = after(handoff.state, event, key.name)
        handoff.quiet_at = now + handoff.ttl_seconds
        if was_open and handoff.state is not HandoffState.OPEN:
            self._disown(key, handoff)
        if handoff.state in FINAL:
            self._bury(handoff)
        self._tell(key)

    def _disown(self, key: HandoffKey, handoff: _Handoff) -> None:
        owned = self._of_session.get(handoff.owner, set())
        owned.discard(key)
        if not owned:
            self._of_session.pop(handoff.owner, None)

    def _bury(self, handoff: _Handoff) -> None:
        """Keep the name alone."""
        self._let_go(handoff)
        self._unwatch(handoff)
        handoff.digests = []
        handoff.ready = 0
        handoff.payload = b""
        handoff.left = set()
        handoff.space.entered -= 1

    def _advance(self, key: HandoffKey, handoff: _Handoff) -> None:
        """Count the leading chunks that are ready, hold them, and watch for the next."""
        self._unwatch(handoff)
        if handoff.state in FINAL:
            return
        space, index = handoff.space, self._store.index
        count, slots = index.prefix(space, handoff.digests[handoff.ready :])
        handoff.ready += count
        self._counters.handoff_chunks_ready += count
        if handoff.is_wanted:
            for slot in slots:
                self._hold(handoff, slot)
        if handoff.ready < len(handoff.digests):
            digest = handoff.digests[handoff.ready]
            handoff.watched = digest, lambda: self._changed(key, handoff)
            self._store.watch(space, *handoff.watched)

    def _changed(self, key: HandoffKey, handoff: _Handoff) -> None:
        """Look again: the chunk that is watched has been committed, or given up."""
        handoff.watched = None
        self._advance(key, handoff)
        self._tell(key)

    def _has_ended(self, handoff: _Handoff) -> bool:
        """Whether nothing becomes ready any more: the next chunk is not even being written."""
        if handoff.state is HandoffState.OPEN:
            return False
        if handoff.ready == len(handoff.digests):
            return True
        following = handoff.digests[handoff.ready]
        return not self._store.reservations.is_arriving(handoff.space, following)

    def _hold(self, handoff: _Handoff, slot: int) -> None:
        """Hold *slot*, unless hand-offs hold as much as they may: it can then be evicted."""
        size_bytes = self._footprint(handoff)
        most = self._store.host.usage().capacity_bytes // HANDOFF_HOLD_SHARE
        if self._held_bytes + size_bytes <= most:
            self._held_bytes += size_bytes
            handoff.held.append(slot)
            self._store.hold(slot)

    def _footprint(self, handoff: _Handoff) -> int:
        return self._store.host.footprint(handoff.space.chunk_bytes)

    def _let_go(self, handoff: _Handoff) -> None:
        held, handoff.held = handoff.held, []
        self._held_bytes -= len(held) * self._footprint(handoff)
        for slot in held:
            self._store.let_go(slot)

    def _unwatch(self, handoff: _Handoff) -> None:
        if handoff.watched is not None:
            self._store.unwatch(handoff.space, *handoff.watched)
            handoff.watched = None

    def _tell(self, key: HandoffKey) -> None:
        for changed in list(self._waiting.get(key, ())):
            changed()

    def _make_room(self) -> None:
        """Forget the oldest hand-off that is over when there are as many as there may be."""
        if len(self._all) < HANDOFFS_MAX:
            return
        oldest = next((key for key, one in self._all.items() if one.state in FINAL), None)
        if oldest is None:
            raise LimitError(f"{len(self._all)} hand-offs are open, at most {HANDOFFS_MAX}")
        del self._all[oldest]

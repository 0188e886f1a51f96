"""Promises with an end: leases on chunks, reservations of room. No clock: *now* is an argument.

Both belong to one session and end with it at the latest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from kvstore.errors import LeaseError, LimitError, ReservationError
from kvstore.limits import LEASES_PER_SESSION_MAX, RESERVATIONS_PER_SESSION_MAX
from kvstore.store.namespace import Namespace
from kvstore.types import Digest, Extent, HeadRange, LeaseId, ReservationId, SessionId


class Lease(NamedTuple):
    """Chunks that stay until *expires_at*, or until their session lets go of them."""

    session: SessionId
    slots: Sequence[int]
    expires_at: float


class Leases:
    """All leases. They last equally long, so the oldest is the first to expire."""

    def __init__(self, ttl_seconds: float) -> None:
        self.ttl_seconds = ttl_seconds
        self._all: dict[LeaseId, Lease] = {}
        self._of_session: dict[SessionId, set[LeaseId]] = {}
        self._last_id = 0

    def __len__(self) -> int:
        """Return the number of leases."""
        return len(self._all)

    def __iter__(self) -> Iterator[Lease]:
        """Yield all leases, oldest first."""
        return iter(self._all.values())

    def grant(self, session: SessionId, slots: Sequence[int], now: float) -> LeaseId:
        """Return a new lease; raises `LimitError` when the session has too many."""
        owned = self._of_session.setdefault(session, set())
        if len(owned) >= LEASES_PER_SESSION_MAX:
            raise LimitError(
                f"session holds {len(owned)} leases, at most {LEASES_PER_SESSION_MAX} allowed"
            )
        self._last_id += 1
        lease = LeaseId(self._last_id)
        self._all[lease] = Lease(session, slots, now + self.ttl_seconds)
        owned.add(lease)
        return lease

    def end(self, session: SessionId, leases: Iterable[LeaseId]) -> list[Lease]:
        """End *leases* of *session*, all or none.

        Raises `LeaseError` when one is unknown, has ended or is another session's.
        """
        wanted = list(leases)
        owned = self._of_session.get(session, set())
        for lease in wanted:
            if lease not in owned:
                raise LeaseError(f"lease {lease} is not held by this session")
        return [self._drop(lease) for lease in dict.fromkeys(wanted)]

    def narrow(self, lease: LeaseId, slots: Sequence[int]) -> None:
        """Let *lease* hold *slots* alone, a part of what it held, for as long as it was to."""
        assert slots, "a lease holds something"
        self._all[lease] = self._all[lease]._replace(slots=slots)

    def holds(self, session: SessionId, lease: LeaseId) -> bool:
        """Return whether *session* still holds *lease*."""
        return lease in self._of_session.get(session, ())

    def end_session(self, session: SessionId) -> list[Lease]:
        """End all leases of *session*."""
        ended = [self._drop(lease) for lease in list(self._of_session.get(session, ()))]
        self._of_session.pop(session, None)
        return ended

    def expire(self, now: float) -> list[Lease]:
        """End all leases whose time is over."""
        over: list[LeaseId] = []
        for lease, record in self._all.items():
            if record.expires_at > now:
                break
            over.append(lease)
        return [self._drop(lease) for lease in over]

    def _drop(self, lease: LeaseId) -> Lease:
        record = self._all.pop(lease)
        self._of_session[record.session].discard(lease)
        return record


class Reservation(NamedTuple):
    """Room that a session fills with one shard; unseen by all others until it is committed."""

    session: SessionId
    space: Namespace
    digest: Digest
    parent: Digest | None
    heads: HeadRange
    extent: Extent
    tenant: int = 0
    is_pooled: bool = False
    """Whether *extent* lies in the pool of the device tier, not in the arena."""


class Reservations:
    """All reservations, and which chunks are arriving through them."""

    def __init__(self) -> None:
        self._all: dict[ReservationId, Reservation] = {}
        self._of_session: dict[SessionId, dict[ReservationId, None]] = {}
        self._arriving: dict[tuple[int, Digest], list[HeadRange]] = {}
        self._last_id = 0

    def __len__(self) -> int:
        """Return the number of reservations."""
        return len(self._all)

    def __iter__(self) -> Iterator[Reservation]:
        """Yield all reservations."""
        return iter(self._all.values())

    def make(self, reservation: Reservation) -> ReservationId:
        """Keep *reservation* and return its id."""
        self._last_id += 1
        made = ReservationId(self._last_id)
        self._all[made] = reservation
        self._of_session.setdefault(reservation.session, {})[made] = None
        key = (reservation.space.number, reservation.digest)
        self._arriving.setdefault(key, []).append(reservation.heads)
        return made

    def check_room(self, session: SessionId, more: int) -> None:
        """Raise `LimitError` when *session* may not have *more* reservations."""
        owned = len(self._of_session.get(session, ()))
        if owned + more > RESERVATIONS_PER_SESSION_MAX:
            raise LimitError(
                f"session has {owned} reservations and asks for {more} more, "
                f"at most {RESERVATIONS_PER_SESSION_MAX} allowed"
            )

    def get(self, session: SessionId, reservation: ReservationId) -> Reservation:
        """Return a reservation of *session*; raises `ReservationError` when it has no such one."""
        found = self._all.get(reservation)
        if found is None or found.session != session:
            raise ReservationError(f"reservation {reservation} is not held by this session")
        return found

    def end(self, reservation: ReservationId) -> Reservation:
        """Take *reservation* out, to be committed or freed by the caller."""
        record = self._all.pop(reservation)
        del self._of_session[record.session][reservation]
        key = (record.space.number, record.digest)
        arriving = self._arriving[key]
        arriving.remove(record.heads)
        if not arriving:
            del self._arriving[key]
        return record

    def end_session(self, session: SessionId) -> list[Reservation]:
        """Take out all reservations of *session*."""
        ended = [self.end(reservation) for reservation in list(self._of_session.get(session, ()))]
        self._of_session.pop(session, None)
        return ended

    def is_arriving(self, space: Namespace, digest: Digest, heads: HeadRange | None = None) -> bool:
        """Return whether some session is writing *digest*, or exactly the shard *heads* of it."""
        arriving = self._arriving.get((space.number, digest), ())
        return bool(arriving) if heads is None else heads in arriving

"""Leases and reservations: owned by one session, ended once, all or none."""

from __future__ import annotations

import pytest

from kvstore.errors import LeaseError, LimitError, ReservationError
from kvstore.limits import LEASES_PER_SESSION_MAX, RESERVATIONS_PER_SESSION_MAX
from kvstore.store.leases import Leases, Reservation, Reservations
from kvstore.store.namespace import Namespace
from kvstore.types import Extent, HeadRange, LeaseId, ReservationId, SessionId
from tests.support.making import loose_digest, make_manifest

MINE, THEIRS = SessionId(1), SessionId(2)
SPACE = Namespace(0, make_manifest())
HEADS = HeadRange(0, 2)


@pytest.fixture
def leases() -> Leases:
    return Leases(ttl_seconds=10)


def reservation(session: SessionId = MINE, number: int = 0, heads: HeadRange = HEADS):
    return Reservation(session, SPACE, loose_digest(number), None, heads, Extent(0, 1))


def test_ids_are_never_zero_and_never_given_again(leases):
    first = leases.grant(MINE, [1], 0)
    leases.end(MINE, [first])
    assert 0 < first < leases.grant(MINE, [1], 0)


def test_a_lease_ends_for_its_owner_alone_and_once(leases):
    lease = leases.grant(MINE, [1, 2], 0)
    with pytest.raises(LeaseError, match=f"lease {lease} is not held by this session"):
        leases.end(THEIRS, [lease])
    assert [ended.slots for ended in leases.end(MINE, [lease])] == [[1, 2]]
    with pytest.raises(LeaseError):
        leases.end(MINE, [lease])


def test_one_wrong_lease_ends_none(leases):
    lease = leases.grant(MINE, [1], 0)
    with pytest.raises(LeaseError):
        leases.end(MINE, [lease, LeaseId(99)])
    assert len(leases) == 1


def test_a_lease_named_twice_ends_once(leases):
    lease = leases.grant(MINE, [1], 0)
    assert len(leases.end(MINE, [lease, lease])) == 1


def test_leases_expire_exactly_at_their_end_and_oldest_first(leases):
    leases.grant(MINE, [1], now=0)
    leases.grant(THEIRS, [2], now=5)
    assert leases.expire(9.99) == []
    assert [ended.slots for ended in leases.expire(10)] == [[1]]
    assert [lease.slots for lease in leases] == [[2]]
    assert [ended.slots for ended in leases.expire(15)] == [[2]]


def test_the_end_of_a_session_ends_its_leases_and_no_others(leases):
    leases.grant(MINE, [1], 0)
    leases.grant(THEIRS, [2], 0)
    leases.grant(MINE, [3], 0)
    assert sorted(ended.slots[0] for ended in leases.end_session(MINE)) == [1, 3]
    assert leases.end_session(MINE) == []
    assert len(leases) == 1


def test_a_session_may_have_only_so_many_leases(leases):
    for _ in range(LEASES_PER_SESSION_MAX):
        leases.grant(MINE, [1], 0)
    with pytest.raises(LimitError, match=str(LEASES_PER_SESSION_MAX)):
        leases.grant(MINE, [1], 0)
    assert leases.grant(THEIRS, [1], 0)


def test_a_reservation_belongs_to_its_session():
    reservations = Reservations()
    made = reservations.make(reservation())
    assert reservations.get(MINE, made).digest == loose_digest(0)
    for session, wanted in [(THEIRS, made), (MINE, ReservationId(99))]:
        with pytest.raises(ReservationError, match=f"reservation {wanted} is not held"):
            reservations.get(session, wanted)


def test_a_chunk_arrives_for_as_long_as_one_of_its_shards_does():
    reservations = Reservations()
    lower, upper = HeadRange(0, 2), HeadRange(2, 4)
    digest = loose_digest(0)
    first = reservations.make(reservation(heads=lower))
    second = reservations.make(reservation(THEIRS, heads=upper))
    assert reservations.is_arriving(SPACE, digest)
    assert reservations.is_arriving(SPACE, digest, lower)
    assert not reservations.is_arriving(SPACE, digest, HeadRange(0, 4))
    reservations.end(first)
    assert not reservations.is_arriving(SPACE, digest, lower)
    assert reservations.is_arriving(SPACE, digest)
    reservations.end(second)
    assert not reservations.is_arriving(SPACE, digest)


def test_the_end_of_a_session_takes_out_its_reservations_and_no_others():
    reservations = Reservations()
    reservations.make(reservation(MINE, 0))
    reservations.make(reservation(THEIRS, 1))
    assert [ended.session for ended in reservations.end_session(MINE)] == [MINE]
    assert reservations.end_session(MINE) == []
    assert [left.session for left in reservations] == [THEIRS]


def test_a_session_may_have_only_so_many_reservations():
    reservations = Reservations()
    reservations.make(reservation())
    reservations.check_room(MINE, RESERVATIONS_PER_SESSION_MAX - 1)
    with pytest.raises(LimitError, match=f"1 reservations .* {RESERVATIONS_PER_SESSION_MAX}"):
        reservations.check_room(MINE, RESERVATIONS_PER_SESSION_MAX)

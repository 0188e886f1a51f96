"""History: the latest fate of each chunk, in bounded memory, and never a wrong one."""

from __future__ import annotations

from kvstore.limits import (
    HISTORY_ENTRIES_MAX,
    HISTORY_ENTRIES_MIN,
    RECENT_LOOKUP_DIGESTS_MAX,
    RECENT_LOOKUPS_MAX,
)
from kvstore.store.history import Fate, History
from kvstore.store.namespace import Namespace
from kvstore.store.recent import RecentLookup, RecentLookups
from kvstore.types import TierKind
from tests.support.making import loose_digest, make_manifest

HERE = Namespace(0, make_manifest())
THERE = Namespace(1, make_manifest(revision="2"))


def test_the_latest_fate_counts_and_has_its_time():
    now = [100.0]
    history = History(lambda: now[0])
    history.note(HERE, loose_digest(1), Fate.EVICTED_FOR_ROOM, TierKind.HOST)
    now[0] = 107.5
    history.note(HERE, loose_digest(1), Fate.DELETED, TierKind.DISK)
    entry = history.find(HERE, loose_digest(1))
    assert entry is not None
    assert (entry.fate, entry.tier) == (Fate.DELETED, TierKind.DISK)
    assert abs(entry.at - 107.5) < 0.2


def test_a_fate_belongs_to_one_namespace():
    history = History()
    history.note(HERE, loose_digest(1), Fate.DELETED, TierKind.HOST)
    assert history.find(THERE, loose_digest(1)) is None


def test_a_table_that_is_as_large_as_may_be_stays_so(monkeypatch):
    monkeypatch.setattr("kvstore.store.history.HISTORY_ENTRIES_MAX", HISTORY_ENTRIES_MIN)
    history = History(lambda: 5.0)
    assert history.began_at == 5.0
    for number in range(2 * HISTORY_ENTRIES_MIN):
        history.note(HERE, loose_digest(number), Fate.DELETED, TierKind.HOST)
    assert history.capacity == HISTORY_ENTRIES_MIN
    assert not history.is_complete


def test_named_look_ups_are_remembered_up_to_a_number_of_digests():
    recent = RecentLookups()
    digests = [loose_digest(number) for number in range(4096)]
    for number in range(40):
        recent.note(RecentLookup(f"request {number}", HERE, digests, 1, 0.0))
    assert len(recent) * len(digests) <= RECENT_LOOKUP_DIGESTS_MAX
    assert recent.find("request 0") is None
    found = recent.find("request 39")
    assert found is not None
    assert found.digests is digests
    for number in range(2 * RECENT_LOOKUPS_MAX):
        recent.note(RecentLookup("again", HERE, digests[:1], number, 0.0))
    assert len(recent) == RECENT_LOOKUPS_MAX
    assert recent.find("again").hits == 2 * RECENT_LOOKUPS_MAX - 1


def test_memory_is_bounded_and_says_when_it_has_forgotten():
    history = History()
    count = 0
    while history.is_complete:
        history.note(HERE, loose_digest(count), Fate.DELETED, TierKind.HOST)
        count += 1
    assert history.find(HERE, loose_digest(count - 1)) is not None
    for number in range(count, count + 5 * HISTORY_ENTRIES_MIN):
        history.note(HERE, loose_digest(number), Fate.DELETED, TierKind.HOST)
    assert HISTORY_ENTRIES_MIN < history.capacity <= HISTORY_ENTRIES_MAX
    assert history.entries <= 2 * history.capacity
    known = sum(
        history.find(HERE, loose_digest(number)) is not None
        for number in range(count + 5 * HISTORY_ENTRIES_MIN)
    )
    # Every one is found as itself or not at all; most are.
    assert known > history.capacity // 4

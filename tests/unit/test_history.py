"""History: the latest fate of each chunk, in bounded memory, and never a wrong one."""

from __future__ import annotations

from kvstore.limits import HISTORY_ENTRIES_MAX, HISTORY_ENTRIES_MIN
from kvstore.store.history import Fate, History
from kvstore.store.namespace import Namespace
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

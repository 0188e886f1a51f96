"""Explanations: for every cause of a miss a scenario, and the true cause is the one that is named.

Each scenario makes its cause happen in a real store, then asks; `SEEN` holds the causes that
were named, and the last test finds the scenario that is missing.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest

from kvstore.errors import ChecksumError
from kvstore.hashing import chunk_digests, scope_digest
from kvstore.limits import MIB
from kvstore.store.explanation import Cause, explain
from kvstore.store.history import Fate
from kvstore.store.quota import Share
from kvstore.tiers.fake import FakeTier, Fault
from kvstore.types import HeadRange, Root, TierKind
from tests.support.making import CHUNK_TOKENS, make_digests, make_manifest, opaque_manifest
from tests.support.stores import Engine, fill_up, make_store, write_chunk
from tests.support.tiers import DISK, REDIS, Slower, Tiers, fake, running
from tests.support.virtual import run

MANIFEST = make_manifest()


@pytest.fixture
def store():
    made = make_store(capacity_bytes=MIB)
    yield made
    made.check()
    made.host.close()


@pytest.fixture
def engine(store):
    return Engine(store, MANIFEST)


def why(engine, digests, number=0, **options):
    """Return what is said of chunk *number* of *digests*."""
    return explain(engine.store, engine.space, digests, **options).chunks[number]


# --- where it is -------------------------------------------------------------------------


def test_what_is_here_is_present(engine):
    digests = make_digests(2)
    engine.put(digests)
    explanation = explain(engine.store, engine.space, digests)
    assert explanation.hits == 2
    assert [one.cause for one in explanation.chunks] == ["present", "present"]
    assert explanation.chunks[0].tiers == TierKind.HOST


def test_what_is_being_written_is_arriving(engine):
    digests = make_digests(2)
    engine.reserve(digests)
    assert why(engine, digests).cause == "arriving"


def test_what_has_some_heads_only_is_partial(engine):
    digests = make_digests(1)
    engine.put(digests, heads=HeadRange(0, 2))
    one = why(engine, digests)
    assert one.cause == "partial"
    assert "heads 0 to 2 of 4" in one.text


def test_what_lies_behind_a_gap_is_there_and_does_not_count(engine):
    digests = make_digests(3)
    engine.put(digests[:1])
    engine.put(digests[2:], parent=digests[1])
    explanation = explain(engine.store, engine.space, digests)
    assert explanation.hits == 1
    assert [one.cause for one in explanation.chunks] == ["present", "never_stored", "behind_gap"]


# --- what became of it -------------------------------------------------------------------


def test_what_nobody_stored_was_never_stored(engine):
    assert why(engine, make_digests(1)).cause == "never_stored"


def test_what_may_have_been_forgotten_is_not_called_never_stored(engine):
    engine.store.history.overwritten = 1
    assert why(engine, make_digests(1)).cause == "not_remembered"


def test_what_made_room_was_evicted_from_the_host_tier_at_its_time(store, engine):
    now = [1000.0]
    store.history.start(lambda: now[0])
    first = fill_up(engine)
    now[0] = 1060.0
    fill_up(engine, prompt=1)
    one = why(engine, first)
    assert (one.cause, one.tier) == ("evicted", TierKind.HOST)
    assert "make room" in one.text
    assert one.at == pytest.approx(1060.0, abs=0.2)


def test_what_made_room_in_one_piece_says_so(store):
    small, large = Engine(store, MANIFEST), Engine(store, opaque_manifest(MIB // 2))
    digests = fill_up(small)
    # Every other chunk is in use: whole runs are free only where a window is cleared.
    leased = [small.lease(digests[: len(digests) // 4])]
    large.put(make_digests(1, prompt=5))
    store.release(small.session, leased)
    assert store.counters.evict_chunks
    assert why(small, digests, len(digests) - 1).cause == "evicted"
    store.history.note(small.space, digests[-1], Fate.EVICTED_FOR_WINDOW, TierKind.HOST)
    assert "in one piece" in why(small, digests, len(digests) - 1).text


def test_what_left_because_of_a_quota_says_so():
    async def main() -> None:
        quota = Share("blue", quota_bytes=100 * 1024)
        async with running(Tiers([], tenants=(Share(""), quota))) as tiers:
            blue = tiers.engine(MANIFEST)
            digests = make_digests(4)
            for at, digest in enumerate(digests):
                (place,) = tiers.store.reserve(
                    *(blue.session, blue.space, [digest]),
                    parent=digests[at - 1] if at else None,
                    heads=MANIFEST.all_heads,
                    tenant=1,
                )
                blue.commit(digest, place)
            gone = [
                one for one in explain(tiers.store, blue.space, digests).chunks if not one.tiers
            ]
            assert gone
            assert {one.cause for one in gone} == {"evicted"}
            assert all("quota" in one.text for one in gone)

    run(main())


def test_what_was_deleted_was_deleted(store, engine):
    digests = make_digests(2)
    engine.put(digests)
    store.delete(engine.space, digests[1:])
    assert why(engine, digests, 1).cause == "deleted"


def test_what_a_reader_found_damaged_is_in_quarantine(store, engine):
    digests = make_digests(1)
    engine.put(digests)
    store.delete(engine.space, digests, Fate.DAMAGED)
    one = why(engine, digests)
    assert (one.cause, one.tier) == ("quarantined", TierKind.HOST)


def test_what_did_not_match_when_it_was_stored_was_not_stored(store, engine):
    digests = make_digests(1)
    (place,) = engine.reserve(digests)
    write_chunk(store, place.extent, bytes(place.extent.size_bytes))
    with pytest.raises(ChecksumError):
        store.commit(engine.session, place.reservation, Root(1))
    one = why(engine, digests)
    assert one.cause == "quarantined"
    assert "when it was stored" in one.text


def test_what_its_writer_gave_up_was_aborted(store, engine):
    digests = make_digests(2)
    places = engine.reserve(digests)
    store.abort(engine.session, [places[0].reservation])
    store.end_session(engine.session)
    assert [why(engine, digests, n).cause for n in (0, 1)] == ["aborted", "aborted"]
    store.bury(engine.session)


def test_what_found_no_room_was_not_stored(store, engine):
    held = fill_up(engine)
    lease = engine.lease(held)
    more = make_digests(1, prompt=1)
    engine.put(more)
    assert why(engine, more).cause == "no_room"
    store.release(engine.session, [lease])


# --- in slower tiers ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "damaged", "cause"),
    [
        (REDIS, False, "expired"),
        (DISK, False, "expired"),
        (DISK, True, "quarantined"),
    ],
)
async def test_what_a_slower_tier_has_lost_or_damaged_says_which(kind, damaged, cause):
    class Counting(FakeTier):
        counters = SimpleNamespace(quarantined=0)

        async def read(self, shard, place, target, table=None):
            self.counters.quarantined += damaged
            return await super().read(shard, place, target, table)

    # Calls: two writes, then reads.
    tier = Counting(64 * MIB, [(2, Fault.FORGET)], kind=kind)
    async with running(Tiers([Slower(tier)])) as tiers:
        engine = tiers.engine(MANIFEST)
        digests = make_digests(2)
        engine.put(digests)
        await tiers.settle()
        tiers.evict_all()
        assert await tiers.load(engine, digests) == []
        one = why(engine, digests)
        assert (one.cause, one.tier) == (cause, kind)
        assert kind.name.lower() in one.text


async def test_what_left_a_full_disk_was_evicted_from_there():
    async with running(Tiers([Slower(fake(DISK, capacity_bytes=128 * 1024))])) as tiers:
        engine = tiers.engine(MANIFEST)
        digests = make_digests(8)
        engine.put(digests)
        await tiers.settle()
        tiers.evict_all()
        gone = [one for one in explain(tiers.store, engine.space, digests).chunks if not one.tiers]
        assert gone
        assert {one.cause for one in gone} == {"evicted"}


def test_what_takes_longer_than_computing_is_declined():
    class SlowTier(FakeTier):
        async def _fault(self, key):
            await asyncio.sleep(0.1)

    async def main() -> None:
        async with running(Tiers([Slower(SlowTier(64 * MIB, kind=REDIS))])) as tiers:
            engine = tiers.engine(MANIFEST)
            digests = make_digests(4)
            engine.put(digests)
            await tiers.settle()
            tiers.evict_all()
            await tiers.load(engine, digests[:2])
            tiers.evict_all()
            # Asked with a cost, it is found out now; without one, what the last look-up met.
            assert why(engine, digests, recompute_seconds=0.001).cause == "declined"
            assert why(engine, digests, recompute_seconds=10.0).cause != "declined"
            tiers.store.lookup(1, engine.space, digests, 0.0, recompute_seconds=0.001)
            one = why(engine, digests)
            assert (one.verdict, one.cause, one.tier) == ("declined", "declined", REDIS)

    run(main())


def test_what_did_not_come_up_in_time_was_late():
    async def main() -> None:
        async with running(Tiers([Slower(fake(DISK))])) as tiers:
            engine = tiers.engine(MANIFEST)
            digests = make_digests(2)
            engine.put(digests)
            await tiers.settle()
            tiers.evict_all()
            loading, pending, answered = tiers.ask(engine, digests)
            pending.give_up()
            assert tiers.store.end_load(loading, await answered)[1] == []
            one = why(engine, digests)
            assert (one.verdict, one.cause, one.tier) == ("present", "late", DISK)

    run(main())


def test_what_is_only_in_a_tier_that_fails_is_unavailable():
    async def main() -> None:
        redis = fake(script=[(n, Fault.FAIL) for n in range(2, 12)])
        async with running(Tiers([Slower(redis)])) as tiers:
            engine = tiers.engine(MANIFEST)
            digests = make_digests(2)
            engine.put(digests)
            await tiers.settle()
            tiers.evict_all()
            for _ in range(3):
                await tiers.load(engine, digests)
            one = why(engine, digests)
            assert (one.verdict, one.cause, one.tier) == ("unavailable", "unavailable", REDIS)
            await asyncio.sleep(2.0)

    run(main())


# --- elsewhere ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"), [("dtype", "float16"), ("revision", "2"), ("group", "sliding")]
)
def test_what_another_namespace_has_names_the_field_that_differs(store, engine, field, value):
    other = Engine(store, make_manifest(**{field: value}))
    digests = make_digests(1)
    other.put(digests)
    one = why(engine, digests)
    assert one.cause == "other_namespace"
    assert [(each.field, each.there) for each in one.differences] == [(field, value)]


def test_what_another_tenant_has_says_so(store, engine):
    blue = Engine(store, MANIFEST, session=2)
    blue.space = store.enter(MANIFEST, "blue")
    digests = make_digests(1)
    blue.put(digests)
    one = why(engine, digests)
    assert one.cause == "other_namespace"
    assert [each.field for each in one.differences] == ["tenant"]


def test_what_is_kept_under_another_scope_says_so(engine):
    tokens = list(range(2 * CHUNK_TOKENS))
    plain = chunk_digests(tokens, CHUNK_TOKENS)
    scoped = chunk_digests(tokens, CHUNK_TOKENS, scope=scope_digest(adapter="sql"))
    engine.put(plain)
    scopes = [("itself", scoped), ("no scope", plain)]
    assert why(engine, scoped, other_scopes=scopes).cause == "other_scope"


def test_every_cause_has_a_scenario():
    text = Path(__file__).read_text(encoding="utf-8")
    assert [cause for cause in get_args(Cause) if f'"{cause}"' not in text] == []

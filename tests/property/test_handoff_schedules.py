"""Hand-offs between two stores under 200 random schedules, in virtual time, with everything going
wrong that may: no wrong byte, no wait beyond its deadline, and nothing is left behind.

The daemons are the real endpoint, pulls and hand-offs over real stores; only connections are
not real. A seed repeats a schedule exactly.
"""

from __future__ import annotations

import asyncio
import random  # noqa: TID251  # every Random here is made from a seed
from itertools import count
from types import SimpleNamespace

import pytest

from kvstore.daemon.handoffs import HandoffWait
from kvstore.daemon.peer_endpoint import PeerEndpoint
from kvstore.daemon.pulls import Pulls
from kvstore.errors import HandoffError, LimitError, TierError
from kvstore.hashing import block_digests
from kvstore.limits import MIB
from kvstore.protocol import peering as p
from kvstore.settings import ListenAddress
from kvstore.store.handoffs import HandoffKey, Handoffs
from kvstore.store.mover import Mover
from kvstore.types import HandoffState, HeadRange, ReserveOutcome, SessionId
from tests.support import virtual
from tests.support.making import make_digests, make_manifest, make_payload
from tests.support.stores import Engine, make_store

MANIFEST = make_manifest(model="schedules", layers=8)
SCHEDULES = 200
PART = 20
TTL = 5.0
PATIENCE = 30.0


class Host:
    """What of a daemon hand-offs need: a store, its sessions and its time."""

    def __init__(self, loop, capacity_bytes: int) -> None:
        self.loop = loop
        self.store = make_store(capacity_bytes=capacity_bytes)
        self.handoffs = Handoffs(self.store)
        self.tenants = SimpleNamespace(names=("",))
        self.recorder = None
        self.mover = Mover(self.store, clock=loop.time, in_thread=asyncio.to_thread)
        self.pulls = Pulls(self, {})
        self._last_session = 100

    def new_session_id(self) -> SessionId:
        self._last_session += 1
        return SessionId(self._last_session)

    def check(self) -> None:
        self.store.check()
        self.handoffs.check()

    def left_behind(self) -> tuple[int, ...]:
        store = self.store
        return (
            self.handoffs.open_count,
            self.handoffs.held_chunks,
            len(store.leases),
            len(store.reservations),
            self.pulls.count,
        )


class Way:
    """In place of a link: late, and failing before, within and behind what it carries."""

    name = "prefill"

    def __init__(self, chance: random.Random, there: Host, trouble: float) -> None:
        self._chance = chance
        self._there = there
        self._trouble = trouble
        endpoint = ListenAddress("127.0.0.1", 0)
        self._endpoint = PeerEndpoint(there, endpoint, name="prefill", token=b"", tls=None)
        self._session = there.new_session_id()
        self.is_cut = False

    async def _pass(self) -> None:
        await asyncio.sleep(self._chance.choice([0.0, 0.001, 0.05, 0.4]))
        if self.is_cut or self._chance.random() < self._trouble:
            raise TierError("the schedule says so")

    async def follow(self, request: p.Follow) -> p.Following:
        await self._pass()
        following = await self._endpoint._follow(request)
        await self._pass()
        return following

    async def leave(self, request: p.PeerLeave) -> None:
        await self._pass()
        await self._endpoint._leave(request)

    async def fetch(self, wanted, arrived):
        for number, (want, target) in enumerate(wanted):
            await self._pass()
            ready = await self._endpoint._begin(want, self._session)
            if ready is None:
                arrived(number, None)
                continue
            try:
                half = len(target) // 2
                target[:half] = ready.view[:half]
                await self._pass()
                target[half:] = ready.view[half:]
            finally:
                self._endpoint._end(self._session, ready.lease, len(target))
            arrived(number, block_digests(target))

    def close(self) -> None:
        """Nothing is open."""


class Schedule:
    """One run of a producer and some consumers, local and remote."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        loop = asyncio.get_running_loop()
        # The small one has room for seven chunks.
        self.here = Host(loop, self.chance.choice([MIB, 4 * MIB]))
        self.there = Host(loop, self.chance.choice([MIB, 4 * MIB]))
        self.way = Way(self.chance, self.there, self.chance.choice([0.0, 0.05, 0.3]))
        self.here.pulls = Pulls(self.here, {"prefill": self.way})
        self.engine = Engine(self.there.store, MANIFEST)
        self.reader = Engine(self.here.store, MANIFEST)
        self.digests = make_digests(self.chance.randint(1, 14), seed)
        self.key = HandoffKey(0, self.engine.space.id, "one")
        self.loop = loop

    async def run(self) -> None:
        remote = self.key._replace(peer="prefill")
        consumers = [(self.there, self.engine, self.key), (self.here, self.reader, remote)]
        chosen = self.chance.choice([consumers[:1], consumers[1:], consumers, []])
        async with asyncio.TaskGroup() as group:
            house = group.create_task(self._keep_house())
            work = [group.create_task(self._produce(max(1, len(chosen))))]
            work += [group.create_task(self._consume(*one)) for one in chosen]
            group.create_task(self._meddle()).add_done_callback(lambda _: None)
            await asyncio.gather(*work)
            # Whatever nobody has taken expires.
            await asyncio.sleep(60.0 + 2 * TTL)
            house.cancel()
        await self.here.pulls.close()
        for host in (self.here, self.there):
            host.store.expire(self.loop.time())
            host.check()
            assert host.left_behind() == (0, 0, 0, 0, 0)
            host.store.host.close()

    async def _pause(self) -> None:
        await asyncio.sleep(self.chance.choice([0.0, 0.0, 0.01, 0.3, 1.5]))

    async def _keep_house(self) -> None:
        for step in count():
            await asyncio.sleep(0.5)
            for host in (self.here, self.there):
                host.handoffs.expire(self.loop.time())
                host.handoffs.check()
                if step % 40 == 3:
                    host.store.check()

    async def _produce(self, consumers: int) -> None:
        await self._pause()
        handoffs, owner = self.there.handoffs, self.engine.session
        now = self.loop.time
        handoffs.open(
            owner, self.key, self.engine.space, now(), consumers=consumers, ttl_seconds=TTL
        )
        with pytest.raises(HandoffError):
            handoffs.open(
                SessionId(9), self.key, self.engine.space, now(), consumers=1, ttl_seconds=TTL
            )
        published = 0
        end = self.chance.choice(["close", "close", "abort", "lost", "silent"])
        cut = len(self.digests) if end == "close" else self.chance.randint(0, len(self.digests))
        try:
            for number in range(cut):
                if self.chance.random() < 0.5 or number >= published:
                    stop = self.chance.randint(number + 1, len(self.digests))
                    published = handoffs.publish(
                        owner, self.key, number, self.digests[number:stop], now()
                    )
                self._store(number)
                await self._pause()
            if end == "close":
                handoffs.close(owner, self.key, b"7", now())
            elif end == "abort":
                handoffs.abort(owner, self.key, now())
        except HandoffError:
            # It was over before: all its consumers had left, or it had expired.
            standing = handoffs.standing(self.key, 0, now())
            assert standing.state is not HandoffState.OPEN
        if end == "lost":
            self.there.store.end_session(owner)
            self.there.store.bury(owner)
            handoffs.end_session(owner, now())

    def _store(self, number: int) -> None:
        """Store a chunk, in one shard or in two."""
        parent = self.digests[number - 1] if number else None
        halves = [HeadRange(0, 2), HeadRange(2, 4)] if self.chance.random() < 0.3 else [None]
        for heads in halves:
            self.engine.put(self.digests[number : number + 1], parent=parent, heads=heads)

    async def _consume(self, host: Host, engine: Engine, key: HandoffKey) -> None:
        await self._pause()
        session = host.new_session_id()
        seen: list[bytes] = []
        ends_at = self.loop.time() + PATIENCE
        while self.loop.time() < ends_at:
            if key.peer:
                try:
                    host.pulls.follow(key, engine.space, early=True)
                except LimitError:
                    break
            standing = await self._await(host, key, len(seen))
            if standing is None:
                continue
            for digest in standing.digests:
                self._look_at(host, engine, digest)
            seen += standing.digests
            if standing.is_last and standing.state is not HandoffState.ABSENT:
                break
            if self.chance.random() < 0.05:
                break
            await self._pause()
        assert seen == self.digests[: len(seen)], "in order, and no others"
        if key.peer and not host.handoffs.has_left(session, key):
            host.pulls.leave(key, engine.space)
        host.handoffs.leave(session, key, self.loop.time())

    async def _await(self, host: Host, key: HandoffKey, first: int):
        """Return how the hand-off stands, by a deadline in any case."""
        seconds = self.chance.choice([0.1, 1.0, 5.0])
        answered = asyncio.Event()
        wait = HandoffWait(host.handoffs, key, answered.set)
        wait.watch(first, self.loop, seconds, early=True)
        async with asyncio.timeout(seconds + 0.001):
            await answered.wait()
        return host.handoffs.standing(key, first, self.loop.time())

    def _look_at(self, host: Host, engine: Engine, digest) -> None:
        """What is said to be ready is right, unless it has been evicted since."""
        lease, chunks = engine.load([digest])
        for shard in (shard for chunk in chunks for shard in chunk):
            expected = make_payload(digest, shard.size_bytes)
            assert bytes(host.store.host.view(shard.extent)) == expected, "a wrong byte"
        if lease:
            host.store.release(engine.session, [lease])

    async def _meddle(self) -> None:
        """Cut the way and heal it, and press both stores with other chunks."""
        for number in range(self.chance.randint(0, 3)):
            await asyncio.sleep(self.chance.uniform(0, 4))
            self.way.is_cut = self.chance.random() < 0.5
            other = self.chance.choice([self.engine, self.reader])
            places = other.reserve(make_digests(4, 10_000 + number))
            for place, digest in zip(places, make_digests(4, 10_000 + number), strict=True):
                if place.outcome is ReserveOutcome.RESERVED:
                    other.commit(digest, place)
        await asyncio.sleep(self.chance.uniform(0, 20))
        self.way.is_cut = False


@pytest.mark.parametrize("part", range(SCHEDULES // PART))
def test_under_any_schedule_nothing_is_wrong_late_or_left_behind(part):
    async def play(seed: int) -> None:
        await Schedule(seed).run()

    for seed in range(part * PART, (part + 1) * PART):
        try:
            virtual.run(play(seed))
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise

"""The guard of a slower tier: time-outs, breaker, recovery; and the meter beside it."""

from __future__ import annotations

import asyncio

import pytest

from kvstore.errors import TierError
from kvstore.limits import (
    BREAKER_PAUSE_MAX_SECONDS,
    BREAKER_PAUSE_MIN_SECONDS,
    METER_STALE_SECONDS,
    MIB,
)
from kvstore.tiers.base import Shard, ShardKey
from kvstore.tiers.fake import FakeTier, Fault
from kvstore.tiers.guard import Breaker, GuardedTier
from kvstore.tiers.meter import Meter
from kvstore.types import Digest, HeadRange, NamespaceId, Place
from tests.support.making import make_root
from tests.support.virtual import run

PAYLOAD = bytes(range(256)) * 64
SHARD = Shard(
    ShardKey(NamespaceId(b"n" * 16), Digest(b"d" * 32), HeadRange(0, 1)),
    None,
    len(PAYLOAD),
    make_root(PAYLOAD),
)
TIMEOUT_SECONDS = 0.2


class Guarded:
    """A guard over a scripted tier, and what it told."""

    def __init__(self, *script: tuple[int, Fault]) -> None:
        clock = asyncio.get_running_loop().time
        self.tier = FakeTier(MIB, script)
        self.guard = GuardedTier(self.tier, clock=clock, timeout_seconds=TIMEOUT_SECONDS)
        self.changes: list[bool] = []
        self.let_go = 0
        self.guard.on_change = lambda: self.changes.append(self.guard.is_usable)

    def count(self) -> None:
        self.let_go += 1

    async def write(self) -> Place | None:
        return await self.guard.write(SHARD, memoryview(PAYLOAD), self.count)

    async def read(self) -> bytes | None:
        target = bytearray(len(PAYLOAD))
        here = await self.guard.read(SHARD, Place(0), memoryview(target), self.count)
        return bytes(target) if here else None

    async def fail(self) -> None:
        with pytest.raises(TierError):
            await self.write()


def test_what_goes_well_is_passed_on_and_counted():
    async def main() -> None:
        guarded = Guarded()
        assert await guarded.write() is not None
        assert await guarded.read() == PAYLOAD
        assert await guarded.guard.remove(SHARD, Place(0))
        assert await guarded.read() is None
        await asyncio.sleep(0)
        counters = guarded.guard.counters
        assert (counters.write_chunks, counters.write_bytes) == (1, len(PAYLOAD))
        assert (counters.read_chunks, counters.read_chunks_gone) == (1, 1)
        assert (counters.failures, guarded.let_go, guarded.changes) == (0, 3, [])

    run(main())


def test_three_failures_open_it_and_a_probe_closes_it():
    async def main() -> None:
        guarded = Guarded(*((n, Fault.FAIL) for n in range(4)))
        probing = asyncio.create_task(guarded.guard.keep_probing())
        for _ in range(2):
            await guarded.fail()
        assert guarded.guard.is_usable
        await guarded.fail()
        assert guarded.changes == [False]
        await guarded.fail()
        assert guarded.guard.counters.refused_while_open == 1
        # The first probe fails, too; the second comes after twice the pause.
        await asyncio.sleep(3 * BREAKER_PAUSE_MIN_SECONDS + 0.01)
        assert guarded.changes == [False, True]
        assert await guarded.write() is not None
        probing.cancel()

    run(main())


def test_after_a_probe_one_failure_is_enough_until_a_call_succeeds():
    breaker = Breaker()
    for _ in range(3):
        breaker.failed(0.0, 0.0)
    breaker.probed(answered=True)
    assert not breaker.is_open
    assert breaker.failed(1.0, 1.0)
    breaker.probed(answered=True)
    breaker.succeeded()
    assert not breaker.failed(2.0, 2.0)


def test_pauses_double_up_to_a_limit_and_begin_anew_after_success():
    breaker = Breaker()
    for _ in range(3):
        breaker.failed(0.0, 0.0)
    for _ in range(20):
        breaker.probed(answered=False)
    assert breaker.pause_seconds == BREAKER_PAUSE_MAX_SECONDS
    breaker.probed(answered=True)
    breaker.succeeded()
    assert breaker.pause_seconds == BREAKER_PAUSE_MIN_SECONDS


def test_a_tier_that_is_away_when_it_is_greeted_is_left_alone_at_once():
    async def play() -> None:
        guarded = Guarded((0, Fault.FAIL))
        await guarded.guard.greet()
        assert guarded.changes == [False]
        here = Guarded((1, Fault.FAIL))
        await here.guard.greet()
        with pytest.raises(TierError):
            await here.write()
        assert here.guard.is_usable, "one failure of a tier that has answered is no trouble yet"

    run(play())


def test_a_second_of_trouble_opens_it_whatever_the_number():
    breaker = Breaker()
    assert not breaker.failed(0.0, 0.5)
    assert breaker.failed(0.4, 1.0)


def test_success_between_failures_keeps_it_closed():
    breaker = Breaker()
    for moment in range(10):
        assert not breaker.failed(float(moment), moment + 0.1)
        breaker.succeeded()


def test_a_hang_ends_in_time_and_its_memory_is_let_go_when_the_call_has_ended():
    async def main() -> None:
        guarded = Guarded((0, Fault.HANG))
        loop = asyncio.get_running_loop()
        await guarded.fail()
        assert TIMEOUT_SECONDS <= loop.time() <= TIMEOUT_SECONDS + 0.1
        assert guarded.guard.counters.timeouts == 1
        await asyncio.sleep(0.01)
        assert guarded.let_go == 1

    run(main())


def test_a_tier_that_does_not_obey_keeps_its_memory_until_it_does():
    class Stubborn(FakeTier):
        async def write(self, shard, source):
            ended = asyncio.get_running_loop().create_task(asyncio.sleep(5.0))
            try:
                await asyncio.shield(ended)
            except asyncio.CancelledError:
                await ended
                raise
            return Place(0)

    async def main() -> None:
        guarded = Guarded()
        guarded.guard = GuardedTier(
            Stubborn(MIB),
            clock=asyncio.get_running_loop().time,
            timeout_seconds=TIMEOUT_SECONDS,
        )
        await guarded.fail()
        await asyncio.sleep(1.0)
        assert guarded.let_go == 0
        await asyncio.sleep(5.0)
        assert guarded.let_go == 1

    run(main())


def test_an_error_that_no_tier_should_raise_is_a_tier_error():
    class Broken(FakeTier):
        async def find(self, namespace, digests):
            raise ZeroDivisionError

    async def main() -> None:
        clock = asyncio.get_running_loop().time
        guard = GuardedTier(Broken(MIB), clock=clock)
        with pytest.raises(TierError, match="ZeroDivisionError"):
            await guard.find(SHARD.key.namespace, [SHARD.key.digest])

    run(main())


# --- the meter --------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_meter_that_has_seen_nothing_expects_nothing():
    meter = Meter(Clock())
    assert (meter.bytes_per_second, meter.call_seconds) == (0.0, 0.0)
    assert meter.expected_seconds(MIB, 1) == 0.0


def test_bandwidth_counts_only_the_time_in_which_something_is_under_way():
    clock = Clock()
    meter = Meter(clock)
    for _ in range(10):
        began = meter.begin()
        clock.now += 0.1
        meter.end(began, MIB)
        clock.now += 5.0
    assert meter.bytes_per_second == pytest.approx(10 * MIB, rel=0.01)
    assert meter.expected_seconds(100 * MIB, 100) == pytest.approx(10.0, rel=0.01)
    assert meter.expected_seconds(1024, 1) == pytest.approx(0.1, rel=0.01)


def test_calls_side_by_side_add_up():
    clock = Clock()
    meter = Meter(clock)
    began = [meter.begin() for _ in range(4)]
    clock.now += 0.1
    for one in began:
        meter.end(one, MIB)
    assert meter.bytes_per_second == pytest.approx(40 * MIB, rel=0.05)
    assert meter.call_seconds == pytest.approx(0.1)


def test_a_tier_that_turns_slow_is_soon_known_to_be():
    clock = Clock()
    meter = Meter(clock)
    for seconds in [0.01] * 50 + [1.0] * 10:
        began = meter.begin()
        clock.now += seconds
        meter.end(began, MIB)
    assert meter.bytes_per_second < 1.2 * MIB


def test_what_was_measured_long_ago_is_no_reason_to_decline():
    clock = Clock()
    meter = Meter(clock)
    began = meter.begin()
    clock.now += 10.0
    meter.end(began, MIB)
    assert meter.expected_seconds(MIB, 1) == pytest.approx(10.0)
    clock.now += METER_STALE_SECONDS + 1.0
    assert meter.expected_seconds(MIB, 1) == 0.0

"""The lanes of one tier: which are idle, which work for whom, and how all of it ends in time.

Decisions are made on the event loop; threads only move bytes. Before a cancelled call returns,
its thread has let go of the caller's memory.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from enum import Enum, auto
from typing import Final, TypeVar

import redis

from kvstore.limits import REDIS_SPEED_MIN_BYTES_PER_SECOND
from kvstore.tiers.redis_url import Address
from kvstore.tiers.redis_wire import Lane, LaneError, LaneTimeoutError
from kvstore.transfer.settling import settle

Result = TypeVar("Result")

_SMALL_LANES: Final = 2


class Errand(Enum):
    """What a lane is wanted for. None of these ever waits behind another."""

    LOAD = auto()
    STORE = auto()
    SMALL = auto()


class Budget:
    """The time one call has, not counting how long it waits for a lane to become free."""

    def __init__(self, timeout_seconds: float, size_bytes: int = 0) -> None:
        moving = size_bytes / REDIS_SPEED_MIN_BYTES_PER_SECOND
        self.ends_at = time.monotonic() + timeout_seconds + moving

    @property
    def left_seconds(self) -> float:
        """What is left, 0 or more."""
        return max(0.0, self.ends_at - time.monotonic())

    def extend(self, seconds: float) -> None:
        """Give back time that was spent waiting for others."""
        self.ends_at += seconds


class LanePool:
    """At most *width* lanes that load, as many that store, and two for small commands.

    *dial* makes a lane and blocks; it may take *timeout_seconds*.
    """

    def __init__(
        self, dial: Callable[[Address], Lane], *, width: int, timeout_seconds: float
    ) -> None:
        self._dial = dial
        self._timeout_seconds = timeout_seconds
        widths = {Errand.LOAD: width, Errand.STORE: width, Errand.SMALL: _SMALL_LANES}
        self._gates = {errand: asyncio.Semaphore(size) for errand, size in widths.items()}
        self._threads = ThreadPoolExecutor(sum(widths.values()), "kvstore-redis")
        # Apart: name resolution cannot be interrupted, and must not hold up anything else.
        self._dialers = ThreadPoolExecutor(sum(widths.values()), "kvstore-redis-dial")
        self._idle: defaultdict[Address, list[Lane]] = defaultdict(list)
        self._busy: set[Lane] = set()
        self._stalls: Counter[Address] = Counter()
        self._is_closed = False
        self.dialed = 0

    async def run(
        self,
        address: Address,
        work: Callable[[Lane], Result],
        budget: Budget,
        errand: Errand = Errand.SMALL,
    ) -> Result:
        """Return what *work* does with a lane to *address*, in a thread.

        *work* may be begun a second time when a lane that was idle turns out to be dead.
        Raises `LaneError`. A call that waited for its turn while the server was silent to
        others fails at once.
        """
        stalls, since = self._stalls[address], time.monotonic()
        async with self._gates[errand]:
            budget.extend(time.monotonic() - since)
            if self._stalls[address] != stalls:
                raise LaneTimeoutError(f"{address} did not answer others meanwhile")
            try:
                return await self._run(address, work, budget)
            except LaneTimeoutError:
                self._stalls[address] += 1
                self.forget(address)
                raise
            except asyncio.CancelledError:
                # It may have been for want of an answer: what is idle would answer no better.
                self.forget(address)
                raise

    async def _run(
        self, address: Address, work: Callable[[Lane], Result], budget: Budget
    ) -> Result:
        idle = self._take_idle(address)
        if idle is not None:
            try:
                return await self._use(idle, address, work, budget)
            except LaneTimeoutError:
                raise
            except LaneError:
                # The server has gone or restarted since: nothing idle is worth anything.
                self.forget(address)
        return await self._use(await self._connect(address, budget), address, work, budget)

    def forget(self, address: Address) -> None:
        """Close the idle lanes to *address*."""
        for lane in self._idle.pop(address, []):
            lane.close()

    def close(self) -> None:
        """End everything that is under way, and close all lanes. Idempotent."""
        self._is_closed = True
        for address in list(self._idle):
            self.forget(address)
        for lane in self._busy:
            lane.abort()
        self._threads.shutdown(wait=False)
        self._dialers.shutdown(wait=False)

    def _take_idle(self, address: Address) -> Lane | None:
        lanes = self._idle[address]
        while lanes:
            lane = lanes.pop()
            if lane.is_quiet():
                return lane
            lane.close()
        return None

    async def _connect(self, address: Address, budget: Budget) -> Lane:
        if self._is_closed:
            raise LaneError("the tier is closed")
        loop = asyncio.get_running_loop()
        dialing = loop.run_in_executor(self._dialers, self._dial, address)
        self.dialed += 1
        try:
            async with asyncio.timeout(min(self._timeout_seconds, budget.left_seconds)):
                return await asyncio.shield(dialing)
        except redis.TimeoutError as error:
            raise LaneTimeoutError(f"{address}: {error}") from error
        except TimeoutError:
            dialing.add_done_callback(_hang_up)
            raise LaneTimeoutError(f"{address}: no connection in time") from None
        except (redis.RedisError, OSError, UnicodeError) as error:
            raise LaneError(f"{address}: {error}") from error
        except asyncio.CancelledError:
            dialing.add_done_callback(_hang_up)
            raise

    async def _use(
        self, lane: Lane, address: Address, work: Callable[[Lane], Result], budget: Budget
    ) -> Result:
        lane.begin(budget.ends_at)
        self._busy.add(lane)
        try:
            working = asyncio.get_running_loop().run_in_executor(self._threads, work, lane)
            try:
                return await asyncio.shield(working)
            except asyncio.CancelledError:
                lane.abort()
                await settle(working)
                raise
        except LaneTimeoutError as error:
            raise LaneTimeoutError(f"{address}: {error}") from error
        except LaneError as error:
            raise LaneError(f"{address}: {error}") from error
        finally:
            self._busy.discard(lane)
            if lane.is_broken or self._is_closed:
                lane.close()
            else:
                self._idle[address].append(lane)


def _hang_up(dialing: asyncio.Future[Lane]) -> None:
    """Close a connection that nobody waits for any more."""
    if not dialing.cancelled() and dialing.exception() is None:
        dialing.result().close()

"""The way to the server that has a key: lanes, redirections, and asking around."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from kvstore.limits import REDIS_REDIRECTS_MAX
from kvstore.tiers.redis_counters import RedisCounters
from kvstore.tiers.redis_dial import connect
from kvstore.tiers.redis_lanes import Budget, Errand, LanePool
from kvstore.tiers.redis_records import Stripe
from kvstore.tiers.redis_servers import make_servers, target_of
from kvstore.tiers.redis_settings import RedisSettings
from kvstore.tiers.redis_steps import Asked, RefusedError
from kvstore.tiers.redis_url import Address, Form
from kvstore.tiers.redis_wire import Command, Lane, LaneError, Reply, ReplyError, is_ask

Result = TypeVar("Result")


class Routes:
    """Runs jobs on the servers of *settings*, and knows which server has which key.

    Loads have *width* lanes, stores as many.
    """

    def __init__(self, settings: RedisSettings, counters: RedisCounters, *, width: int = 1) -> None:
        self._settings = settings
        self._counters = counters
        timeout = settings.timeout_seconds
        self.lanes = LanePool(self._dial, width=width, timeout_seconds=timeout)
        self._sentinels = LanePool(self._dial_sentinel, width=1, timeout_seconds=timeout)
        self.servers = make_servers(settings.url, self._ask)

    def close(self) -> None:
        """Break off what is under way and close all connections. Idempotent."""
        self.lanes.close()
        self._sentinels.close()

    async def distrust(self, key: bytes) -> None:
        """Let the next job for *key* use a connection that nobody has used before."""
        self.lanes.forget(await self.servers.home(key))

    async def at_home(
        self,
        key: bytes,
        job: Callable[[Lane], Result],
        budget: Budget,
        errand: Errand = Errand.SMALL,
    ) -> Result:
        """Return what *job* does at the server of *key*, following redirections."""
        address = await self.servers.home(key)
        for attempt in range(REDIS_REDIRECTS_MAX + 1):
            try:
                return await self.lanes.run(address, job, budget, errand)
            except RefusedError as refused:
                word = refused.reply.word
                is_last = attempt == REDIS_REDIRECTS_MAX
                if word == "MOVED" and not is_last:
                    address = self.redirected(refused.reply, address, key)
                elif word == "READONLY" and attempt == 0:
                    # The server has become a replica.
                    self.servers.suspect()
                    address = await self.servers.home(key)
                else:
                    raise
        raise AssertionError("the last attempt returns or raises")

    def redirected(self, reply: ReplyError, asked: Address, key: bytes) -> Address:
        """Return where *reply*, given by *asked*, sends us; remember it if it is final."""
        self._counters.redirects += 1
        target = target_of(reply, asked)
        if not is_ask(reply):
            self.servers.moved(key, target)
        return target

    def elsewhere(self, left: Sequence[Asked]) -> dict[Address, list[Stripe]]:
        """Group what is left of a shard by the node that has to be asked for it."""
        groups: dict[Address, list[Stripe]] = {}
        nobody = Address("", 0)
        for stripe, reply in left:
            groups.setdefault(self.redirected(reply, nobody, stripe.name), []).append(stripe)
        return groups

    async def _ask(self, address: Address, command: Command) -> Reply:
        """Ask a sentinel, or a node about its cluster."""
        pool = self._sentinels if self._settings.url.form is Form.SENTINEL else self.lanes
        (reply,) = await pool.run(
            address,
            partial(call, commands=[command]),
            Budget(self._settings.timeout_seconds),
        )
        if isinstance(reply, ReplyError):
            raise LaneError(f"{address}: {reply}")
        return reply

    def _dial(self, address: Address) -> Lane:
        return connect(address, self._settings.access())

    def _dial_sentinel(self, address: Address) -> Lane:
        """Connect to a sentinel; it may have the servers' password, or none."""
        access = self._settings.access(with_password=False)._replace(database=0)
        lane = connect(address, access)
        lane.begin(time.monotonic() + access.timeout_seconds)
        (answer,) = lane.call([(b"PING",)])
        if isinstance(answer, ReplyError) and answer.word == "NOAUTH":
            lane.close()
            return connect(address, self._settings.access()._replace(database=0))
        return lane


def call(lane: Lane, commands: Sequence[Command]) -> list[Reply]:
    """Send *commands* and return their replies, errors among them."""
    return lane.call(commands)

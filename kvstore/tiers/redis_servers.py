"""Which server has a key: always the same one, a sentinels' master, or a node of a cluster.

What is known here may be out of date at any time. Servers say so (`MOVED`, `READONLY`) or do
not answer; then it is asked for again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Protocol, TypeVar

import redis
from redis.cluster import parse_cluster_slots
from redis.crc import key_slot

from kvstore.tiers.redis_url import Address, Form, RedisUrl
from kvstore.tiers.redis_wire import Command, LaneError, Reply, ReplyError

Answer = TypeVar("Answer")
Ask = Callable[[Address, Command], Awaitable[Reply]]
"""Returns what a server answers to one command; raises `LaneError`."""

_ASKED_AT_ONCE: Final = 8


class Servers(Protocol):
    """Finds the server of a key."""

    async def home(self, key: bytes) -> Address:
        """Return where *key* is now, asking around if need be; raises `LaneError`."""

    def suspect(self) -> None:
        """Trust nothing that is known: ask again before the next use."""

    def moved(self, key: bytes, address: Address) -> None:
        """Take note that *key*, and what shares its slot, is at *address*."""


def make_servers(url: RedisUrl, ask: Ask) -> Servers:
    """Return what finds the servers of *url*; *ask* reaches sentinels, or nodes."""
    if url.form is Form.SENTINEL:
        return SentinelServers(url.seeds, url.service, ask)
    if url.form is Form.CLUSTER:
        return ClusterServers(url.seeds, ask)
    return OneServer(url.seeds[0])


class OneServer:
    """One server for all keys."""

    def __init__(self, address: Address) -> None:
        self._address = address

    async def home(self, key: bytes) -> Address:
        """Return the server."""
        return self._address

    def suspect(self) -> None:
        """Do nothing: there is no other."""

    def moved(self, key: bytes, address: Address) -> None:
        """Refuse: one server keeps everything, or it is a node of a cluster."""
        raise LaneError(
            f"{self._address} is a node of a cluster: write redis+cluster:// in the url"
        )


class SentinelServers:
    """The master of *service*, as the sentinels see it."""

    def __init__(self, sentinels: Sequence[Address], service: str, ask: Ask) -> None:
        self._sentinels = sentinels
        self._service = service
        self._ask = ask
        self._master: Address | None = None
        self._asking = asyncio.Lock()

    async def home(self, key: bytes) -> Address:
        """Return the master."""
        async with self._asking:
            if self._master is None:
                self._master = await first_answer(self._sentinels, self._master_of)
            return self._master

    def suspect(self) -> None:
        """Ask the sentinels before the next use."""
        self._master = None

    def moved(self, key: bytes, address: Address) -> None:
        """Refuse: sentinels watch no clusters."""
        raise LaneError(f"{address} is a node of a cluster: write redis+cluster:// in the url")

    async def _master_of(self, sentinel: Address) -> Address:
        command = (b"SENTINEL", b"GET-MASTER-ADDR-BY-NAME", self._service.encode())
        match await self._ask(sentinel, command):
            case [bytes() as host, bytes() as port] if port.isdigit():
                return Address(host.decode(), int(port))
            case None:
                raise LaneError(f"the sentinel {sentinel} knows no master {self._service!r}")
            case answer:
                raise LaneError(f"the sentinel {sentinel} answers {answer!r:.200}")


class ClusterServers:
    """The masters of a cluster, by slot."""

    def __init__(self, seeds: Sequence[Address], ask: Ask) -> None:
        self._seeds = seeds
        self._ask = ask
        self._slots: dict[int, Address] = {}
        self._is_suspect = True
        self._asking = asyncio.Lock()

    async def home(self, key: bytes) -> Address:
        """Return the master of the slot of *key*."""
        if self._is_suspect:
            await self._learn()
        slot = key_slot(key)
        if slot not in self._slots:
            self._is_suspect = True
            raise LaneError(f"no node of the cluster serves slot {slot}")
        return self._slots[slot]

    def suspect(self) -> None:
        """Ask the cluster before the next use."""
        self._is_suspect = True

    def moved(self, key: bytes, address: Address) -> None:
        """Use *address* for this slot, and ask for the others before the next use."""
        self._slots[key_slot(key)] = address
        self._is_suspect = True

    async def _learn(self) -> None:
        async with self._asking:
            if not self._is_suspect:
                return
            known = dict.fromkeys([*self._slots.values(), *self._seeds])
            self._slots = await first_answer(list(known), self._slots_of)
            self._is_suspect = False

    async def _slots_of(self, node: Address) -> dict[int, Address]:
        answer = await self._ask(node, (b"CLUSTER", b"SLOTS"))
        if not isinstance(answer, list):
            raise LaneError(f"{node} answers {answer!r:.200}")
        try:
            runs = parse_cluster_slots(answer, current_host=node.host)
            return {
                slot: Address(str(run["primary"][0]), int(run["primary"][1]))
                for (first, last), run in runs.items()
                for slot in range(first, last + 1)
            }
        except (redis.RedisError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise LaneError(f"{node} describes no cluster: {error}") from error


async def first_answer(
    addresses: Sequence[Address], ask: Callable[[Address], Awaitable[Answer]]
) -> Answer:
    """Return the first good answer of several servers that are asked at once.

    One that is dead or silent delays nothing. Raises `LaneError` when none answers.
    """
    problems: list[str] = []
    asking = [asyncio.ensure_future(ask(address)) for address in addresses[:_ASKED_AT_ONCE]]
    try:
        for answer in asyncio.as_completed(asking):
            try:
                return await answer
            except LaneError as error:
                problems.append(str(error))
    finally:
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
    raise LaneError("; ".join(problems))


def target_of(redirection: ReplyError, asked: Address) -> Address:
    """Return where `MOVED slot host:port` or `ASK slot host:port` points to."""
    words = str(redirection).split(" ")
    host, colon, port = words[2].rpartition(":") if len(words) > 2 else ("", "", "")
    if not colon or not port.isdigit():
        raise LaneError(f"{asked} answers {redirection!s:.200}")
    # No host means the one that was asked.
    return Address(host or asked.host, int(port))

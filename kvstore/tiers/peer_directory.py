"""The directory of what hosts hold: sets in Redis, one for each host and namespace.

Members are the first bytes of digests. A set ends by itself when its host has not renewed it:
nobody has to clean up behind a host that is gone. What stands here is a hint where to ask and
nothing else: no addresses, no sizes, and only the sets of daemons that one knows are looked at.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from functools import partial
from typing import Final

from kvstore.errors import TierError
from kvstore.limits import DIRECTORY_MEMBER_BYTES, DIRECTORY_TTL_SECONDS
from kvstore.tiers.redis_counters import RedisCounters
from kvstore.tiers.redis_lanes import Budget
from kvstore.tiers.redis_routes import Routes, call
from kvstore.tiers.redis_settings import RedisSettings
from kvstore.tiers.redis_steps import RefusedError
from kvstore.tiers.redis_url import Address
from kvstore.tiers.redis_wire import Command, LaneError, Reply, ReplyError
from kvstore.types import Digest, NamespaceId

log = logging.getLogger(__name__)

# Another node has the key: that is known from now on, and asked there the next time.
_ELSEWHERE: Final = frozenset({"MOVED", "ASK"})
# Some other program's value, or none of ours any more.
_FOREIGN: Final = frozenset({"WRONGTYPE"})


class Directory:
    """Reads and writes the sets. Every call ends within the time-out of the settings.

    All raise `TierError` when the servers cannot be asked, or do not take what they are told.
    """

    def __init__(self, settings: RedisSettings) -> None:
        self._settings = settings
        self._ttl = b"%d" % round(DIRECTORY_TTL_SECONDS * 1000)
        self._routes = Routes(settings, RedisCounters())

    def close(self) -> None:
        """Break off what is under way and close all connections. Idempotent."""
        self._routes.close()

    async def probe(self) -> None:
        """Ask a server whether it is there."""
        await self._call([(b"", (b"PING",))])

    async def holders(
        self, namespace: NamespaceId, digests: Sequence[Digest], names: Sequence[str]
    ) -> list[list[bool]]:
        """Return for each of *names* whether it says that it holds each of *digests*.

        One command for each name, all at once. What stands on a node that has just taken a key
        over, or is no set, counts as nothing.
        """
        members = [_member(digest) for digest in digests]
        commands = [
            (key, (b"SMISMEMBER", key, *members))
            for key in (self._key(namespace, name) for name in names)
        ]
        rows: list[list[bool]] = []
        for reply in await self._call(commands, tolerated=_ELSEWHERE | _FOREIGN):
            row = [it == 1 for it in reply] if isinstance(reply, list) else []
            rows.append(row if len(row) == len(members) else [False] * len(members))
        return rows

    async def change(
        self,
        namespace: NamespaceId,
        name: str,
        came: Sequence[Digest],
        went: Sequence[Digest],
    ) -> int:
        """Say that *name* holds *came*, and does not hold *went* any more.

        Returns by how much its set has grown: what stood there already does not count.
        """
        key = self._key(namespace, name)
        commands: list[tuple[bytes, Command]] = []
        if came:
            commands.append((key, (b"SADD", key, *map(_member, came))))
        if went:
            commands.append((key, (b"SREM", key, *map(_member, went))))
        counts = [reply for reply in await self._call(commands) if isinstance(reply, int)]
        if came:
            # Not at once with it: what another program has put there is not ours to prolong.
            await self._call([(key, (b"PEXPIRE", key, self._ttl))])
        added = counts.pop(0) if came and counts else 0
        return added - sum(counts)

    async def renew(self, namespaces: Sequence[NamespaceId], name: str) -> list[int]:
        """Let what *name* holds stand for longer; return for each namespace how much stands."""
        keys = [self._key(namespace, name) for namespace in namespaces]
        sizes = await self._sizes(keys)
        replies = await self._call([(key, (b"PEXPIRE", key, self._ttl)) for key in sizes])
        standing = {key for key, reply in zip(sizes, replies, strict=True) if reply == 1}
        return [sizes[key] if key in standing else 0 for key in keys]

    async def withdraw(self, namespaces: Sequence[NamespaceId], name: str) -> None:
        """Say that *name* holds nothing."""
        sizes = await self._sizes([self._key(namespace, name) for namespace in namespaces])
        await self._call([(key, (b"UNLINK", key)) for key in sizes])

    async def _sizes(self, keys: Sequence[bytes]) -> dict[bytes, int]:
        """Return how large those of *keys* are that are sets: no others are ours to touch."""
        replies = await self._call([(key, (b"SCARD", key)) for key in keys], tolerated=_FOREIGN)
        return {
            key: reply
            for key, reply in zip(keys, replies, strict=True)
            if isinstance(reply, int) and reply > 0
        }

    def _key(self, namespace: NamespaceId, name: str) -> bytes:
        return f"{self._settings.prefix}:{namespace.hex()}:held:{name}".encode()

    async def _call(
        self,
        commands: Sequence[tuple[bytes, Command]],
        tolerated: frozenset[str] = frozenset(),
    ) -> list[Reply]:
        """Return what the servers answer to *commands*, each with its key, in their order.

        Refusals are errors unless their first word is *tolerated*.
        """
        try:
            replies = await self._ask(commands)
        except asyncio.CancelledError:
            self._routes.servers.suspect()
            raise
        except (LaneError, RefusedError) as error:
            self._routes.servers.suspect()
            raise TierError(f"directory: {error}") from error
        for reply in replies:
            if isinstance(reply, ReplyError) and reply.word not in tolerated:
                raise TierError(f"directory: {reply}")
        return replies

    async def _ask(self, commands: Sequence[tuple[bytes, Command]]) -> list[Reply]:
        budget = Budget(self._settings.timeout_seconds)
        by_server: dict[Address, list[int]] = {}
        for position, (key, _) in enumerate(commands):
            by_server.setdefault(await self._routes.servers.home(key), []).append(position)
        answered: dict[int, Reply] = {}
        for address, positions in by_server.items():
            job = partial(call, commands=[commands[position][1] for position in positions])
            for position, reply in zip(
                positions, await self._routes.lanes.run(address, job, budget), strict=True
            ):
                answered[position] = reply
                self._note(reply, address, commands[position][0])
        return [answered[position] for position in range(len(commands))]

    def _note(self, reply: Reply, asked: Address, key: bytes) -> None:
        """Remember what a refusal says about where things are."""
        if not isinstance(reply, ReplyError):
            return
        if reply.word in _ELSEWHERE:
            self._routes.redirected(reply, asked, key)
        elif reply.word == "READONLY":
            self._routes.servers.suspect()


def _member(digest: Digest) -> bytes:
    return digest[:DIRECTORY_MEMBER_BYTES]

"""The Redis tier: shards that every host of a fleet shares, in Redis or Valkey.

docs/redis.md has the layout of the keys and what happens when. A server that is gone, full,
loading, failing over or lying is a normal event: calls end in bounded time with a miss or
`TierError`, and the next ones find it again by themselves.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from kvstore.errors import TierError
from kvstore.hashing import Digests64, root_of
from kvstore.limits import KEYS_PER_REQUEST_MAX, REDIS_REDIRECTS_MAX
from kvstore.tiers import redis_steps as steps
from kvstore.tiers.base import Recovered, Shard, TierUsage
from kvstore.tiers.redis_counters import RedisCounters
from kvstore.tiers.redis_lanes import Budget, Errand
from kvstore.tiers.redis_records import Names
from kvstore.tiers.redis_routes import Routes, call
from kvstore.tiers.redis_settings import Pace, RedisSettings, check_settings
from kvstore.tiers.redis_steps import Asked, Plan, Presence, RefusedError
from kvstore.tiers.redis_url import Address
from kvstore.tiers.redis_wire import (
    Fetched,
    Lane,
    LaneError,
    LaneTimeoutError,
    Reply,
    ReplyError,
    Target,
    is_ask,
)
from kvstore.types import Digest, NamespaceId, Place, TierKind

log = logging.getLogger(__name__)

Result = TypeVar("Result")

# The name of a key says where it is.
_PLACE: Final = Place(0)
_MANIFEST_INTERVAL_MAX_SECONDS: Final = 3600.0

# Refusals after which another server may be the right one, or the same one soon.
_ELSEWHERE: Final = frozenset({"MOVED", "READONLY", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN"})


async def open_redis_tier(
    url: str,
    *,
    password_file: Path | None = None,
    ca_file: Path | None = None,
    prefix: str = "kvstore",
    ttl_seconds: float = 7 * 24 * 3600.0,
    connections: int = 4,
    timeout_seconds: float = 1.0,
) -> RedisTier:
    """Return a tier over the servers of *url*; it takes at most *timeout_seconds* per server.

    A server that cannot be reached is said so in the log, and tried again with every call.
    Raises `ConfigError` for what no waiting would mend.
    """
    settings = check_settings(
        url,
        password_file=password_file,
        ca_file=ca_file,
        prefix=prefix,
        ttl_seconds=ttl_seconds,
        connections=connections,
        timeout_seconds=timeout_seconds,
    )
    tier = RedisTier(settings)
    await tier.greet()
    return tier


class RedisTier:
    """Keeps shards in Redis. It never decides to forget; the server does, by policy and time."""

    kind: Final = TierKind.REDIS

    def __init__(self, settings: RedisSettings, *, pace: Pace | None = None) -> None:
        self.counters = RedisCounters()
        self._settings = settings
        self._names = Names(settings.prefix)
        self._pace = pace or settings.pace
        self._ttl_ms = round(settings.ttl_seconds * 1000)
        self._routes = Routes(settings, self.counters, width=self._pace.lanes)
        self._manifests: dict[NamespaceId, bytes] = {}
        self._manifests_due: dict[NamespaceId, float] = {}
        self._is_failing = False

    def usage(self) -> TierUsage:
        """Return zeros: how much room there is, and for whom, is the server's to know.

        What this daemon has put or found there is counted by its store.
        """
        return TierUsage(0, 0, 0)

    def close(self) -> None:
        """Break off what is under way and close all connections. Idempotent."""
        self._routes.close()

    async def greet(self) -> bool:
        """Return whether the servers answer; log it when they do not."""
        try:
            await self.probe()
        except TierError:
            return False
        return True

    # --- promises of a shared tier ---------------------------------------------------------

    async def write(self, shard: Shard, source: memoryview) -> Place | None:
        """Keep a copy of *source*, unless the same is there already; None without room."""
        plan, budget = self._plan(shard), self._budget(shard.size_bytes)
        plan = plan._replace(window=self._pace.store_window)
        with self._reported("write"):
            await self._keep_manifest(shard.key.namespace, budget)
            try:
                presence = await self._write(plan, source, budget)
            except RefusedError as refused:
                if refused.reply.word not in {"OOM", "WRONGTYPE"}:
                    raise
                await self._give_up(plan, refused.reply)
                return None
        self.counters.already_there += presence is Presence.PRESENT
        self.counters.foreign += presence is Presence.FOREIGN
        self.counters.newer += presence is Presence.NEWER
        if presence in {Presence.FOREIGN, Presence.NEWER}:
            log.warning(
                "redis shard not written", extra={"reason": presence.name, "key": shard.key.digest}
            )
            return None
        return _PLACE

    async def read(
        self, shard: Shard, place: Place, target: memoryview, table: Digests64 | None = None
    ) -> bool:
        """Fill *target* with *shard*, checked; what fails the check twice is removed."""
        into = Target.over(target, table)
        plan, budget = self._plan(shard), self._budget(shard.size_bytes)
        with self._reported("read"):
            worst = await self._read(plan, into, budget)
            if worst is Fetched.DAMAGED:
                # It may be the connection that lies: only a second one can accuse the server.
                await self._routes.distrust(plan.meta)
                worst = await self._read(plan, into, self._budget(shard.size_bytes))
            if worst is Fetched.HERE:
                return True
        await self._clear_away(plan, worst)
        return False

    async def remove(self, shard: Shard, place: Place) -> bool:
        """Remove *shard* for all hosts; return whether it was here."""
        plan = self._plan(shard)
        with self._reported("remove"):
            return await self._routes.at_home(
                plan.meta, partial(steps.withdraw, plan=plan), self._budget()
            )

    async def introduce(self, namespace: NamespaceId, manifest: bytes) -> None:
        """Keep *manifest* now and for as long as shards of its namespace are written here."""
        self._manifests[namespace] = manifest
        self._manifests_due[namespace] = 0.0
        with self._reported("introduce"):
            await self._keep_manifest(namespace, self._budget())

    async def find(
        self, namespace: NamespaceId, digests: Sequence[Digest]
    ) -> list[list[Recovered]]:
        """Return the shards of each digest: one round trip to each node for some thousand.

        What lies on a node that fails is missed; when all that were asked do, the call fails.
        """
        found: list[list[Recovered]] = []
        with self._reported("find"):
            for start in range(0, len(digests), KEYS_PER_REQUEST_MAX):
                batch = digests[start : start + KEYS_PER_REQUEST_MAX]
                found += await self._find(namespace, batch)
        return found

    async def probe(self) -> None:
        """Ask the server that would be asked first whether it is there."""
        with self._reported("probe"):
            await self._routes.at_home(b"", steps.ping, self._budget())

    async def manifest(self, namespace: NamespaceId) -> bytes | None:
        """Return the manifest that some host has introduced, unchecked, if there is one."""
        name = self._names.manifest(namespace)
        with self._reported("manifest"):
            (reply,) = await self._routes.at_home(
                name, partial(call, commands=[(b"GET", name)]), self._budget()
            )
        return reply if isinstance(reply, bytes) else None

    # --- how -------------------------------------------------------------------------------

    def _plan(self, shard: Shard) -> Plan:
        return Plan.of(shard, self._names, ttl_ms=self._ttl_ms, window=self._pace.window)

    def _budget(self, size_bytes: int = 0) -> Budget:
        return Budget(self._settings.timeout_seconds, size_bytes)

    async def _write(self, plan: Plan, source: memoryview, budget: Budget) -> Presence:
        lanes = min(self._pace.lanes, len(plan.stripes))
        if lanes == 1:
            job = partial(steps.put, plan=plan, source=source)
            done = await self._routes.at_home(plan.meta, job, budget, Errand.STORE)
            presence, left, is_published = done
            if is_published or presence is not Presence.ABSENT:
                return presence
        else:
            job_check = partial(steps.check, plan=plan)
            presence = await self._routes.at_home(plan.meta, job_check, budget)
            if presence is not Presence.ABSENT:
                return presence
            parts = [plan.stripes[lane::lanes] for lane in range(lanes)]
            jobs = [partial(steps.store, plan=plan, stripes=part, source=source) for part in parts]
            met = await self._at_once(jobs, plan, budget, Errand.STORE)
            left = [asked for part in met for asked in part]
        for address, stripes in self._routes.elsewhere(left).items():
            job_asking = partial(
                steps.store, plan=plan, stripes=stripes, source=source, asking=True
            )
            _refuse_left(await self._routes.lanes.run(address, job_asking, budget, Errand.STORE))
        await self._publish(plan, budget)
        return presence

    async def _at_once(
        self,
        jobs: Sequence[Callable[[Lane], Result]],
        plan: Plan,
        budget: Budget,
        errand: Errand,
    ) -> list[Result]:
        """Run *jobs* at the server of *plan*, each on a lane."""
        home = self._routes.at_home
        return await _together([home(plan.meta, job, budget, errand) for job in jobs])

    async def _publish(self, plan: Plan, budget: Budget) -> None:
        elsewhere = await self._routes.at_home(plan.meta, partial(steps.publish, plan=plan), budget)
        if elsewhere is not None:
            (address,) = self._routes.elsewhere([Asked(plan.stripes[0], elsewhere)])
            job = partial(steps.publish, plan=plan, asking=True)
            elsewhere = await self._routes.lanes.run(address, job, budget)
            if elsewhere is not None:
                raise RefusedError(elsewhere)

    async def _give_up(self, plan: Plan, reply: ReplyError) -> None:
        """Count a shard that cannot be kept, and take back what is there of it."""
        if reply.word == "OOM":
            self.counters.full += 1
        else:
            self.counters.foreign += 1
        await self._routes.at_home(plan.meta, partial(steps.withdraw, plan=plan), self._budget())

    async def _read(self, plan: Plan, into: Target, budget: Budget) -> Fetched:
        """Fetch all stripes; return HERE when all are right, else what is wrong."""
        if len(into.view) != plan.shard.size_bytes:
            raise TierError(
                f"a target of {len(into.view)} bytes for a shard of {plan.shard.size_bytes}"
            )
        lanes = min(self._pace.lanes, len(plan.stripes))
        jobs = [
            partial(steps.fetch, plan=plan, stripes=plan.stripes[lane::lanes], target=into)
            for lane in range(lanes)
        ]
        parts = await self._at_once(jobs, plan, budget, Errand.LOAD)
        met = [it for fetched, _ in parts for it in fetched]
        asked = [it for _, left in parts for it in left]
        for address, stripes in self._routes.elsewhere(asked).items():
            job = partial(steps.fetch, plan=plan, stripes=stripes, target=into, asking=True)
            fetched, left = await self._routes.lanes.run(address, job, budget, Errand.LOAD)
            _refuse_left(left)
            met += fetched
        worst = max(met, key=_GRAVITY.index)
        if worst is Fetched.HERE and root_of(into.digests) != plan.shard.root:
            return Fetched.DAMAGED
        return worst

    async def _clear_away(self, plan: Plan, worst: Fetched) -> None:
        """Count a shard that cannot be read; spare other hosts one that is gone or damaged."""
        shard = plan.shard
        if worst is Fetched.FOREIGN or worst is Fetched.NEWER:
            self.counters.foreign += worst is Fetched.FOREIGN
            self.counters.newer += worst is Fetched.NEWER
            log.warning(
                "redis shard not readable", extra={"reason": worst.name, "key": shard.key.digest}
            )
        elif worst is Fetched.DAMAGED:
            self.counters.quarantined += 1
            log.warning(
                "redis shard quarantined", extra={"reason": "checksum", "key": shard.key.digest}
            )
            await self.remove(shard, _PLACE)
        elif worst is Fetched.ABSENT and await self.remove(shard, _PLACE):
            self.counters.vanished += 1

    async def _keep_manifest(self, namespace: NamespaceId, budget: Budget) -> None:
        """Put the manifest of *namespace* again when it is time: it may expire or be evicted."""
        now = time.monotonic()
        if now < self._manifests_due.get(namespace, now + 1):
            return
        name, manifest = self._names.manifest(namespace), self._manifests[namespace]
        job = partial(steps.introduce, name=name, manifest=manifest, ttl_ms=self._ttl_ms)
        found = await self._routes.at_home(name, job, budget)
        if isinstance(found, bytes) and found != manifest:
            # Its name is the digest of its content: anything else has been altered.
            self.counters.quarantined += 1
            log.warning("redis manifest quarantined", extra={"namespace": namespace})
            expiry = (b"PX", b"%d" % self._ttl_ms) if self._ttl_ms else ()
            command = (b"SET", name, manifest, *expiry)
            await self._routes.at_home(name, partial(call, commands=[command]), budget)
        elif found != manifest:
            self.counters.foreign += 1
            log.warning("redis manifest not kept", extra={"reason": str(found)})
        ttl_seconds = self._settings.ttl_seconds or _MANIFEST_INTERVAL_MAX_SECONDS * 4
        interval = min(ttl_seconds / 4, _MANIFEST_INTERVAL_MAX_SECONDS)
        self._manifests_due[namespace] = now + interval

    async def _find(
        self, namespace: NamespaceId, digests: Sequence[Digest]
    ) -> list[list[Recovered]]:
        budget = self._budget()
        replies: dict[int, Reply] = {}
        failed: list[LaneError] = []
        pending: dict[tuple[Address, bool], list[int]] = {}
        for position, digest in enumerate(digests):
            home = await self._routes.servers.home(self._names.meta(namespace, digest))
            pending.setdefault((home, False), []).append(position)
        for _ in range(REDIS_REDIRECTS_MAX):
            groups = list(pending.items())
            answers = await _together(
                [
                    self._look(address, namespace, [digests[at] for at in places], asking, budget)
                    for (address, asking), places in groups
                ]
            )
            pending = {}
            for ((address, _), places), answer in zip(groups, answers, strict=True):
                if isinstance(answer, LaneError):
                    failed.append(answer)
                    continue
                for at, reply in zip(places, answer, strict=True):
                    if isinstance(reply, ReplyError) and reply.word in {"MOVED", "ASK"}:
                        key = self._names.meta(namespace, digests[at])
                        target = self._routes.redirected(reply, address, key)
                        pending.setdefault((target, is_ask(reply)), []).append(at)
                    else:
                        replies[at] = reply
            if not pending:
                break
        refusals = [reply for reply in replies.values() if isinstance(reply, ReplyError)]
        refused = [reply for reply in refusals if reply.word != "WRONGTYPE"]
        # What is sent on and on, while a slot moves, is missed as well.
        if (failed or refused) and len(refused) == len(replies):
            raise failed[0] if failed else RefusedError(refused[0])
        for error in failed:
            self._note_lost(error)
        self.counters.refusals += len(refused)
        return await self._sort_out(namespace, digests, replies, budget)

    async def _look(
        self,
        address: Address,
        namespace: NamespaceId,
        digests: Sequence[Digest],
        asking: bool,
        budget: Budget,
    ) -> list[Reply] | LaneError:
        """Return what one node says of *digests*, or how it fails."""
        job = partial(
            steps.look, names=self._names, namespace=namespace, digests=digests, asking=asking
        )
        try:
            return await self._routes.lanes.run(address, job, budget)
        except LaneError as error:
            return error

    async def _sort_out(
        self,
        namespace: NamespaceId,
        digests: Sequence[Digest],
        replies: dict[int, Reply],
        budget: Budget,
    ) -> list[list[Recovered]]:
        """Return the good records; count and remove the damaged ones, leave others alone."""
        shards: list[list[Recovered]] = []
        for at, digest in enumerate(digests):
            found = steps.shards_in(replies.get(at), namespace, digest)
            shards.append([Recovered(shard, _PLACE) for shard in found.shards])
            self.counters.foreign += found.is_foreign
            if found.is_newer:
                self._note_newer(digest)
            if found.damaged:
                self.counters.quarantined += len(found.damaged)
                log.warning("redis records quarantined", extra={"key": digest})
                meta = self._names.meta(namespace, digest)
                job = partial(steps.discard, fields=[(meta, field) for field in found.damaged])
                await self._routes.at_home(meta, job, budget)
        return shards

    def _note_newer(self, digest: Digest) -> None:
        if not self.counters.newer:
            log.warning(
                "redis holds records of a newer version; they are misses here",
                extra={"key": digest},
            )
        self.counters.newer += 1

    @contextmanager
    def _reported(self, what: str) -> Generator[None]:
        """Turn what goes wrong inside into `TierError`; log when failing begins and ends."""
        try:
            yield
        except asyncio.CancelledError:
            # Whoever has lost patience has seen what we have: a server that does not answer.
            self._routes.servers.suspect()
            raise
        except LaneError as error:
            self._note_lost(error)
            self._note_failure(str(error))
            raise TierError(f"redis {what}: {error}") from error
        except RefusedError as refused:
            self.counters.refusals += 1
            if refused.reply.word in _ELSEWHERE:
                self._routes.servers.suspect()
            self._note_failure(str(refused))
            raise TierError(f"redis {what}: {refused}") from refused
        else:
            if self._is_failing:
                self._is_failing = False
                log.info("redis answers again")
        finally:
            self.counters.connections = self._routes.lanes.dialed

    def _note_lost(self, error: LaneError) -> None:
        self.counters.failures += 1
        self.counters.timeouts += isinstance(error, LaneTimeoutError)
        self._routes.servers.suspect()

    def _note_failure(self, reason: str) -> None:
        if not self._is_failing:
            self._is_failing = True
            log.warning(
                "redis fails; the tier is skipped until it answers", extra={"reason": reason}
            )


_GRAVITY: Final = (
    Fetched.HERE,
    Fetched.ABSENT,
    Fetched.OTHER,
    Fetched.NEWER,
    Fetched.FOREIGN,
    Fetched.DAMAGED,
)


def _refuse_left(left: Sequence[Asked]) -> None:
    """Raise `RefusedError` when a node that another one pointed to points elsewhere, too."""
    for asked in left:
        raise RefusedError(asked.reply)


async def _together(calls: Sequence[Coroutine[None, None, Result]]) -> list[Result]:
    """Return what *calls* return; when one fails, the others have ended before this raises.

    Nothing may touch the caller's memory afterwards.
    """
    if len(calls) == 1:
        return [await calls[0]]
    running = [asyncio.ensure_future(each) for each in calls]
    try:
        return await asyncio.gather(*running)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

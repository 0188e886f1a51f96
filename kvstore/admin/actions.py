"""What the admin API can do. Whatever is leased or pinned stays as it is and is called busy."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, Literal

from kvstore.admin import schema
from kvstore.admin.auth import Scope
from kvstore.admin.naming import digest_of, namespace_of, tenant_shares
from kvstore.admin.routes import Call, Parameter, Refusal, Route
from kvstore.errors import ConfigError
from kvstore.store.history import Fate
from kvstore.types import NO_SLOT, Digest, TierKind

if TYPE_CHECKING:
    from kvstore.admin.subject import Subject
    from kvstore.store.namespace import Namespace

_TENANT: Final = Parameter(
    "tenant", {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"}, "its name", "path"
)

_Verdict = Literal["ok", "damaged", "busy", "elsewhere", "absent", "unchecked"]


class Actions:
    """The routes that change something."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._store = subject.store
        # One verification at a time: it reads whole chunks.
        self._verifying = asyncio.Lock()

    def routes(self) -> list[Route]:
        """Return all of them."""

        def write(path: str, name: str, text: str, **options: object) -> Route:
            chosen: dict[str, object] = {
                "scope": Scope.WRITE,
                "asked": schema.ChunksAsked,
                "answer": schema.Done,
                "problems": (404,),
            }
            return Route("POST", path, name, text, **(chosen | options))  # type: ignore[arg-type]  # as named

        return [
            write(
                *("/v1/chunks/pin", "pin", "Let chunks leave last, or never"),
                handler=self._pin,
                asked=schema.PinAsked,
            ),
            write("/v1/chunks/unpin", "unpin", "Let chunks leave in turn", handler=self._unpin),
            write("/v1/chunks/evict", "evict", "Remove chunks", handler=self._evict),
            write(
                *("/v1/chunks/verify", "verify", "Compare bytes with checksums"),
                handler=self._verify,
                answer=schema.Verification,
            ),
            write(
                *("/v1/prefetch", "prefetch", "Bring chunks up to the host tier"),
                handler=self._prefetch,
                asked=schema.PrefetchAsked,
            ),
            Route(
                *("PUT", "/v1/tenants/{tenant}/quota", "quota", "Change a quota until a restart"),
                self._quota,
                schema.Tenants,
                scope=Scope.ADMIN,
                asked=schema.QuotaChange,
                parameters=(_TENANT,),
                problems=(404, 409),
            ),
            Route(
                *("POST", "/v1/config/reload", "reload", "Read the configuration again"),
                self._reload,
                schema.ReloadDone,
                scope=Scope.ADMIN,
                problems=(409,),
            ),
        ]

    async def _pin(self, call: Call) -> schema.Done:
        space, digests = self._chunks(call.body)
        return schema.Done(chunks=self._store.pin(space, digests, hard=call.body.hard))

    async def _unpin(self, call: Call) -> schema.Done:
        space, digests = self._chunks(call.body)
        return schema.Done(chunks=self._store.unpin(space, digests))

    async def _evict(self, call: Call) -> schema.Done:
        space, digests = self._chunks(call.body)
        gone, busy = self._store.delete(space, digests)
        return schema.Done(chunks=gone, busy=busy)

    async def _prefetch(self, call: Call) -> schema.Done:
        space, digests = self._chunks(call.body)
        return schema.Done(chunks=self._subject.prefetch(space, digests))

    async def _verify(self, call: Call) -> schema.Verification:
        space, digests = self._chunks(call.body)
        async with self._verifying:
            verdicts = [await self._verify_one(space, digest) for digest in digests]
        return schema.Verification(
            chunks=[
                schema.Verified(digest=digest.hex(), verdict=verdict)
                for digest, verdict in zip(digests, verdicts, strict=True)
            ]
        )

    async def _verify_one(self, space: Namespace, digest: Digest) -> _Verdict:
        """Compare in a thread; a chunk that is damaged and free is removed, as a load would."""
        store, slot = self._store, space.find(digest)
        if slot == NO_SLOT:
            return "absent"
        if not store.host.checksums:
            return "unchecked"
        shards = [shard for shard in store.index.shards(slot) if shard.is_in_host]
        if not shards:
            return "elsewhere"
        store.hold(slot)
        try:
            for shard in shards:
                right = await asyncio.to_thread(store.host.verify_bytes, shard.extent, shard.root)
                if not right:
                    break
            else:
                return "ok"
        finally:
            store.let_go(slot)
        store.counters.checksum_failures += 1
        _, busy = store.delete(space, [digest], Fate.DAMAGED)
        return "busy" if busy else "damaged"

    async def _quota(self, call: Call) -> schema.Tenants:
        name, change = call.path["tenant"], call.body
        if name not in self._store.tenants or not name:
            raise Refusal(404, "no such tenant is configured; see /v1/tenants")
        kind = TierKind[change.tier.upper()]
        residents = self._store.residents
        if kind is not TierKind.HOST:
            found = self._store.slower.residents.get(kind)
            if found is None:
                raise Refusal(409, f"there is no {change.tier} tier")
            residents = found
        number = self._store.tenants.index(name)
        try:
            residents.shares.change(
                number, quota_bytes=change.quota_bytes, floor_bytes=change.floor_bytes
            )
        except ConfigError as error:
            raise Refusal(409, str(error)) from None
        return schema.Tenants(tenants=tenant_shares(self._store))

    async def _reload(self, call: Call) -> schema.ReloadDone:
        del call
        report = self._subject.reload()
        return schema.ReloadDone(applied=report.applied, waiting=report.waiting)

    def _chunks(self, asked: schema.ChunksAsked) -> tuple[Namespace, list[Digest]]:
        space = namespace_of(self._store, asked.namespace)
        return space, [digest_of(text) for text in asked.digests]

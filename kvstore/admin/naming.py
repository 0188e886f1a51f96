"""How the admin API names namespaces, chunks, tiers and tenants, and finds them by name."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from kvstore.admin.routes import Refusal
from kvstore.protocol.messages import TenantStats
from kvstore.types import Digest, NamespaceId, TierKind

if TYPE_CHECKING:
    from kvstore.store.namespace import Namespace
    from kvstore.store.store import Store

_DIGEST: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)
_NAMESPACE: Final = re.compile(r"[0-9a-f]{32}", re.ASCII)
_SHARED_OUT: Final = (TierKind.HOST, TierKind.DISK)


def digest_of(text: str) -> Digest:
    """Return the digest that *text* writes in hex; raises `Refusal`."""
    if not _DIGEST.fullmatch(text):
        raise Refusal(400, "a digest is 64 hex digits in lower case")
    return Digest(bytes.fromhex(text))


def namespace_of(store: Store, text: str) -> Namespace:
    """Return the namespace that *text* names in hex; raises `Refusal`."""
    if not _NAMESPACE.fullmatch(text):
        raise Refusal(400, "a namespace is 32 hex digits in lower case")
    space = store.known(NamespaceId(bytes.fromhex(text)))
    if space is None:
        raise Refusal(404, "no such namespace; see /v1/namespaces")
    return space


def tier_names(bits: int) -> list[str]:
    """Return the names of the tiers in *bits*, fastest first."""
    return [kind.name.lower() for kind in TierKind if bits & kind]


def tenant_shares(store: Store) -> list[TenantStats]:
    """Return what each tenant has in each tier whose room is ours to share out."""
    tiers = [store.residents, *store.slower.residents.values()]
    return [
        TenantStats(
            tenant=name,
            tier=residents.kind.name.lower(),
            chunks=residents.chunks_of(number),
            used_bytes=residents.shares.used_bytes(number),
            quota_bytes=residents.shares.quota_bytes(number),
            floor_bytes=residents.shares.floor_bytes(number),
        )
        for number, name in enumerate(store.tenants)
        for residents in tiers
        if residents.kind in _SHARED_OUT
    ]

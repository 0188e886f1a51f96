"""What a durable tier has kept across a restart is taken in, before anybody is served."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from kvstore.errors import KVStoreError
from kvstore.protocol.manifest import decode_namespace

if TYPE_CHECKING:
    from kvstore.store.namespace import Namespace
    from kvstore.store.store import Store
    from kvstore.tiers.base import DurableTier, RecoveredRun
    from kvstore.types import NamespaceId

log = logging.getLogger(__name__)


class Stock(NamedTuple):
    """How much was there: what came into the index, and what nobody here can use."""

    shards: int
    unusable: int


def take_stock(store: Store, tier: DurableTier) -> Stock:
    """Put all that *tier* has kept into the index. Blocking; raises `TierError`.

    What is of no namespace that can be opened here stays where it is: another configuration
    may have use for it.
    """
    spaces = _open_spaces(store, tier.manifests())
    unusable = 0

    def usable() -> Iterator[tuple[Namespace, int, RecoveredRun]]:
        nonlocal unusable
        for run in tier.recover():
            known = spaces.get(run.namespace)
            if known is None:
                unusable += len(run.digests)
            else:
                yield *known, run

    # What comes and goes makes no garbage that only a collection would find.
    gc.disable()
    try:
        shards = store.slower.recover(tier.kind, usable())
    finally:
        gc.enable()
        for space, _ in spaces.values():
            store.leave(space)
    _give_memory_back()
    return Stock(shards, unusable)


def _give_memory_back() -> None:
    """Return to the system what columns have left behind while they grew: a tenth of the index."""
    with contextlib.suppress(AttributeError):  # not every C library has it
        ctypes.CDLL(None).malloc_trim(0)


def _open_spaces(
    store: Store, manifests: dict[NamespaceId, bytes]
) -> dict[NamespaceId, tuple[Namespace, int]]:
    """Enter the namespaces of *manifests*; return each with the number of its tenant."""
    spaces: dict[NamespaceId, tuple[Namespace, int]] = {}
    for namespace, introduction in manifests.items():
        try:
            manifest, tenant = decode_namespace(introduction)
            # A version that knows another field has another name for the same manifest.
            if manifest.namespace_id(tenant) == namespace:
                spaces[namespace] = (store.enter(manifest, tenant), store.tenant_number(tenant))
        except KVStoreError as error:
            log.warning(
                "namespace not opened", extra={"namespace": namespace.hex(), "reason": str(error)}
            )
    return spaces

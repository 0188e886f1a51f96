"""The storage that SGLang loads: `"module_path": "kvstore.connectors.sglang"`.

SGLang makes one for every rank, keeps its pages in host memory of its own, and asks from threads
of its own. A page is a chunk: the bytes are copied once between that memory and the arena, and
put into canonical order on the way. An engine never fails because of the store: what goes wrong
is a miss, within the time-out, and pages that cannot be kept are not. Only a configuration that
contradicts itself stops it, at its start.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

import torch
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    HiCacheStorageConfig,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
    PoolTransferResult,
)

from kvstore.client.cache import PrefixCache
from kvstore.connectors.sglang_manifests import (
    Model,
    Rank,
    Stored,
    model_of,
    stored_keys_values,
    stored_opaque,
)
from kvstore.connectors.sglang_pools import CanonicalPages
from kvstore.connectors.sglang_settings import Settings, read_settings
from kvstore.connectors.weights import UnsupportedError
from kvstore.errors import CodecError, KVStoreError, RequestError
from kvstore.limits import DIGEST_SIZE_BYTES
from kvstore.transfer.copies import Runs
from kvstore.types import Digest

log = logging.getLogger("sglang.kvstore")

_EPOCH_BYTES: Final = 16
_KEYS_VALUES: Final = "kv"

Answer = TypeVar("Answer")
OpenCache = Callable[[Stored, Settings], PrefixCache]


class KVStoreHiCache(HiCacheStorage):
    """Keeps SGLang's pages in the daemon.

    Raises `ConfigError` when its settings are unknown or contradict themselves.
    """

    def __init__(
        self, storage_config: HiCacheStorageConfig, kwargs: Mapping[str, Any] | None = None
    ) -> None:
        self._settings = read_settings(storage_config.extra_config or {})
        self._rank = Rank.of(storage_config)
        self._served_name = storage_config.model_name
        self._model: Model | None = None
        self._shelves: dict[str, Shelf] = {}
        self._stands_for_others = False
        self._epoch = b""
        self._off = ""

    # --- pools --------------------------------------------------------------------------

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Take the pool of keys and values. One without memory stands for others' pages."""
        super().register_mem_pool_host(mem_pool_host)
        self._stands_for_others = _is_empty(mem_pool_host)
        if self._stands_for_others:
            return

        def stored(model: Model) -> Stored:
            return stored_keys_values(mem_pool_host, model, self._rank, self._settings)

        self._take(_KEYS_VALUES, stored)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """Take a pool beside the first."""
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        name = str(host_pool_name)
        if name != _KEYS_VALUES:
            self._take(
                name,
                lambda model: stored_opaque(name, host_pool, model, self._rank, self._settings),
            )

    def close(self) -> None:
        """End the connections. Idempotent."""
        for shelf in self._shelves.values():
            shelf.cache.close()
        self._shelves = {}

    def clear(self) -> None:
        """Use nothing any more that was stored before, as after a change of the weights.

        What others stored stays theirs. Several ranks have no way to agree on new names: they
        store nothing more until they are started again.
        """
        if self._rank.ranks * self._rank.stages * self._rank.contexts == 1:
            self._epoch = secrets.token_bytes(_EPOCH_BYTES)
        else:
            self._turn_off("it was cleared, and several ranks cannot agree on new names")

    # --- many pages at a time -------------------------------------------------------------

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        """Return how many leading pages can be loaded."""
        return self._guarded(0, lambda: self._leading(_KEYS_VALUES, self._digests(keys)))

    def batch_get_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None
    ) -> list[bool]:
        """Load pages into the pool; return which came. Behind the first that did not, none do."""
        return self._get(_KEYS_VALUES, keys, host_indices)

    def batch_set_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None
    ) -> list[bool]:
        """Store pages from the pool; return which are kept."""
        return self._set(_KEYS_VALUES, keys, host_indices, extra_info)

    def batch_exists_v2(
        self,
        keys: list[str],
        pool_transfers: list[PoolTransfer] | None = None,
        extra_info: Any = None,
    ) -> PoolTransferResult:
        """Return how many leading pages can be loaded so that every pool has what it needs."""
        nothing = PoolTransferResult(0, {}, [])
        return self._guarded(
            nothing, lambda: self._joint(self._digests(keys), pool_transfers or [])
        )

    def batch_get_v2(
        self, transfers: list[PoolTransfer], extra_info: Any = None
    ) -> dict[str, list[bool]]:
        """Load pages of several pools; return which came, pool by pool."""
        return {
            transfer.name: self._get(str(transfer.name), transfer.keys or [], transfer.host_indices)
            for transfer in transfers
        }

    def batch_set_v2(
        self, transfers: list[PoolTransfer], extra_info: Any = None
    ) -> dict[str, list[bool]]:
        """Store pages of several pools; return which are kept, pool by pool."""
        return {
            transfer.name: self._set(
                str(transfer.name), transfer.keys or [], transfer.host_indices, None
            )
            for transfer in transfers
        }

    # --- page by page, without "interface_v1" ----------------------------------------------

    def exists(self, key: str) -> bool:
        """Whether a page can be loaded."""
        return self.batch_exists([key]) == 1

    def get(
        self, key: str, target_location: Any = None, target_sizes: Any = None
    ) -> torch.Tensor | None:
        """Fill *target_location*, a flat page, and return it; None when the page is not there."""
        return self.batch_get([key], [target_location])[0]

    def batch_get(
        self, keys: list[str], target_locations: Any = None, target_sizes: Any = None
    ) -> list[torch.Tensor | None]:
        """Fill flat pages; None stands for those that did not come."""
        targets = list(target_locations or [])
        loaded = self._guarded(0, lambda: self._load_flat(self._digests(keys), targets))
        return [*targets[:loaded], *[None] * (len(keys) - loaded)]

    def set(
        self,
        key: str,
        value: Any = None,
        target_location: Any = None,
        target_sizes: Any = None,
    ) -> bool:
        """Store the flat page *value*; return whether it is kept."""
        return self.batch_set([key], [value if target_location is None else target_location])

    def batch_set(
        self,
        keys: list[str],
        values: Any = None,
        target_locations: Any = None,
        target_sizes: Any = None,
    ) -> bool:
        """Store flat pages; return whether all of them are kept."""
        pages = list(values if values is not None else target_locations or [])
        kept = self._guarded(0, lambda: self._store_flat(self._digests(keys), pages))
        return kept == len(keys)

    # --- how ------------------------------------------------------------------------------

    def _take(self, name: str, describe: Callable[[Model], Stored]) -> None:
        """Open the namespace of one pool, or say once why its pages are not kept."""
        if (old := self._shelves.pop(name, None)) is not None:
            old.cache.close()
        try:
            if self._model is None:
                self._model = model_of(self._settings, self._served_name, _server_arguments())
            shelf = Shelf(describe(self._model), self._settings)
        except (UnsupportedError, CodecError) as error:
            log.warning("kvstore: the pool %s is not kept: %s", name, error)
        except Exception:
            log.exception("kvstore: the pool %s is not kept: it is not understood", name)
        else:
            self._shelves[name] = shelf
            _announce(name, shelf, self._settings)

    def _digests(self, keys: Sequence[str]) -> list[Digest]:
        """Return what page hashes stand for; raises `RequestError` for other keys."""
        return [self._digest(key) for key in keys]

    def _digest(self, key: str) -> Digest:
        try:
            raw = bytes.fromhex(key)
        except ValueError:
            raw = b""
        if len(raw) != DIGEST_SIZE_BYTES:
            raise RequestError(f"the page key {key[:80]!r} is no SHA-256 in hexadecimal digits")
        return Digest(hashlib.sha256(self._epoch + raw).digest() if self._epoch else raw)

    def _leading(self, name: str, digests: Sequence[Digest]) -> int:
        if name == _KEYS_VALUES and self._stands_for_others:
            return len(digests)
        shelf = self._shelves.get(name)
        return shelf.cache.lookup(digests) if shelf is not None and not self._off else 0

    def _get(self, name: str, keys: list[str], indices: torch.Tensor | None) -> list[bool]:
        def load() -> int:
            if name == _KEYS_VALUES and self._stands_for_others:
                return len(keys)
            shelf = self._shelves.get(name)
            if shelf is None or self._off:
                return 0
            return shelf.cache.load(self._digests(keys), shelf.runs(keys, indices))

        loaded = self._guarded(0, load)
        return [index < loaded for index in range(len(keys))]

    def _set(
        self, name: str, keys: list[str], indices: torch.Tensor | None, extra_info: Any
    ) -> list[bool]:
        def store() -> int:
            if name == _KEYS_VALUES and self._stands_for_others:
                return len(keys)
            shelf = self._shelves.get(name)
            if shelf is None or self._off:
                return 0
            digests, parent = self._digests(keys), self._parent(extra_info)
            return shelf.store(digests, lambda: shelf.runs(keys, indices), parent)

        kept = self._guarded(0, store)
        return [index < kept for index in range(len(keys))]

    def _joint(
        self, digests: Sequence[Digest], transfers: Sequence[PoolTransfer]
    ) -> PoolTransferResult:
        pages = self._leading(_KEYS_VALUES, digests)
        hits: dict[Any, int] = {PoolName.KV: pages} if pages else {}
        ends = list(range(1, pages + 1))
        for transfer in transfers:
            if not ends or transfer.hit_policy not in (
                PoolHitPolicy.ALL_PAGES,
                PoolHitPolicy.TRAILING_PAGES,
            ):
                # A policy that gates nothing gets no verdict.
                continue
            fitting = self._fitting_ends(transfer, digests[:pages])
            if fitting:
                hits[transfer.name] = max(fitting)
            ends = [end for end in ends if end in fitting]
        return PoolTransferResult(ends[-1] if ends else 0, hits, ends)

    def _fitting_ends(self, transfer: PoolTransfer, digests: Sequence[Digest]) -> frozenset[int]:
        """Return at how many leading pages a pool has all that it needs."""
        name = str(transfer.name)
        leading = self._leading(name, digests)
        fitting = {*range(1, leading + 1)}
        shelf = self._shelves.get(name)
        if transfer.hit_policy == PoolHitPolicy.ALL_PAGES or shelf is None or self._off:
            return frozenset(fitting)
        window = max(1, len(transfer.keys or ()))
        end = len(digests)
        # From the end, gap by gap: such pools keep few pages, so there are few to be found.
        while end > leading:
            end = shelf.cache.lookup(digests[:end], window=window)
            if end:
                fitting.add(end)
            end -= 1
        return frozenset(fitting)

    def _load_flat(self, digests: Sequence[Digest], targets: Sequence[Any]) -> int:
        shelf = self._flat_shelf()
        if shelf is None or len(targets) != len(digests):
            return 0
        return shelf.cache.load(digests, shelf.flat_runs(targets))

    def _store_flat(self, digests: Sequence[Digest], pages: Sequence[Any]) -> int:
        shelf = self._flat_shelf()
        if shelf is None or len(pages) != len(digests):
            return 0
        return shelf.store(digests, lambda: shelf.flat_runs(pages), None)

    def _flat_shelf(self) -> Shelf | None:
        shelf = self._shelves.get(_KEYS_VALUES)
        return None if self._off else shelf

    def _parent(self, extra_info: Any) -> Digest | None:
        """Return what comes before a batch, where SGLang tells."""
        before = getattr(extra_info, "prefix_keys", None)
        return self._digest(before[-1]) if before else None

    def _guarded(self, miss: Answer, question: Callable[[], Answer]) -> Answer:
        """Return the answer, or *miss*, whatever happens."""
        try:
            return question()
        except KVStoreError as error:
            log.warning("kvstore: counted as a miss: %s", error)
        except Exception:
            log.exception("kvstore: the engine goes on without the cache")
            self._turn_off("an unexpected error")
        return miss

    def _turn_off(self, reason: str) -> None:
        if not self._off:
            self._off = reason
            log.warning("kvstore: caching is off: %s", reason)


class Shelf:
    """The pages of one pool, and the namespace they are kept in."""

    def __init__(self, stored: Stored, settings: Settings) -> None:
        self.stored = stored
        self.cache = PrefixCache(
            stored.manifest,
            heads=stored.heads,
            socket=settings.socket_path,
            timeout_seconds=settings.timeout_seconds,
            name="sglang",
            tenant=settings.tenant,
            recompute_us_per_token=settings.recompute_us_per_token,
            policy=stored.policy,
        )

    def runs(self, keys: Sequence[str], indices: torch.Tensor | None) -> list[Runs]:
        """Return where the pages at *indices* lie, one for each key; raises `RequestError`."""
        if indices is None:
            raise RequestError(f"{len(keys)} keys and no indices")
        found = self.stored.pages.runs(indices)
        if len(found) != len(keys):
            raise RequestError(f"{len(keys)} keys for {len(found)} pages")
        return found

    def flat_runs(self, pages: Sequence[Any]) -> list[Runs]:
        """Return where flat *pages* lie; raises `RequestError` where only SGLang knows."""
        kept = self.stored.pages
        if not isinstance(kept, CanonicalPages):
            raise RequestError(
                'pages of this layout are only kept with "interface_v1": 1 in the extra config'
            )
        return [kept.flat_runs(page) for page in pages]

    def store(
        self,
        digests: Sequence[Digest],
        sources: Callable[[], list[Runs]],
        parent: Digest | None,
    ) -> int:
        """Store pages and return how many leading ones are kept; a rank that only reads: all."""
        if not self.stored.is_writer:
            return len(digests)
        report = self.cache.store(digests, sources(), parent=parent)
        if report.stored + report.present == len(digests):
            return len(digests)
        return self.cache.lookup(digests)


def _is_empty(pool: Any) -> bool:
    """Whether *pool* has no bytes of its own: its pages only number those of other pools."""
    return getattr(pool, "kv_buffer", pool) is None and getattr(pool, "layer_num", None) == 0


def _server_arguments() -> Any:
    """Return SGLang's own arguments, or None where it does not tell them."""
    try:
        from sglang.srt.runtime_context import get_server_args  # noqa: PLC0415  # may be absent

        return get_server_args()
    except Exception:  # noqa: BLE001  # it is told in another way by every release
        return None


def _announce(name: str, shelf: Shelf, settings: Settings) -> None:
    """Say once what is cached where."""
    manifest = shelf.stored.manifest
    log.info(
        "kvstore: pool %s of %s, %s, in pages of %d tokens (%s, %s) in namespace %s at %s",
        name,
        manifest.model,
        manifest.group,
        manifest.chunk_tokens,
        manifest.layout,
        manifest.codec,
        manifest.namespace_id().hex(),
        settings.socket_path,
    )

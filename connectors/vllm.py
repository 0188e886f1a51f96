"""The connector that vLLM loads: `"kv_connector_module_path": "kvstore.connectors.vllm"`.

vLLM makes one for its scheduler and one for every worker. Both only pass on what they are
asked; see `vllm_scheduler` and `vllm_worker`. An engine never fails because of the store: what
goes wrong is a miss, and an engine whose KV cannot be kept is served without the cache. Only a
configuration that contradicts itself stops it, at its start.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)

from kvstore.client.cache import PrefixCache
from kvstore.client.sync import Client
from kvstore.compression.policy import CodecPolicy
from kvstore.connectors.vllm_backends import check_backends
from kvstore.connectors.vllm_events import events_for
from kvstore.connectors.vllm_handoff import HandoffGroup, SchedulerHandoffs
from kvstore.connectors.vllm_layouts import KVGroup, groups_of
from kvstore.connectors.vllm_manifests import manifests_of, policies_of
from kvstore.connectors.vllm_metadata import StepMetadata
from kvstore.connectors.vllm_movers import choose_mover
from kvstore.connectors.vllm_scheduler import SchedulerHalf
from kvstore.connectors.vllm_settings import Settings, read_settings
from kvstore.connectors.vllm_stats import StoreMetrics, StoreStats, stats_since
from kvstore.connectors.vllm_tracking import Role
from kvstore.connectors.vllm_worker import Received, WorkerHalf
from kvstore.connectors.weights import UnsupportedError
from kvstore.errors import CodecError, ConfigError, KVStoreError
from kvstore.protocol.manifest import Manifest
from kvstore.types import TierKind

log = logging.getLogger("vllm.kvstore")


class KVStoreConnector(KVConnectorBase_V1, SupportsHMA):
    """Offloads prefixes to the daemon and loads them from it.

    Raises `ConfigError` when its settings contradict themselves or the engine.
    """

    def __init__(
        self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any = None
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._scheduler: SchedulerHalf | None = None
        self._worker: WorkerHalf | None = None
        self._received = Received()
        self._reported: dict[str, float] = {}
        settings = read_settings(vllm_config.kv_transfer_config.kv_connector_extra_config or {})
        try:
            rank = _tensor_rank(vllm_config) if role == KVConnectorRole.WORKER else 0
            groups = groups_of(vllm_config, kv_cache_config, settings, rank)
            _refuse_silent_failures(groups)
            manifests = manifests_of(vllm_config, groups, settings)
        except ConfigError:
            raise
        except UnsupportedError as error:
            if role == KVConnectorRole.SCHEDULER:
                log.warning("kvstore: caching is off: %s", error)
            return
        except Exception:
            log.exception("kvstore: caching is off: this engine is not understood")
            return
        if role == KVConnectorRole.WORKER:
            policies = policies_of(vllm_config, groups, settings)
            try:
                caches = _open_worker(groups, manifests, policies, settings)
            except CodecError as error:
                raise ConfigError(f"kv_connector_extra_config.codec: {error}") from error
            movers = partial(choose_mover, staging_bytes=settings.gpu_staging_bytes)
            handoffs = [cache.handoffs for cache in caches]
            self._worker = WorkerHalf(groups, caches, handoffs, movers)
            return
        ranks = vllm_config.parallel_config.world_size
        of_ranks = [
            manifests_of(vllm_config, [group.on_rank(rank) for group in groups], settings)
            for rank in range(groups[0].shard.ranks)
        ]
        timeout = settings.lookup_timeout_seconds
        found_in = _open_scheduler(of_ranks, settings)
        self._scheduler = SchedulerHalf(
            groups,
            found_in,
            ranks=ranks,
            store_decoded=settings.store_decoded,
            lookup_timeout_seconds=timeout,
            role=_role(vllm_config.kv_transfer_config.kv_role, settings),
            handoffs=_handoffs(vllm_config.kv_transfer_config, groups, found_in, settings),
            events=events_for(vllm_config, kv_cache_config, groups[0].chunk_tokens),
        )
        _announce(manifests, settings)

    # --- what this connector is -------------------------------------------------------

    @property
    def requires_kv_delivery(self) -> bool:
        """Nothing is lost when a store does not happen."""
        return False

    @classmethod
    def supports_sleep_mode(cls, kv_transfer_config: Any) -> bool:
        """Return False: the addresses of pages are kept, so they must not change."""
        return False

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        """Any layout will do."""
        return None

    # --- worker -----------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Take the pages and test that they are understood."""
        if self._worker is None:
            return
        self._worker.register(kv_caches)
        if next(iter(kv_caches.values())).device.type != "cpu":
            self._check_backends(kv_caches)

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        """Do nothing: blocks that are being stored have a reference of their own."""

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Begin the loads of this step; their requests wait for them, the step does not."""
        if (metadata := self._metadata()) is not None and self._worker is not None:
            self._worker.start_loads(metadata)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Do nothing: requests are only scheduled when they are loaded."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Do nothing: whole chunks are stored, behind the step."""

    def wait_for_save(self) -> None:
        """Begin the stores of this step, whose KV is now computed."""
        if (metadata := self._metadata()) is not None and self._worker is not None:
            self._worker.start_stores(metadata)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Return the requests whose loads have ended, each once. None waits for a store."""
        if self._worker is None:
            return None, None
        self._received = self._worker.take_received()
        return None, self._received.requests or None

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        """Return the same, with the requests whose loads failed where blocks cannot say it."""
        results = super().get_transfer_results(finished_req_ids)
        if self._has_many_groups():
            results.failed_recving = self._received.failed_requests
        return results

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Return the blocks that did not come, with the requests just reported."""
        return set() if self._has_many_groups() else self._received.failed_blocks

    def get_kv_connector_stats(self) -> StoreStats | None:
        """Return what this half has done since the last call."""
        if self._worker is not None:
            return stats_since(self._worker.counts, self._reported, self._worker.figures)
        half = self._scheduler
        return None if half is None else stats_since(half.counts, self._reported)

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> StoreStats:
        """Return the statistics in *data*, on the side that logs them."""
        return StoreStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> StoreMetrics:
        """Return what adds to vLLM's `/metrics`."""
        return StoreMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def build_connector_worker_meta(self) -> Any:
        """Return what the scheduler's half needs to know."""
        return None if self._worker is None else self._worker.take_report()

    # --- scheduler --------------------------------------------------------------------

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        """Take the pool whose blocks are referenced while they are stored."""
        if self._scheduler is not None:
            self._scheduler.bind_block_pool(gpu_block_pool)

    def on_new_request(self, request: Any) -> None:
        """Begin to look for what is stored of *request*."""
        if self._scheduler is not None:
            self._scheduler.on_new_request(request)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Return how many more tokens can be loaded, in the background; None: not known yet."""
        if self._scheduler is None:
            return 0, False
        tokens = self._scheduler.matched_tokens(request, num_computed_tokens)
        return tokens, bool(tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Plan the load of *num_external_tokens* into *blocks*."""
        if self._scheduler is not None:
            self._scheduler.after_allocation(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """Return what the workers are to do in this step."""
        if self._scheduler is None:
            return StepMetadata()
        return self._scheduler.build(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        """Learn what the workers have done."""
        if self._scheduler is not None:
            self._scheduler.after_step(connector_output)

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Forget *request*; its blocks may be freed at once."""
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Forget *request*; its blocks may be freed at once."""
        if self._scheduler is None:
            return False, None
        return False, self._scheduler.request_finished(request)

    def has_pending_block_frees(self) -> bool:
        """Whether blocks will be free soon, so that nobody need be preempted."""
        return self._scheduler is not None and self._scheduler.has_holdings()

    def has_pending_push_work(self) -> bool:
        """Whether an engine without requests should go on stepping until stores are finished."""
        return self.has_pending_block_frees()

    def get_external_cache_hit_sources(self, request: Any, num_external_tokens: int) -> Any:
        """Return how many of the tokens to be loaded come from which kind of tier."""
        if self._scheduler is None or not num_external_tokens:
            return {}
        return _by_source(self._scheduler.hit_sources(request, num_external_tokens))

    def take_events(self) -> Iterable[Any]:
        """Return what has become known of stored blocks, for routers."""
        return () if self._scheduler is None else self._scheduler.take_events()

    def reset_cache(self) -> bool | None:
        """Use nothing any more that was stored before, as after a change of the weights."""
        if self._scheduler is not None:
            self._scheduler.reset()
        return True

    def shutdown(self) -> None:
        """End the threads and the connections. Idempotent."""
        for half in (self._worker, self._scheduler):
            if half is not None:
                half.close()
        self._worker = self._scheduler = None

    def _check_backends(self, names: Iterable[str]) -> None:
        """Turn the worker off when a backend that is not understood writes its pages."""
        assert self._worker is not None, "a worker has pages"
        layers = getattr(self._vllm_config.compilation_config, "static_forward_context", {})
        try:
            check_backends(self._vllm_config, layers, names, converted=self._worker.converts)
        except (KVStoreError, KeyError, AttributeError) as error:
            self._worker.turn_off(str(error))

    def _metadata(self) -> StepMetadata | None:
        metadata = self._connector_metadata
        return metadata if isinstance(metadata, StepMetadata) else None

    def _has_many_groups(self) -> bool:
        return len(self._kv_cache_config.kv_cache_groups) > 1


def _open_worker(
    groups: Sequence[KVGroup],
    manifests: Sequence[Manifest],
    policies: Sequence[CodecPolicy],
    settings: Settings,
) -> list[PrefixCache]:
    """Return a namespace for every group, of which a rank has its own heads."""
    return [
        PrefixCache(
            manifest,
            heads=group.stored_heads,
            socket=settings.socket_path,
            timeout_seconds=settings.transfer_timeout_seconds,
            name="vllm-worker",
            policy=policy,
        )
        for group, manifest, policy in zip(groups, manifests, policies, strict=True)
    ]


def _open_scheduler(
    of_ranks: Sequence[Sequence[Manifest]], settings: Settings
) -> list[list[PrefixCache]]:
    """Return, for every group, the namespaces of all ranks: one, unless chunks are opaque."""
    return [
        [
            PrefixCache(
                manifest,
                socket=settings.socket_path,
                timeout_seconds=settings.lookup_timeout_seconds,
                name="vllm-scheduler",
            )
            for manifest in dict.fromkeys(manifests)
        ]
        for manifests in zip(*of_ranks, strict=True)
    ]


def _role(kv_role: str, settings: Settings) -> Role:
    """Return what `kv_role` stands for. A consumer stores its answers, if it is asked to."""
    return Role(
        produces=kv_role != "kv_consumer",
        consumes=kv_role != "kv_producer",
        stores=kv_role != "kv_consumer" or settings.store_decoded,
    )


def _handoffs(
    transfer_config: Any,
    groups: Sequence[KVGroup],
    caches: Sequence[Sequence[PrefixCache]],
    settings: Settings,
) -> SchedulerHandoffs:
    """Return the hand-offs of an engine: of every group, in every namespace that a hit needs."""
    return SchedulerHandoffs(
        [
            HandoffGroup([cache.handoffs for cache in some], group.window)
            for some, group in zip(caches, groups, strict=True)
        ],
        seconds=settings.handoff_timeout_seconds,
        engine_id=str(transfer_config.engine_id),
    )


def _tensor_rank(vllm_config: Any) -> int:
    """Return which of the ranks that share the heads this process is."""
    if vllm_config.parallel_config.tensor_parallel_size == 1:
        return 0
    from vllm.distributed.parallel_state import (  # noqa: PLC0415  # only where ranks are set up
        get_tensor_model_parallel_rank,
    )

    return int(get_tensor_model_parallel_rank())


def _refuse_silent_failures(groups: Sequence[KVGroup]) -> None:
    """Raise `UnsupportedError` when vLLM could not be told that a load has failed."""
    if len(groups) > 1 and not hasattr(KVConnectorBase_V1, "get_transfer_results"):
        raise UnsupportedError(
            "this vLLM cannot be told of failed loads of a model with several KV groups;"
            " use 0.30 or newer, or --disable-hybrid-kv-cache-manager"
        )


def _by_source(tokens: Mapping[TierKind, int]) -> dict[Any, int]:
    """Return *tokens* by what vLLM calls the tiers."""
    from vllm.v1.metrics.cache_hit_source import CacheHitSource  # noqa: PLC0415  # it asked

    names = {
        TierKind.DEVICE: CacheHitSource.DEVICE,
        TierKind.HOST: CacheHitSource.HOST,
        TierKind.DISK: CacheHitSource.DISK,
        TierKind.REDIS: CacheHitSource.EXTERNAL_UNSPECIFIED,
        TierKind.PEER: CacheHitSource.P2P,
    }
    return {names[tier]: count for tier, count in tokens.items() if count}


def _announce(manifests: Sequence[Manifest], settings: Settings) -> None:
    """Say once what is cached where, and what stands in the way if something does."""
    for manifest in manifests:
        log.info(
            "kvstore: %s, %s, in chunks of %d tokens (%d bytes, %s, %s) in namespace %s at %s",
            manifest.model,
            manifest.group,
            manifest.chunk_tokens,
            manifest.plain_bytes(manifest.all_heads),
            manifest.layout,
            manifest.codec,
            manifest.namespace_id().hex(),
            settings.socket_path,
        )
    if (trouble := _trouble(settings.socket_path)) is not None:
        log.warning(
            "kvstore: serving without the cache until a daemon answers at %s (%s);"
            " start one with: kvstore serve --set server.socket=%s",
            settings.socket_path,
            trouble,
            settings.socket_path,
        )


def _trouble(path: Path) -> KVStoreError | None:
    try:
        Client.connect(path, name="vllm-start", timeout_seconds=1.0).close()
    except KVStoreError as error:
        return error
    return None

"""What the connector has done, in vLLM's own statistics: its log lines and its `/metrics`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from prometheus_client import Counter
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

COUNTERS: Final = {
    "lookups": "Requests whose prefix was looked up in the daemon.",
    "lookups_late": "Look-ups that were not waited for any longer.",
    "tokens_asked": "Tokens of the requests looked up.",
    "tokens_hit": "Tokens whose KV was loaded, or was to be.",
    "tokens_hit_device": "Those of them that the daemon's device tier held.",
    "tokens_hit_host": "Those that were in host memory.",
    "tokens_hit_disk": "Those that were on disk.",
    "tokens_hit_redis": "Those that were in Redis.",
    "tokens_hit_peer": "Those that another daemon held.",
    "load_failures": "Requests that computed what could not be loaded.",
    "stores_skipped": "Stores put off because the engine needed its blocks.",
    "chunks_loaded": "Chunks loaded from the daemon.",
    "chunks_failed": "Chunks that were to be loaded and did not come.",
    "chunks_stored": "Chunks stored in the daemon.",
    "load_seconds": "Seconds spent loading, in the background.",
    "store_seconds": "Seconds spent storing, in the background.",
}


class StoreStats(KVConnectorStats):
    """Counts since the last report, by the names in `COUNTERS`."""

    def reset(self) -> None:
        """Forget all counts."""
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> StoreStats:
        """Add the counts of *other*."""
        for name, count in other.data.items():
            self.data[name] = self.data.get(name, 0) + count
        return self

    def reduce(self) -> dict[str, int | float]:
        """Return what the log says of an interval."""
        return {f"kvstore {name}": round(count, 3) for name, count in self.data.items() if count}

    def is_empty(self) -> bool:
        """Whether nothing has happened."""
        return not any(self.data.values())


class StoreMetrics(KVConnectorPromMetrics):
    """The same counts for Prometheus, for every engine of a server."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Mapping[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        counters = {
            name: metric_types[Counter](f"vllm:kvstore_{name}", text, labelnames=labelnames)
            for name, text in COUNTERS.items()
        }
        self._counters = {
            engine: {name: counter.labels(*values) for name, counter in counters.items()}
            for engine, values in per_engine_labelvalues.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add the counts of one report."""
        for name, count in transfer_stats_data.items():
            if name in COUNTERS:
                self._counters[engine_idx][name].inc(count)


def stats_since(counts: Any, reported: dict[str, float]) -> StoreStats | None:
    """Return what *counts* has grown by since *reported*, which is brought up to date."""
    grown: dict[str, float] = {}
    for name in counts.__slots__:
        count = getattr(counts, name)
        if delta := count - reported.get(name, 0):
            grown[name], reported[name] = delta, count
    return StoreStats(data=grown) if grown else None

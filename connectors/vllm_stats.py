"""What the connector has done, in vLLM's own statistics: its log lines and its `/metrics`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Final

from prometheus_client import Counter
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from kvstore.compression.guard import ERROR_EDGES, CodecCounters
from kvstore.gpu.counters import MEANINGS, DeviceCounters

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
    "handoffs_opened": "Requests whose chunks were handed over to a decode engine.",
    "handoffs_taken": "Requests whose chunks a prefill engine handed over.",
    "tokens_handed": "Tokens that were to be loaded from hand-offs.",
    "load_failures": "Requests that computed what could not be loaded.",
    "stores_skipped": "Stores put off because the engine needed its blocks.",
    "chunks_loaded": "Chunks loaded from the daemon.",
    "chunks_failed": "Chunks that were to be loaded and did not come.",
    "chunks_stored": "Chunks stored in the daemon.",
    "chunks_damaged": "Chunks whose stored bytes were wrong; they are deleted and computed.",
    "codec_raw_bytes": "Bytes of stored chunks as the engine has them.",
    "codec_stored_bytes": "Bytes of the same chunks as a codec has left them.",
    "codec_chunks_unfit": "Chunks that were not stored because they do not fit their codec.",
    "load_seconds": "Seconds spent loading, in the background.",
    "store_seconds": "Seconds spent storing, in the background.",
    **{f"gpu_{name}": f"On GPUs: {text}" for name, text in MEANINGS.items()},
}

LABELLED: Final = {
    "codec_sections": (("codec",), "Sections of chunks by the codec that they were given."),
    "codec_fallbacks": (("codec", "taken"), "Sections given a safer codec than was asked for."),
    "codec_errors": (("codec", "at_most"), "Sections by codec and relative error of their values."),
}
"""Counters with labels of their own, which reports give behind the name, with colons between."""


class StoreStats(KVConnectorStats):
    """Counts since the last report, by the names in `COUNTERS` and `LABELLED`."""

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
        plain = {name: count for name, count in self.data.items() if name in COUNTERS}
        return {f"kvstore {name}": round(count, 3) for name, count in plain.items() if count}

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
        self._engines = per_engine_labelvalues
        self._labelled = {
            name: metric_types[Counter](
                f"vllm:kvstore_{name}", text, labelnames=[*labelnames, *own]
            )
            for name, (own, text) in LABELLED.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add the counts of one report."""
        for name, count in transfer_stats_data.items():
            plain, *labels = name.split(":")
            if name in COUNTERS:
                self._counters[engine_idx][name].inc(count)
            elif plain in LABELLED:
                values = (*self._engines[engine_idx], *labels)
                self._labelled[plain].labels(*values).inc(count)


def codec_figures(counters: CodecCounters, damaged_chunks: int) -> dict[str, float]:
    """Return what *counters* of codecs, and loads, have come to, by the names of reports."""
    figures: dict[str, float] = {
        "codec_raw_bytes": counters.raw_bytes,
        "codec_stored_bytes": counters.stored_bytes,
        "codec_chunks_unfit": counters.refused,
        "chunks_damaged": damaged_chunks,
    }
    for codec, sections in counters.sections.items():
        figures[f"codec_sections:{codec}"] = sections
    for (codec, taken), sections in counters.fallbacks.items():
        figures[f"codec_fallbacks:{codec}:{taken}"] = sections
    for codec, histogram in counters.errors.items():
        for edge, sections in zip((*ERROR_EDGES, "inf"), histogram, strict=True):
            figures[f"codec_errors:{codec}:{edge}"] = sections
    return figures


def device_figures(counted: Iterable[DeviceCounters]) -> dict[str, float]:
    """Return what GPUs have moved, and every fallback, by the names of reports."""
    each = [counters.values() for counters in counted]
    return {f"gpu_{name}": sum(one[name] for one in each) for name in MEANINGS}


def stats_since(
    counts: Any, reported: dict[str, float], figures: Mapping[str, float] = MappingProxyType({})
) -> StoreStats | None:
    """Return what *counts* and *figures* have grown by since *reported*, brought up to date."""
    now = {name: getattr(counts, name) for name in counts.__slots__} | dict(figures)
    grown: dict[str, float] = {}
    for name, count in now.items():
        if delta := count - reported.get(name, 0):
            grown[name], reported[name] = delta, count
    return StoreStats(data=grown) if grown else None

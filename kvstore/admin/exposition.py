"""The daemon's figures for Prometheus; docs/metrics.md has every name and what always holds.

Labels come from closed lists of ours: tiers, outcomes, reasons, kinds of requests. Tenants,
namespaces and models are never labels: their number is not ours to bound, nor theirs to show.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from kvstore.admin.routes import Text
from kvstore.limits import ADMIN_SNAPSHOT_SECONDS
from kvstore.metrics import ENGINE_GPU_COUNTERS
from kvstore.types import TierKind

if TYPE_CHECKING:
    from kvstore.admin.subject import Subject
    from kvstore.protocol.messages import DaemonStats, TierStats

_MEDIA_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

# Name without prefix and `_total`: (what it counts, label, (label value, counter) ...).
_COUNTERS: Final[dict[str, tuple[str, str, tuple[tuple[str, str], ...]]]] = {
    "lookup_chunks": (
        "Chunks asked for in look-ups; all outcomes add up to the keys asked.",
        "outcome",
        tuple(
            (outcome, f"lookup_chunks_{outcome}")
            for outcome in ("ready", "arriving", "declined", "unavailable", "miss")
        ),
    ),
    "load_chunks": (
        "Chunks of loads; late ones did not come up in time.",
        "outcome",
        (
            ("loaded", "load_chunks"),
            ("declined", "load_chunks_declined"),
            ("late", "load_chunks_late"),
        ),
    ),
    "reserve_chunks": (
        "Chunks for which room was asked.",
        "outcome",
        tuple(
            (outcome, f"reserve_chunks_{outcome}")
            for outcome in ("reserved", "present", "arriving", "no_space")
        ),
    ),
    "store_chunks": (
        "Reserved chunks, by what became of them.",
        "outcome",
        (("committed", "commit_chunks"), ("aborted", "abort_chunks")),
    ),
    "promote_chunks": (
        "Chunks on their way from slower tiers to the host tier.",
        "outcome",
        (
            ("promoted", "promote_chunks"),
            ("joined", "promote_chunks_joined"),
            ("failed", "promote_chunks_failed"),
            ("cancelled", "promote_chunks_cancelled"),
        ),
    ),
    "handoffs": (
        "Hand-offs of this host, by what became of them.",
        "outcome",
        tuple((word, f"handoffs_{word}") for word in ("opened", "taken", "broken", "expired")),
    ),
    "handoff_chunks": (
        "Chunks of hand-offs.",
        "outcome",
        tuple((word, f"handoff_chunks_{word}") for word in ("published", "ready", "pulled")),
    ),
    "peer_bytes": (
        "Bytes sent to and received from daemons of other hosts.",
        "direction",
        (("sent", "peer_sent_bytes"), ("received", "peer_received_bytes")),
    ),
    "peer_sessions": (
        "Daemons of other hosts that called.",
        "outcome",
        (("opened", "peer_sessions_opened"), ("refused", "peer_sessions_refused")),
    ),
    "recover_shards": (
        "Shards that an earlier daemon had left in memory.",
        "outcome",
        (("kept", "recover_shards"), ("dropped", "recover_shards_dropped")),
    ),
    "demote_chunks": (
        "Chunks that were to leave the host tier for a slower one.",
        "outcome",
        (("demoted", "demote_chunks"), ("dropped", "demote_chunks_dropped")),
    ),
    "transcode_chunks": (
        "Chunks on their way to a tier with a codec of its own.",
        "outcome",
        (
            ("smaller", "transcode_chunks"),
            ("kept", "transcode_chunks_kept"),
            ("failed", "transcode_chunks_failed"),
        ),
    ),
    "transcode_bytes": (
        "Bytes of the chunks that were made smaller.",
        "moment",
        (("before", "transcode_bytes_before"), ("after", "transcode_bytes_after")),
    ),
}
_PLAIN_COUNTERS: Final = {
    "load_bytes": ("load_bytes", "Bytes leased to engines for loading."),
    "store_bytes": ("commit_bytes", "Bytes of committed chunks."),
    "promote_bytes": ("promote_bytes", "Bytes brought up to the host tier."),
    "prefetch_chunks": ("prefetch_chunks", "Chunks brought up ahead of need."),
    "deleted_chunks": ("delete_chunks", "Chunks removed because somebody asked for it."),
    "checksum_failures": ("checksum_failures", "Chunks whose bytes were not what they should be."),
    "lease_expirations": ("lease_expirations", "Leases that nobody let go of in time."),
    "peer_faults": ("peer_faults", "Connections to or from other daemons that failed."),
    "directory_chunks_told": (
        "directory_chunks_told",
        "Chunks that the directory was told of, come or gone.",
    ),
    "directory_failures": ("directory_failures", "Tries to tell the directory that failed."),
    "pull_failures": ("pull_failures", "Chunks of hand-offs that did not come from their host."),
    "peer_nixl_bytes": ("peer_nixl_bytes", "Received bytes that were read by NIXL."),
    "peer_nixl_fallbacks": ("peer_nixl_fallbacks", "Batches that came by TCP in place of NIXL."),
    "unrecorded_shards": ("unrecorded_shards", "Shards that a restart would not find in memory."),
    "evicted_bytes": ("evict_bytes", "Bytes that left the host tier to make room."),
    "hints": ("hints", "Hints taken from engines."),
    "sessions_opened": ("sessions_opened", "Sessions taken in."),
    "sessions_refused": ("sessions_refused", "Connections refused."),
    "session_errors": ("session_errors", "Sessions that ended with an error."),
    "requests": ("requests", "Requests on the data socket."),
    "request_errors": ("request_errors", "Requests answered with an error."),
}


class Exposition(Collector):
    """Reads *subject* when it is asked, and at most a few times a second."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        self._text = Text(b"", _MEDIA_TYPE)
        self._made_at = float("-inf")

    def text(self) -> Text:
        """Return all figures, as they are or were a fraction of a second ago."""
        now = time.monotonic()
        if now - self._made_at >= ADMIN_SNAPSHOT_SECONDS:
            self._text = Text(generate_latest(self._registry), _MEDIA_TYPE)
            self._made_at = now
        return self._text

    def describe(self) -> Iterable[Metric]:
        """Return nothing: names do not depend on anything."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Yield every figure."""
        stats = self._subject.stats()
        yield InfoMetricFamily("kvstore_build", "Version.", {"version": stats.version})
        yield InfoMetricFamily(
            "kvstore_peer_transport",
            "How bytes of other hosts' hand-offs come.",
            {"transport": stats.peer_transport},
        )
        yield from _counters(stats)
        for name, text in ENGINE_GPU_COUNTERS.items():
            value = stats.engine_gpu[name]
            yield CounterMetricFamily(f"kvstore_engine_gpu_{name}", text, value=value)
        yield from self._tiers(stats)
        yield from _gauges(stats)
        yield self._durations()

    def _tiers(self, stats: DaemonStats) -> Iterator[Metric]:
        yield from _tier_gauges(stats.tiers)
        yield from _tier_counters(stats)
        flows = _labelled("tier_bytes", "Bytes of chunks that came into a tier, or left it.")
        stored = GaugeMetricFamily(
            "kvstore_tier_stored_bytes", "Bytes of chunks as they are kept.", labels=["tier"]
        )
        raw = GaugeMetricFamily(
            "kvstore_tier_raw_bytes", "Bytes of chunks without any codec.", labels=["tier"]
        )
        for tier in stats.tiers:
            held = self._subject.store.holdings(TierKind[tier.tier.upper()])
            flows.add_metric([tier.tier, "in"], held.entered_bytes)
            flows.add_metric([tier.tier, "out"], held.left_bytes)
            stored.add_metric([tier.tier], held.stored_bytes)
            raw.add_metric([tier.tier], held.raw_bytes)
        yield from (flows, stored, raw)
        yield from _codec_gauges(stats)

    def _durations(self) -> Metric:
        durations = HistogramMetricFamily(
            "kvstore_request_duration_seconds",
            "From the arrival of a request to its answer.",
            labels=["op"],
        )
        for op, histogram in sorted(self._subject.latencies.by_op.items()):
            buckets, below = [], 0
            for bound, count in zip(histogram.bounds, histogram.counts, strict=False):
                below += count
                buckets.append((repr(bound), float(below)))
            buckets.append(("+Inf", float(histogram.count)))
            durations.add_metric([op], buckets, histogram.total)
        return durations


def _codec_gauges(stats: DaemonStats) -> Iterator[Metric]:
    for name, text in (
        ("stored_bytes", "Bytes of chunks as they are kept, by codec of their namespace."),
        ("raw_bytes", "Bytes of the same chunks without any codec."),
    ):
        family = GaugeMetricFamily(f"kvstore_codec_{name}", text, labels=["tier", "codec"])
        for one in stats.codecs:
            family.add_metric([one.tier, one.codec], getattr(one, name))
        yield family


def _counters(stats: DaemonStats) -> Iterator[Metric]:
    counters = stats.counters
    for name, (text, label, values) in _COUNTERS.items():
        family = CounterMetricFamily(f"kvstore_{name}", text, labels=[label])
        for value, counter in values:
            family.add_metric([value], counters[counter])
        yield family
    for name, (counter, text) in _PLAIN_COUNTERS.items():
        yield CounterMetricFamily(f"kvstore_{name}", text, value=counters[counter])


def _gauges(stats: DaemonStats) -> Iterator[Metric]:
    for name, text, value in (
        ("uptime_seconds", "Since the start.", stats.uptime_seconds),
        ("resident_memory_bytes", "The daemon's own memory, without the arena.", None),
        ("draining", "Whether the daemon is shutting down.", stats.state == "draining"),
        ("sessions", "Sessions that are open.", stats.sessions),
        ("leases", "Leases that are held.", stats.leases),
        ("reservations", "Chunks that are being written.", stats.reservations),
        ("namespaces", "Namespaces that are known.", stats.namespaces_count),
        ("arena_bytes", "Size of the arena.", stats.arena.size_bytes),
        ("arena_backed_bytes", "Of the arena: backed by memory.", stats.arena.prefaulted_bytes),
    ):
        shown = stats.resident_bytes if value is None else value
        yield GaugeMetricFamily(f"kvstore_{name}", text, value=float(shown))


def _tier_gauges(tiers: Iterable[TierStats]) -> Iterator[Metric]:
    shown = list(tiers)
    gauges: tuple[tuple[str, str, Callable[[TierStats], float]], ...] = (
        ("tier_capacity_bytes", "Size; 0 where it is not ours.", lambda t: t.capacity_bytes),
        ("tier_used_bytes", "In use, padding and checksums included.", lambda t: t.used_bytes),
        ("tier_largest_free_bytes", "Largest free run.", lambda t: t.largest_free_bytes),
        ("tier_chunks", "Chunks that are kept.", lambda t: t.chunks),
        (
            "breaker_open",
            "Whether it fails and is left alone.",
            lambda t: t.state != "ready",
        ),
        ("queue_chunks", "Chunks that wait to be written there.", lambda t: t.queued_chunks),
        ("queue_bytes", "Bytes that wait to be written there.", lambda t: t.queued_bytes),
    )
    for name, text, of in gauges:
        family = GaugeMetricFamily(f"kvstore_{name}", text, labels=["tier"])
        for tier in shown:
            family.add_metric([tier.tier], float(of(tier)))
        yield family


def _tier_counters(stats: DaemonStats) -> Iterator[Metric]:
    hits = _labelled_by_tier("hit_chunks", "Chunks found in look-ups, by their fastest tier.")
    evictions = _labelled_by_tier("evicted_chunks", "Chunks that left to make room.")
    failures = _labelled_by_tier("tier_failures", "Calls that failed.")
    timeouts = _labelled_by_tier("tier_timeouts", "Calls that were given up.")
    trips = _labelled_by_tier("breaker_trips", "How often it was found to fail.")
    dropped = _labelled_by_tier("dropped_writes", "Chunks for which the queue was too long.")
    transfers = CounterMetricFamily(
        "kvstore_transfer_bytes",
        "Bytes read from and written to a slower tier.",
        labels=["tier", "direction"],
    )
    for tier in stats.tiers:
        hits.add_metric([tier.tier], tier.hit_chunks)
        if tier.tier == "host":
            evictions.add_metric([tier.tier], stats.counters["evict_chunks"])
            continue
        of = tier.counters
        evictions.add_metric([tier.tier], of["evict_chunks"])
        failures.add_metric([tier.tier], of["failures"])
        timeouts.add_metric([tier.tier], of["timeouts"])
        trips.add_metric([tier.tier], of["breaker_trips"])
        dropped.add_metric([tier.tier], of["dropped_writes"])
        transfers.add_metric([tier.tier, "read"], of["read_bytes"])
        transfers.add_metric([tier.tier, "write"], of["write_bytes"])
    yield from (hits, evictions, failures, timeouts, trips, dropped, transfers)


def _labelled_by_tier(name: str, text: str) -> CounterMetricFamily:
    return CounterMetricFamily(f"kvstore_{name}", text, labels=["tier"])


def _labelled(name: str, text: str) -> CounterMetricFamily:
    return CounterMetricFamily(f"kvstore_{name}", text, labels=["tier", "direction"])

"""`kvstore status` for people."""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.cli.tables import align
from kvstore.protocol.messages import ArenaStats, DaemonStats, TierStats
from kvstore.units import round_size

_DURATION_STEPS = ((86_400, "d"), (3_600, "h"), (60, "min"))


def render(stats: DaemonStats) -> str:
    """Return *stats* as a few paragraphs; counters that are still zero are left out."""
    paragraphs = [_summary(stats), _tiers(stats)]
    slower = [tier for tier in stats.tiers if tier.write]
    if slower:
        paragraphs.append(_slower(slower))
    if any(one.stored_bytes != one.raw_bytes for one in stats.codecs):
        paragraphs.append(_codecs(stats))
    if stats.tenants:
        paragraphs.append(_tenants(stats))
    if stats.namespaces:
        paragraphs.append(_namespaces(stats))
    counted = [(name, f"{count:,}") for name, count in stats.counters.items() if count]
    if counted:
        paragraphs.append(align(counted, right={1}))
    for tier in slower:
        own = [(f"{tier.tier} {name}", f"{n:,}") for name, n in tier.counters.items() if n]
        if own:
            paragraphs.append(align(own, right={1}))
    on_gpu = [(f"gpu {name}", f"{count:,}") for name, count in stats.engine_gpu.items() if count]
    if on_gpu:
        paragraphs.append(align(on_gpu, right={1}))
    return "\n\n".join("\n".join(lines) for lines in paragraphs)


def _summary(stats: DaemonStats) -> list[str]:
    held = f"{stats.sessions} sessions, {stats.leases} leases, {stats.reservations} reservations"
    rows = [
        ("daemon", f"kvstore {stats.version}, {stats.state}, pid {stats.pid}"),
        ("up", _rough_duration(stats.uptime_seconds)),
        ("socket", stats.socket),
        ("memory", f"{round_size(stats.resident_bytes)} resident"),
        ("arena", _arena(stats.arena)),
        ("in use", held),
    ]
    if stats.peer_transport != "tcp":
        rows.append(("peers", stats.peer_transport))
    return align(rows)


def _arena(arena: ArenaStats) -> str:
    backed = 100 * arena.prefaulted_bytes // max(arena.size_bytes, 1)
    huge_pages = "on" if arena.huge_pages else "off"
    return (
        f"{arena.kind}, {round_size(arena.size_bytes)}, {backed}% backed, huge pages {huge_pages}"
    )


def _tiers(stats: DaemonStats) -> list[str]:
    rows = [("tier", "capacity", "used", "", "largest free", "chunks", "hits")]
    for tier in stats.tiers:
        # A server that hosts share keeps its own accounts.
        known = tier.capacity_bytes > 0
        share = 100 * tier.used_bytes / max(tier.capacity_bytes, 1)
        rows.append(
            (
                tier.tier,
                round_size(tier.capacity_bytes) if known else "-",
                round_size(tier.used_bytes),
                f"{share:.0f}%" if known else "-",
                round_size(tier.largest_free_bytes) if known else "-",
                f"{tier.chunks:,}",
                f"{tier.hit_chunks:,}",
            )
        )
    return align(rows, right={1, 2, 3, 4, 5, 6})


def _slower(tiers: Sequence[TierStats]) -> list[str]:
    rows = [("tier", "state", "write", "queued", "", "read", "write", "a call")]
    rows += [
        (
            tier.tier,
            tier.state,
            tier.write,
            f"{tier.queued_chunks:,} chunks",
            round_size(tier.queued_bytes),
            f"{round_size(tier.read_bytes_per_second)}/s",
            f"{round_size(tier.write_bytes_per_second)}/s",
            f"{1000 * tier.read_seconds:.1f} ms",
        )
        for tier in tiers
    ]
    return align(rows, right={3, 4, 5, 6, 7})


def _codecs(stats: DaemonStats) -> list[str]:
    """Show what codecs save: that of the namespace, and where a tier has one, that one's, too."""
    own = {tier.tier: tier.codec for tier in stats.tiers if tier.codec}
    rows = [("codec", "tier", "raw", "stored", "ratio")]
    rows += [
        (
            f"{one.codec}, {own[one.tier]}" if one.tier in own else one.codec,
            one.tier,
            round_size(one.raw_bytes),
            round_size(one.stored_bytes),
            f"{one.raw_bytes / one.stored_bytes:.2f}",
        )
        for one in stats.codecs
    ]
    return align(rows, right={2, 3, 4})


def _tenants(stats: DaemonStats) -> list[str]:
    rows = [("tenant", "tier", "chunks", "used", "quota", "floor")]
    rows += [
        (
            one.tenant or "(none)",
            one.tier,
            f"{one.chunks:,}",
            round_size(one.used_bytes),
            round_size(one.quota_bytes),
            round_size(one.floor_bytes),
        )
        for one in stats.tenants
    ]
    return align(rows, right={2, 3, 4, 5})


def _namespaces(stats: DaemonStats) -> list[str]:
    rows = [
        ("namespace", "model", "group", "dtype", "codec", "tokens/chunk", "bytes/chunk", "chunks")
    ]
    rows += [
        (
            space.namespace[:12],
            space.model,
            space.group,
            space.dtype,
            space.codec,
            str(space.chunk_tokens),
            round_size(space.chunk_bytes),
            f"{space.chunks:,}",
        )
        for space in stats.namespaces
    ]
    lines = align(rows, right={5, 6, 7})
    hidden = stats.namespaces_count - len(stats.namespaces)
    return [*lines, f"and {hidden:,} more"] if hidden > 0 else lines


def _rough_duration(seconds: float) -> str:
    for factor, unit in _DURATION_STEPS:
        if seconds >= factor:
            return f"{seconds / factor:.1f} {unit}"
    return f"{seconds:.1f} s"

"""The composition root: configuration -> objects -> tasks. The only file that wires."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from kvstore.admin.exposure import Exposure
from kvstore.admin.subject import Subject
from kvstore.config import AdminConfig, Config, WritePolicy
from kvstore.daemon.address import SocketAddress
from kvstore.daemon.handoffs import keep_handoffs
from kvstore.daemon.lifecycle import feed_watchdog, heed_signals, keep_house, prefault
from kvstore.daemon.peer_setup import serve_peers, set_up_peers
from kvstore.daemon.peer_share_setup import open_peer_tier, set_up_sharing, share
from kvstore.daemon.peers import Admission
from kvstore.daemon.reload import Reloaded, Reloader, is_reloadable
from kvstore.daemon.server import Server
from kvstore.daemon.spans import Recorder
from kvstore.daemon.systemd import notify, take_sockets
from kvstore.daemon.tenants import Tenants
from kvstore.daemon.warm import WarmStart
from kvstore.errors import CodecError, ConfigError, TierError
from kvstore.events import Events
from kvstore.limits import (
    EXTENT_ALIGNMENT_BYTES,
    GIB,
    TIER_TIMEOUT_SECONDS,
)
from kvstore.metrics import Counters
from kvstore.store.admission import make_admission
from kvstore.store.device import DeviceRoom
from kvstore.store.mover import Mover
from kvstore.store.quota import Share, Shares
from kvstore.store.shelves import NO_TENANT, SlowTier
from kvstore.store.stock import take_stock
from kvstore.store.store import Store
from kvstore.store.transcode import Transcoder
from kvstore.tiers.base import DurableTier, RemoteTier
from kvstore.tiers.disk_open import open_disk_tier
from kvstore.tiers.guard import GuardedTier
from kvstore.tiers.host import HostTier, make_memory
from kvstore.tiers.peer_reads import PEER_TIER_SECONDS
from kvstore.types import TierKind
from kvstore.units import format_size

if TYPE_CHECKING:
    from kvstore.admin.server import Admin

_UNBOUNDED_BYTES: Final = 1 << 62
# What an admission takes for the capacity of a tier that does not tell its own.
_ASSUMED_BYTES: Final = 1024 * GIB
_SHORT_TURN_SECONDS: Final = 0.0005

log = logging.getLogger(__name__)


class OpenTier(NamedTuple):
    """A slower tier that is open, and how it is to be used."""

    tier: RemoteTier
    write: WritePolicy
    admission: str
    eviction: str
    timeout_seconds: float = TIER_TIMEOUT_SECONDS
    is_elsewhere: bool = False
    """Whether it is reached over a connection, which may not be there at the start."""
    transcoder: Transcoder | None = None
    """What makes chunks smaller on their way there."""


OpenTiers = Callable[[Config], Awaitable[list[OpenTier]]]


async def open_tiers(config: Config) -> list[OpenTier]:
    """Open the slower tiers that are configured, fastest first; raises `ConfigError`.

    A server that cannot be reached is no error: its tier fails until it can be.
    """
    opened: list[OpenTier] = []
    if config.tiers.device.capacity_bytes:
        opened.append(await _open_device(config))
    disk, redis = config.tiers.disk, config.tiers.redis
    for_disk, for_redis = _transcoder("disk", disk.codec), _transcoder("redis", redis.codec)
    if disk.path:
        tier = await open_disk_tier(
            Path(disk.path), capacity_bytes=disk.capacity_bytes, direct=disk.direct == "auto"
        )
        opened.append(
            OpenTier(tier, disk.write, disk.admission, disk.eviction, transcoder=for_disk)
        )
    if redis.url:
        # What it stands on takes longer to import than all else: not for those without it.
        from kvstore.tiers.redis import RedisTier  # noqa: PLC0415
        from kvstore.tiers.redis_settings import redis_settings  # noqa: PLC0415

        shared = RedisTier(redis_settings(redis))
        opened.append(
            OpenTier(
                shared,
                redis.write,
                redis.admission,
                "lru",
                redis.timeout_seconds,
                is_elsewhere=True,
                transcoder=for_redis,
            )
        )
    peer = open_peer_tier(config)
    if peer is not None:
        opened.append(OpenTier(peer, "never", "all", "lru", PEER_TIER_SECONDS, is_elsewhere=True))
    return opened


async def _open_device(config: Config) -> OpenTier:
    """Open the device tier; raises `ConfigError`, also for what it cannot promise."""
    tiers = config.tiers
    if tiers.host.checksum == "off":
        raise ConfigError("tiers.device needs tiers.host.checksum: engines verify what they load")
    slower = ((tiers.disk.path, tiers.disk.write), (tiers.redis.url, tiers.redis.write))
    if any(is_on and write == "through" for is_on, write in slower):
        raise ConfigError("tiers.device cannot be used beside a tier that is written through")
    # CUDA's libraries, for those alone who have the tier.
    from kvstore.tiers.device_open import open_device_tier  # noqa: PLC0415

    device = tiers.device
    tier = await asyncio.to_thread(open_device_tier, device.gpu, device.capacity_bytes)
    return OpenTier(tier, "never", "all", "s3fifo")


def _transcoder(tier: str, codec: str) -> Transcoder | None:
    try:
        return Transcoder(codec) if codec else None
    except CodecError as error:
        raise ConfigError(f"tiers.{tier}.codec: {error}") from error


def run(
    config: Config,
    open_slower: OpenTiers = open_tiers,
    reread: Callable[[], Config] | None = None,
) -> int:
    """Serve until SIGTERM or SIGINT; return the exit status.

    *open_slower* makes the tiers below the host tier; *reread* gives the configuration anew,
    when SIGHUP asks for it. Raises `ConfigError` and `AddressInUseError` before anything is
    served.
    """
    if not __debug__:
        raise ConfigError("kvstore does not run under python -O: its assertions guard the data")
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_serve(config, open_slower, reread or (lambda: config)))
    return 0


async def _serve(config: Config, open_slower: OpenTiers, reread: Callable[[], Config]) -> None:
    exposure = Exposure(config.admin)
    address = SocketAddress(config.server.socket, config.server.socket_mode, take_sockets())
    listening = address.bind()
    try:
        slower = await open_slower(config)
        try:
            await _serve_over(config, slower, address, listening, reread, exposure)
        finally:
            for opened in slower:
                opened.tier.close()
    finally:
        listening.close()
        address.release()


async def _serve_over(
    config: Config,
    slower: list[OpenTier],
    address: SocketAddress,
    listening: socket.socket,
    reread: Callable[[], Config],
    exposure: Exposure,
) -> None:
    store = _make_store(config, slower)
    try:
        await _take_stock(store, slower)
        loop = asyncio.get_running_loop()
        mover = Mover(store, clock=loop.time, in_thread=asyncio.to_thread)
        guards = [_connect(mover, opened, loop.time) for opened in slower]
        for guard in guards:
            if guard.kind is TierKind.DEVICE:
                store.device = DeviceRoom(store, guard, mover.bring)
        # After the others: what differs from a copy in a slower tier is removed there.
        warm = WarmStart(
            store,
            verify_loads=config.tiers.host.verify_load,
            grace_seconds=config.leases.orphan_grace_seconds,
        )
        server = _make_server(config, store, mover, address)
        set_up_peers(config, server)
        set_up_sharing(config, server)
        await server.start(listening)
        # What is here now stays: to look through it for garbage would only hold the loop.
        gc.freeze()
        log.info(
            "ready",
            extra={"socket": str(address.path), "arena_bytes": store.host.arena.size_bytes},
        )
        reloader = Reloader(server, config, reread)

        def reload() -> Reloaded:
            tokens = exposure.reread()
            reloaded = reloader.reload()
            exposure.take(tokens)
            return reloaded

        # From here on systemd may say anything.
        stopped = heed_signals(reload)
        notify("READY=1", f"STATUS=serving {format_size(config.tiers.host.capacity_bytes)}")
        to_greet = [guard for guard, one in zip(guards, slower, strict=True) if one.is_elsewhere]
        admin = partial(_serve_admin, server, reloader, reload, exposure)
        await _live(reloader, server, warm, to_greet, admin, stopped)
    finally:
        store.host.close()


async def _live(
    reloader: Reloader,
    server: Server,
    warm: WarmStart,
    to_greet: Sequence[GuardedTier],
    admin: Callable[[], Coroutine[None, None, None]],
    stopped: Awaitable[str],
) -> None:
    """Run the background tasks until a signal comes, then drain."""
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(keep_house(server.store), name="housekeeping"),
            group.create_task(feed_watchdog(), name="watchdog"),
            group.create_task(warm.settle(), name="warm start"),
            group.create_task(server.mover.run(), name="mover"),
            group.create_task(admin(), name="admin API"),
            group.create_task(keep_handoffs(server.handoffs), name="hand-offs"),
            group.create_task(serve_peers(server), name="peers"),
            group.create_task(share(server), name="sharing"),
            *(group.create_task(tier.greet(), name="greeting") for tier in to_greet),
        ]
        if server.store.device is not None:
            promoting = server.store.device.promotions.run()
            tasks.append(group.create_task(promoting, name="promotions"))
        if reloader.config.tiers.host.prefault:
            tasks.append(group.create_task(prefault(server.store.host.arena), name="prefault"))
        stopped_by = await stopped
        log.info("draining", extra={"signal": stopped_by})
        notify("STOPPING=1", "STATUS=draining")
        drain_seconds = reloader.config.server.drain_timeout_seconds
        await server.drain(drain_seconds)
        _save_device_memory(server)
        lost = await server.mover.drain(drain_seconds)
        if lost:
            log.warning("chunks not written before the end", extra={"chunks": lost})
        if server.recorder is not None:
            await asyncio.to_thread(server.recorder.close)
        for task in tasks:
            task.cancel()


def _save_device_memory(server: Server) -> None:
    """Have what lies on the device alone copied to where it outlives the daemon, if that is."""
    routes = server.mover.routes.values()
    if server.store.device is None:
        return
    server.store.device.promotions.stop()
    if server.store.host.records is not None or any(one.policy != "never" for one in routes):
        server.store.device.demote_all()


async def _serve_admin(
    server: Server, reloader: Reloader, reload: Callable[[], Reloaded], exposure: Exposure
) -> None:
    """Serve the admin API until cancelled. Whatever becomes of it, engines are served."""
    config = reloader.config.admin
    if config.listen is None:
        return
    events = Events()
    server.store.history.start(time.time)
    logging.getLogger("kvstore").addHandler(events)
    subject = Subject(
        store=server.store,
        mover=server.mover,
        events=events,
        latencies=server.latencies,
        tracing=server.tracing,
        socket=server.address.path,
        is_reloadable=is_reloadable,
        stats=server.stats,
        config=lambda: reloader.config,
        reload=reload,
        prefetch=server.hints.prefetch,
    )
    try:
        admin = await asyncio.to_thread(_make_admin, config, exposure, subject)
        await admin.run()
    except ConfigError as error:
        log.error("admin API is not served", extra={"reason": str(error)})  # no trace
    except Exception:
        log.exception("admin API has ended")
    finally:
        logging.getLogger("kvstore").removeHandler(events)


def _make_admin(config: AdminConfig, exposure: Exposure, subject: Subject) -> Admin:
    """Return the admin API. In a thread: it may ask for this host's full name, and wait for it.

    What it stands on takes longer to import than the daemon to start. Meanwhile threads take
    short turns at the interpreter, so that engines are answered.
    """
    usual_seconds = sys.getswitchinterval()
    sys.setswitchinterval(_SHORT_TURN_SECONDS)
    try:
        from kvstore.admin.server import Admin  # noqa: PLC0415

        return Admin(config, exposure, subject)
    finally:
        sys.setswitchinterval(usual_seconds)


async def _take_stock(store: Store, slower: Sequence[OpenTier]) -> None:
    """Put what durable tiers have kept into the index; one that fails starts empty."""
    for opened in slower:
        if opened.tier.kind is TierKind.DISK:
            durable: DurableTier = opened.tier  # type: ignore[assignment]  # as its kind says
            try:
                stock = await asyncio.to_thread(take_stock, store, durable)
            except TierError as error:
                log.warning("nothing recovered", extra={"tier": "disk", "reason": str(error)})
            else:
                log.info("chunks recovered", extra={"tier": "disk", **stock._asdict()})


def _connect(mover: Mover, opened: OpenTier, clock: Callable[[], float]) -> GuardedTier:
    guarded = GuardedTier(opened.tier, clock=clock, timeout_seconds=opened.timeout_seconds)
    capacity = opened.tier.usage().capacity_bytes or _ASSUMED_BYTES
    admission = make_admission(opened.admission, capacity)
    mover.add(guarded, opened.write, admission, opened.transcoder)
    return guarded


def _make_store(config: Config, slower: Sequence[OpenTier]) -> Store:
    host = config.tiers.host
    size_bytes = host.capacity_bytes - host.capacity_bytes % EXTENT_ALIGNMENT_BYTES
    checksums = host.checksum == "xxh3"
    memory = make_memory(
        host.arena, size_bytes, huge_pages=host.huge_pages == "auto", checksums=checksums
    )
    tier = HostTier(memory, checksums=checksums, verification=host.verify_commit)
    return Store(
        tier,
        eviction=host.eviction,
        lease_ttl_seconds=config.leases.ttl_seconds,
        counters=Counters(),
        tenants=_host_shares(config),
        slower=[_known(config, opened) for opened in slower],
    )


def _known(config: Config, opened: OpenTier) -> SlowTier:
    """Return *opened* as the store knows it; a server keeps its own accounts."""
    kind = opened.tier.kind
    if kind is TierKind.DISK:
        capacity = opened.tier.usage().capacity_bytes
        return SlowTier(kind, opened.eviction, Shares("disk", capacity, _disk_shares(config)))
    nameless = [Share(share.tenant) for share in _host_shares(config)]
    return SlowTier(kind, opened.eviction, Shares(kind.name.lower(), _UNBOUNDED_BYTES, nameless))


def _host_shares(config: Config) -> list[Share]:
    tenants = config.tenants.items()
    named = [Share(name, of.quota_bytes or None, of.floor_bytes) for name, of in tenants]
    return [Share(NO_TENANT), *named]


def _disk_shares(config: Config) -> list[Share]:
    tenants = config.tenants.items()
    named = [Share(name, of.disk_quota_bytes or None, of.disk_floor_bytes) for name, of in tenants]
    return [Share(NO_TENANT), *named]


def _make_server(config: Config, store: Store, mover: Mover, address: SocketAddress) -> Server:
    return Server(
        store,
        mover,
        address,
        Admission(config.server.allowed_uids, config.server.allowed_gids),
        tenants=Tenants.of(config),
        sessions_max=config.server.sessions_max,
        orphan_grace_seconds=config.leases.orphan_grace_seconds,
        verify_loads=config.tiers.host.verify_load,
        prefaults=config.tiers.host.prefault,
        recorder=_open_recorder(config.tracing.endpoint),
    )


def _open_recorder(endpoint: str) -> Recorder | None:
    if not endpoint:
        return None
    try:
        from kvstore.daemon.otel import open_recorder  # noqa: PLC0415  # an extra
    except ImportError as error:
        raise ConfigError(
            f"tracing.endpoint needs OpenTelemetry ({error.name}): pip install 'kvstore[otel]'"
        ) from error
    return open_recorder(endpoint)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """Return uvloop's factory when it is installed, else asyncio's."""
    try:
        import uvloop  # noqa: PLC0415  # optional
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop

"""The composition root: configuration -> objects -> tasks. The only file that wires."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from kvstore.config import Config
from kvstore.daemon.address import SocketAddress
from kvstore.daemon.lifecycle import keep_house, notify, prefault, until_stopped
from kvstore.daemon.peers import Admission
from kvstore.daemon.server import Server
from kvstore.daemon.tenants import Tenants
from kvstore.daemon.warm import WarmStart
from kvstore.errors import ConfigError
from kvstore.limits import EXTENT_ALIGNMENT_BYTES
from kvstore.metrics import Counters
from kvstore.store.mover import Mover
from kvstore.store.store import Store
from kvstore.tiers.host import HostTier, make_memory

log = logging.getLogger(__name__)


def run(config: Config) -> int:
    """Serve until SIGTERM or SIGINT; return the exit status.

    Raises `ConfigError` and `AddressInUseError` before anything is served.
    """
    if not __debug__:
        raise ConfigError("kvstore does not run under python -O: its assertions guard the data")
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_serve(config))
    return 0


async def _serve(config: Config) -> None:
    address = SocketAddress(config.server.socket, config.server.socket_mode)
    listening = address.bind()
    try:
        store = _make_store(config)
        try:
            warm = WarmStart(
                store,
                verify_loads=config.tiers.host.verify_load,
                grace_seconds=config.leases.orphan_grace_seconds,
            )
            loop = asyncio.get_running_loop()
            mover = Mover(store, clock=loop.time, in_thread=asyncio.to_thread)
            server = _make_server(config, store, mover, address)
            await server.start(listening)
            log.info(
                "ready",
                extra={"socket": str(address.path), "arena_bytes": store.host.arena.size_bytes},
            )
            notify("READY=1")
            await _live(config, server, warm)
        finally:
            store.host.close()
    finally:
        listening.close()
        address.release()


async def _live(config: Config, server: Server, warm: WarmStart) -> None:
    """Run the background tasks until a signal comes, then drain."""
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(keep_house(server.store), name="housekeeping"),
            group.create_task(warm.settle(), name="warm start"),
        ]
        if config.tiers.host.prefault:
            tasks.append(group.create_task(prefault(server.store.host.arena), name="prefault"))
        stopped_by = await until_stopped()
        log.info("draining", extra={"signal": stopped_by})
        notify("STOPPING=1")
        await server.drain(config.server.drain_timeout_seconds)
        for task in tasks:
            task.cancel()


def _make_store(config: Config) -> Store:
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
    )


def _make_server(config: Config, store: Store, mover: Mover, address: SocketAddress) -> Server:
    return Server(
        store,
        mover,
        address,
        Admission(config.server.allowed_uids, config.server.allowed_gids),
        tenants=Tenants({}),
        sessions_max=config.server.sessions_max,
        orphan_grace_seconds=config.leases.orphan_grace_seconds,
        verify_loads=config.tiers.host.verify_load,
        prefaults=config.tiers.host.prefault,
    )


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """Return uvloop's factory when it is installed, else asyncio's."""
    try:
        import uvloop  # noqa: PLC0415  # optional
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop

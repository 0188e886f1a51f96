"""The life of the daemon between start and exit: signals, housekeeping, systemd."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket

from kvstore.store.store import Store
from kvstore.transfer.arena import Arena

log = logging.getLogger(__name__)

_HOUSEKEEPING_SECONDS = 0.5


async def until_stopped() -> str:
    """Wait for SIGTERM or SIGINT and return its name."""
    loop = asyncio.get_running_loop()
    stopped: asyncio.Future[str] = loop.create_future()

    def stop(name: str) -> None:
        if not stopped.done():
            stopped.set_result(name)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number.name)
    return await stopped


async def keep_house(store: Store) -> None:
    """Expire leases, and tell systemd's watchdog that the loop turns, until cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        expired = store.expire(loop.time())
        if expired:
            log.warning("leases expired", extra={"count": expired})
        notify("WATCHDOG=1")
        await asyncio.sleep(_HOUSEKEEPING_SECONDS)


async def prefault(arena: Arena) -> None:
    """Back the whole arena with memory, in the background and in steps."""
    more = True
    while more:
        more = await asyncio.to_thread(arena.prefault_step)
    if arena.prefaulted_bytes < arena.size_bytes:
        log.warning(
            "arena not wholly backed by memory",
            extra={"prefaulted_bytes": arena.prefaulted_bytes, "size_bytes": arena.size_bytes},
        )


def notify(state: str) -> None:
    """Tell systemd *state* (the sd_notify protocol); without systemd, nothing."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as messenger:
            messenger.sendto(state.encode(), address)
    except OSError as error:
        log.warning("systemd not notified", extra={"state": state, "reason": error.strerror})

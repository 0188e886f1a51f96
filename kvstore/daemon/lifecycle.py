"""The life of the daemon between start and exit: signals, housekeeping, the watchdog."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable

from kvstore.daemon.systemd import notify, notify_reloading, watchdog_seconds
from kvstore.errors import ConfigError
from kvstore.store.store import Store
from kvstore.transfer.arena import Arena

log = logging.getLogger(__name__)

_HOUSEKEEPING_SECONDS = 0.5


def heed_signals(reload: Callable[[], object]) -> asyncio.Future[str]:
    """Call *reload* at SIGHUP; at SIGTERM or SIGINT, give what is returned the signal's name.

    SIGHUP ends the daemon when it comes from the loss of the terminal that it was started in.
    """
    loop = asyncio.get_running_loop()
    stopped: asyncio.Future[str] = loop.create_future()
    had_terminal = os.isatty(0)

    def stop(name: str) -> None:
        if not stopped.done():
            stopped.set_result(name)

    def hang_up() -> None:
        if had_terminal and not os.isatty(0):
            stop("SIGHUP")
        else:
            _reload(reload)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number.name)
    loop.add_signal_handler(signal.SIGHUP, hang_up)
    return stopped


def _reload(reload: Callable[[], object]) -> None:
    """Reload, and tell systemd that it is over whatever has come of it."""
    notify_reloading()
    status: list[str] = []
    try:
        reload()
    except ConfigError as error:
        problems = str(error).splitlines()
        log.error("configuration not reloaded", extra={"problems": "; ".join(problems)})
        status = [f"STATUS=configuration not reloaded: {problems[0]}"]
    finally:
        notify("READY=1", *status)


async def keep_house(store: Store) -> None:
    """Expire leases until cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        expired = store.expire(loop.time())
        if expired:
            log.warning("leases expired", extra={"count": expired})
        await asyncio.sleep(_HOUSEKEEPING_SECONDS)


async def feed_watchdog() -> None:
    """Show systemd, if it watches, that the loop turns, until cancelled.

    Twice in the time that it grants: a loop that stands still longer has the daemon killed and
    started again.
    """
    seconds = watchdog_seconds()
    while seconds is not None:
        notify("WATCHDOG=1")
        await asyncio.sleep(seconds / 2)


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

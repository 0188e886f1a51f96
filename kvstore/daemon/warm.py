"""A host tier that an earlier daemon has left: taken over before anybody is served.

Clients of that daemon may live on, with the arena mapped and something half written in it.
What they were writing is set aside for as long as they may still write there.
"""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial
from typing import TYPE_CHECKING

from kvstore.daemon.peers import watch
from kvstore.store.recovery import Recovery

if TYPE_CHECKING:
    from kvstore.store.store import Store
    from kvstore.types import Extent

log = logging.getLogger(__name__)


class WarmStart:
    """Takes over what is left, says so in one line, and sees to the rest in the background.

    Where clients do not verify what they load, a shard is served once it is verified here.
    """

    def __init__(self, store: Store, *, verify_loads: bool, grace_seconds: float) -> None:
        self._store = store
        self._grace_seconds = grace_seconds
        started_at = time.monotonic()
        self._recovery = Recovery(store, proven_first=not verify_loads)
        self._report(time.monotonic() - started_at)

    async def settle(self) -> None:
        """Verify what was left, and free what was being written once nobody can write there."""
        loop = asyncio.get_running_loop()
        for owner, extents in self._recovery.aside.items():
            process = watch(owner)
            if process is None:
                self._give_up(extents)
            else:
                process.when_gone(loop, self._grace_seconds, partial(self._give_up, extents))
        dropped = self._recovery.dropped.total()
        await self._recovery.prove()
        wrong = self._recovery.dropped.total() - dropped
        if wrong:
            log.warning("kept shards have other bytes than they had", extra={"shards": wrong})

    def _give_up(self, extents: list[Extent]) -> None:
        for extent in extents:
            self._store.give_up_room(extent)

    def _report(self, seconds: float) -> None:
        recovery, cold = self._recovery, self._store.host.cold
        if cold:
            log.warning("host tier starts cold", extra={"reason": cold})
        elif recovery.left or recovery.aside or recovery.dropped:
            dropped = [f"{count} {reason}" for reason, count in recovery.dropped.items()]
            log.info(
                "host tier is warm",
                extra={
                    "shards": recovery.left,
                    "bytes": recovery.left_bytes,
                    "being_written": sum(map(len, recovery.aside.values())),
                    "dropped": ", ".join(dropped) or "none",
                    "seconds": round(seconds, 3),
                },
            )

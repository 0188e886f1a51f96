"""The breaker: after one failure the daemon is not asked again until a probe has found it.

closed --failure--> open --probe succeeds--> closed
                    ^  |
                    +--+ probe fails: twice the pause, up to a limit
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Generic, TypeVar

from kvstore.errors import KVStoreError
from kvstore.limits import PROBE_INTERVAL_MAX_SECONDS, PROBE_INTERVAL_MIN_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

Link = TypeVar("Link")


class Breaker(Generic[Link]):
    """Keeps a link to the daemon, or the knowledge that there is none.

    `link` costs nothing when there is none: the caller goes on without. A thread, which lives
    only while the breaker is open, tries to *connect* again. Thread-safe.
    """

    def __init__(self, connect: Callable[[], Link], disconnect: Callable[[Link], None]) -> None:
        self._connect = connect
        self._disconnect = disconnect
        self._lock = threading.Lock()
        self._link: Link | None = None
        self._probe: threading.Thread | None = None
        self._stop = threading.Event()
        self.trips = 0

    @property
    def link(self) -> Link | None:
        """The link, or None while the breaker is open."""
        return self._link

    def start(self) -> None:
        """Connect now; failing that, in the background."""
        if not self._try():
            self._open()

    def trip(self, broken: Link, reason: KVStoreError) -> None:
        """Give up *broken* because of *reason*, and look for a new link in the background.

        Of several threads that find the same link broken, the first counts.
        """
        with self._lock:
            if self._link is not broken:
                return
            self._link = None
            self.trips += 1
        log.warning("daemon lost, going on without", extra={"reason": str(reason)})
        self._disconnect(broken)
        self._open()

    def close(self) -> None:
        """Give up the link and stop probing. Idempotent."""
        self._stop.set()
        with self._lock:
            link, self._link = self._link, None
            probe = self._probe
        if probe is not None and probe is not threading.current_thread():
            probe.join()
        if link is not None:
            self._disconnect(link)

    def _open(self) -> None:
        with self._lock:
            if self._stop.is_set() or (self._probe is not None and self._probe.is_alive()):
                return
            self._probe = threading.Thread(target=self._probing, name="kvstore-probe", daemon=True)
            self._probe.start()

    def _probing(self) -> None:
        pause = PROBE_INTERVAL_MIN_SECONDS
        while not self._stop.wait(pause):
            if self._try():
                log.info("daemon found again")
                return
            pause = min(2 * pause, PROBE_INTERVAL_MAX_SECONDS)

    def _try(self) -> bool:
        try:
            link = self._connect()
        except KVStoreError as error:
            log.info("daemon not reached", extra={"reason": str(error)})
            return False
        with self._lock:
            if not self._stop.is_set():
                self._link = link
                # From here on a trip needs a probe of its own: this one is about to end.
                self._probe = None
                return True
        self._disconnect(link)
        return True

"""Has the daemon know what a device has counted, soon after it has, and not often.

With pings, whose replies nobody waits for. A daemon that does not know of counters ignores them.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from kvstore.client.connection import deadline_ms
from kvstore.limits import ENGINE_COUNT_MAX, ENGINE_COUNTERS_SECONDS
from kvstore.protocol import messages as m

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvstore.client.connection import Connection
    from kvstore.client.sync import Space
    from kvstore.gpu.counters import DeviceCounters

    Ask = Callable[[Callable[[Space], None], None], None]


class Telling:
    """Tells each session what has been counted since it began. Thread-safe.

    What is counted while there is no daemon goes to the next session.
    """

    def __init__(
        self, counters: DeviceCounters, ask: Ask, *, seconds: float = ENGINE_COUNTERS_SECONDS
    ) -> None:
        self._counters = counters
        self._ask = ask
        self._seconds = seconds
        self._lock = threading.Lock()
        self._posting = threading.Lock()
        self._timer: threading.Timer | None = None
        self._is_closed = False
        self._connection: Connection | None = None
        # What all sessions together were told, and what those before this one were.
        self._told: dict[str, int] = {}
        self._before: dict[str, int] = {}

    def note(self) -> None:
        """Have what has been counted told within a moment."""
        with self._lock:
            if self._timer is not None or self._is_closed:
                return
            self._timer = threading.Timer(self._seconds, self._tell)
            self._timer.name, self._timer.daemon = "kvstore-counters", True
            self._timer.start()

    def close(self) -> None:
        """Tell what is left, and no more. Idempotent."""
        with self._lock:
            timer, self._timer = self._timer, None
            was_closed, self._is_closed = self._is_closed, True
        if timer is not None:
            timer.cancel()
        if not was_closed:
            self._ask(self._post, None)

    def _tell(self) -> None:
        with self._lock:
            self._timer = None
        self._ask(self._post, None)

    def _post(self, space: Space) -> None:
        with self._posting:
            connection, values = space.connection, self._counters.values()
            if values == self._told:
                return
            if connection is not self._connection:
                self._connection, self._before = connection, self._told
            counted = {name: n - self._before.get(name, 0) for name, n in values.items()}
            shown = {name: min(n, ENGINE_COUNT_MAX) for name, n in counted.items() if n > 0}
            deadline = deadline_ms(space.timeout_seconds)
            connection.post(m.Ping(connection.next_id(), deadline, counters=shown))
            self._told = values

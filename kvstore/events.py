"""What has happened lately, for people: the last log events, kept in memory.

Whatever the daemon thinks worth a line in its log is an event here, too. Equal ones in quick
succession are one with a count.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

import msgspec

from kvstore.limits import EVENT_FIELDS_MAX, EVENT_TEXT_MAX_CHARS, EVENTS_MAX
from kvstore.logs import event_fields

_TOGETHER_SECONDS: Final = 1.0


class Event(msgspec.Struct, kw_only=True):
    """One event, or *count* equal ones. *at* is in seconds since 1970; ids grow with time."""

    id: int
    at: float
    severity: str
    source: str
    message: str
    fields: dict[str, str] = {}
    count: int = 1


class Events(logging.Handler):
    """The last events from INFO on. A log handler, to be added to the product's own logger."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        super().__init__(logging.INFO)
        self._clock = clock
        self._ids = itertools.count(1)
        self._kept: deque[Event] = deque(maxlen=EVENTS_MAX)
        # Events are logged by threads, too.
        self._guard = threading.Lock()

    def emit(self, record: logging.LogRecord) -> None:
        """Keep *record*, cut to what one event may hold."""
        fields = dict(list(event_fields(record).items())[:EVENT_FIELDS_MAX])
        self.note(
            record.levelname.lower(),
            record.name.removeprefix("kvstore."),
            record.getMessage(),
            {name: str(value) for name, value in fields.items()},
        )

    def note(self, severity: str, source: str, message: str, fields: dict[str, str]) -> None:
        """Keep one event that is not worth a line in the log."""
        event = Event(
            id=0,
            at=self._clock(),
            severity=severity,
            source=source,
            message=message[:EVENT_TEXT_MAX_CHARS],
            fields={name: value[:EVENT_TEXT_MAX_CHARS] for name, value in fields.items()},
        )
        with self._guard:
            last = self._kept[-1] if self._kept else None
            if last is not None and _is_again(last, event):
                last.count += 1
                return
            event.id = next(self._ids)
            self._kept.append(event)

    def after(self, event_id: int, limit: int) -> list[Event]:
        """Return the first *limit* events behind *event_id*, oldest first."""
        with self._guard:
            start = max(0, event_id + 1 - self._kept[0].id) if self._kept else 0
            return list(itertools.islice(self._kept, start, start + limit))

    def latest(self, limit: int) -> list[Event]:
        """Return the last *limit* events, oldest first."""
        with self._guard:
            start = max(0, len(self._kept) - limit)
            return list(itertools.islice(self._kept, start, None))


def _is_again(last: Event, event: Event) -> bool:
    return event.at - last.at < _TOGETHER_SECONDS and (
        (last.severity, last.source, last.message, last.fields)
        == (event.severity, event.source, event.message, event.fields)
    )

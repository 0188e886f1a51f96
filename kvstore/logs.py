"""Logs: one event a line, as text for people or JSON for machines.

Fields are given by `extra=`: `log.warning("chunk dropped", extra={"key": digest})`. Keys are
shortened, except in events below INFO. Every event stays on its line, whatever its fields hold.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import UTC, datetime
from typing import Final, Literal, TextIO

KEY_DIGITS: Final = 12
"""How many hex digits of a key tell it apart for a person."""

_PRIORITIES: Final = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3}

# Whatever a bare record has is logging's own; the rest came by `extra=`.
_OWN_NAMES: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def configure(
    level: Literal["debug", "info", "warning", "error"],
    form: Literal["text", "json"],
    stream: TextIO | None = None,
) -> None:
    """Send events from *level* on to *stream* (standard error), instead of where they went."""
    root = logging.getLogger()
    for former in root.handlers[:]:
        root.removeHandler(former)
    output = logging.StreamHandler(stream or sys.stderr)
    output.setFormatter(_formatter(form, is_journal=_is_journal(output.stream)))
    root.addHandler(output)
    root.setLevel(level.upper())


def _formatter(form: str, *, is_journal: bool) -> logging.Formatter:
    own = JsonFormatter() if form == "json" else TextFormatter(timed=not is_journal)
    return JournalFormatter(own) if is_journal else own


def _is_journal(stream: TextIO) -> bool:
    """Return whether *stream* ends in systemd's journal: JOURNAL_STREAM names its file."""
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


class JournalFormatter(logging.Formatter):
    """What another formatter makes, each line marked with its priority, as sd-daemon(3) says."""

    def __init__(self, own: logging.Formatter) -> None:
        super().__init__()
        self._own = own

    def format(self, record: logging.LogRecord) -> str:
        """Return the same lines; the journal takes the marks off again."""
        mark = f"<{_PRIORITIES.get(record.levelno, 6)}>"
        return mark + self._own.format(record).replace("\n", "\n" + mark)


class TextFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.000Z INFO daemon.server session ends client="vllm 0" reason=...`."""

    def __init__(self, *, timed: bool = True) -> None:
        """Leave the time out unless *timed*: the journal has its own."""
        super().__init__()
        self._timed = timed

    def format(self, record: logging.LogRecord) -> str:
        """Return one line, and the traceback indented below it when there is one."""
        words = [
            *([_timestamp(record)] if self._timed else []),
            record.levelname,
            record.name.removeprefix("kvstore."),
            _one_line(record.getMessage()),
        ]
        words += [f"{name}={_text_value(value)}" for name, value in event_fields(record).items()]
        line = " ".join(words)
        trace = _traceback(self, record)
        return line if trace is None else line + "\n    " + trace.replace("\n", "\n    ")


class JsonFormatter(logging.Formatter):
    """One JSON object a line: timestamp, severity, logger, message, then the fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the object; a field never replaces one of the first four."""
        event: dict[str, object] = {
            "timestamp": _timestamp(record),
            "severity": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        trace = _traceback(self, record)
        if trace is not None:
            event["traceback"] = trace
        return json.dumps(event_fields(record) | event, default=str, ensure_ascii=False)


def event_fields(record: logging.LogRecord) -> dict[str, object]:
    """Return what was given by `extra=`."""
    return {
        name: _shown(value, KEY_DIGITS if record.levelno >= logging.INFO else None)
        for name, value in vars(record).items()
        if name not in _OWN_NAMES
    }


def _shown(value: object, digits: int | None) -> object:
    return value.hex()[:digits] if isinstance(value, bytes) else value


def _timestamp(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, tz=UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _traceback(formatter: logging.Formatter, record: logging.LogRecord) -> str | None:
    return formatter.formatException(record.exc_info) if record.exc_info else None


def _text_value(value: object) -> str:
    """Return *value* as one word: quoted where it would not be one."""
    text = str(value)
    is_word = text.isprintable() and text and not set(text) & {" ", '"', "="}
    return text if is_word else json.dumps(text)


def _one_line(text: str) -> str:
    return text if text.isprintable() else json.dumps(text)[1:-1]

"""Logs: one line an event, fields as given, keys shortened, nothing forged by what is logged."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
from collections.abc import Iterator

import pytest

from kvstore import logs

KEY = bytes(range(32))


@pytest.fixture(autouse=True)
def untouched_root() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


@pytest.fixture
def text() -> io.StringIO:
    stream = io.StringIO()
    logs.configure("info", "text", stream)
    return stream


@pytest.fixture
def jsonl() -> io.StringIO:
    stream = io.StringIO()
    logs.configure("debug", "json", stream)
    return stream


log = logging.getLogger("kvstore.store")


def test_a_text_line_has_time_level_place_message_and_fields(text: io.StringIO) -> None:
    log.warning("chunk dropped", extra={"reason": "checksum", "tier": "host", "bytes": 3})
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z WARNING store chunk dropped "
        r"reason=checksum tier=host bytes=3\n",
        text.getvalue(),
    )


def test_a_json_line_has_the_same(jsonl: io.StringIO) -> None:
    log.warning("chunk %s", "dropped", extra={"reason": "checksum", "bytes": 3})
    event = json.loads(jsonl.getvalue())
    assert event.pop("timestamp").endswith("Z")
    assert event == {
        "severity": "WARNING",
        "logger": "kvstore.store",
        "message": "chunk dropped",
        "reason": "checksum",
        "bytes": 3,
    }


@pytest.mark.parametrize(("level", "digits"), [(logging.INFO, 12), (logging.DEBUG, 64)])
def test_keys_are_shortened_from_info_on(jsonl: io.StringIO, level: int, digits: int) -> None:
    log.log(level, "seen", extra={"key": KEY})
    assert json.loads(jsonl.getvalue())["key"] == KEY.hex()[:digits]


def test_events_below_the_level_are_left_out(text: io.StringIO) -> None:
    log.debug("quiet")
    assert text.getvalue() == ""


@pytest.mark.parametrize("hostile", ['a b="c"', "line\nforged", "", "\x1b[2J", "k=v"])
def test_a_field_cannot_look_like_more_than_one(text: io.StringIO, hostile: str) -> None:
    log.info("session", extra={"client": hostile})
    line = text.getvalue()
    assert line.count("\n") == 1
    assert line.rstrip("\n").isprintable()
    assert line.rstrip("\n").endswith("client=" + json.dumps(hostile))


def test_a_message_cannot_start_a_line(text: io.StringIO) -> None:
    log.info("refused %s", "x\n2026-01-01 forged")
    assert text.getvalue().count("\n") == 1


@pytest.mark.parametrize("name", ["severity", "logger", "timestamp"])
def test_a_field_never_replaces_what_every_event_has(jsonl: io.StringIO, name: str) -> None:
    log.info("seen", extra={name: "forged"})
    assert json.loads(jsonl.getvalue())[name] != "forged"


def test_what_json_does_not_know_is_written_as_text(jsonl: io.StringIO) -> None:
    log.info("seen", extra={"error": ValueError("no")})
    assert json.loads(jsonl.getvalue())["error"] == "no"


def test_a_traceback_is_one_field_in_json(jsonl: io.StringIO) -> None:
    _fail()
    event = json.loads(jsonl.getvalue())
    assert event["message"] == "request failed"
    assert event["traceback"].endswith("ZeroDivisionError: integer division or modulo by zero")


def test_a_traceback_is_indented_below_its_text_line(text: io.StringIO) -> None:
    _fail()
    first, *rest = text.getvalue().splitlines()
    assert first.endswith("ERROR store request failed")
    assert rest
    assert all(line.startswith("    ") for line in rest)


def test_configuring_again_replaces_the_former_output(text: io.StringIO) -> None:
    logs.configure("info", "text")
    former = text.getvalue()
    assert [handler.stream for handler in logging.getLogger().handlers] == [sys.stderr]
    log.info("elsewhere")
    assert text.getvalue() == former


def _fail() -> None:
    try:
        _ = 1 // 0
    except ZeroDivisionError:
        log.exception("request failed")


def test_lines_for_the_journal_begin_with_their_priority_and_leave_the_time_to_it() -> None:
    formatter = logs.JournalFormatter(logs.TextFormatter(timed=False))
    try:
        raise ValueError("here")
    except ValueError:
        record = logging.LogRecord(
            "kvstore.x", logging.ERROR, "", 0, "failed", None, sys.exc_info()
        )
    lines = formatter.format(record).splitlines()
    assert lines[0] == "<3>ERROR x failed"
    assert len(lines) > 2
    assert all(line.startswith("<3>") for line in lines)
    warning = logging.LogRecord("kvstore.x", logging.WARNING, "", 0, "odd", None, None)
    assert formatter.format(warning) == "<4>WARNING x odd"

"""Events: what is logged is kept for people, bounded, and counted when it repeats."""

from __future__ import annotations

import logging

import pytest

from kvstore.events import Events
from kvstore.limits import EVENT_FIELDS_MAX, EVENT_TEXT_MAX_CHARS, EVENTS_MAX
from kvstore.metrics import Histogram


@pytest.fixture
def now():
    return [100.0]


@pytest.fixture
def events(now):
    kept = Events(lambda: now[0])
    log = logging.getLogger("kvstore.tests.events")
    log.addHandler(kept)
    log.setLevel(logging.DEBUG)
    yield kept
    log.removeHandler(kept)


LOG = logging.getLogger("kvstore.tests.events")


def test_what_is_logged_from_info_on_is_an_event_with_its_fields(events):
    LOG.debug("too small")
    LOG.warning("tier fails", extra={"tier": "disk", "key": bytes(32)})
    (event,) = events.latest(10)
    assert (event.severity, event.source, event.message) == (
        *("warning", "tests.events"),
        "tier fails",
    )
    assert event.fields == {"tier": "disk", "key": "0" * 12}
    assert event.at == 100.0


def test_equal_events_in_quick_succession_are_one_with_a_count(events, now):
    for _ in range(3):
        LOG.info("refused", extra={"uid": 7})
    LOG.info("refused", extra={"uid": 8})
    now[0] = 102.0
    LOG.info("refused", extra={"uid": 8})
    assert [event.count for event in events.latest(10)] == [3, 1, 1]


def test_memory_is_bounded_and_pages_go_on_where_they_ended(events):
    for number in range(EVENTS_MAX + 10):
        LOG.info("event", extra={"number": number})
    assert len(events.latest(2 * EVENTS_MAX)) == EVENTS_MAX
    first = events.after(0, 5)
    assert [event.fields["number"] for event in first] == ["10", "11", "12", "13", "14"]
    assert events.after(first[-1].id, 1)[0].fields["number"] == "15"
    assert events.after(10**9, 5) == []


def test_one_event_has_few_and_short_fields(events):
    LOG.info("x" * 2 * EVENT_TEXT_MAX_CHARS, extra={f"f{n}": "y" * 9999 for n in range(99)})
    (event,) = events.latest(1)
    assert len(event.message) == EVENT_TEXT_MAX_CHARS
    assert len(event.fields) == EVENT_FIELDS_MAX
    assert {len(value) for value in event.fields.values()} == {EVENT_TEXT_MAX_CHARS}


def test_a_histogram_counts_under_the_right_bound_and_knows_quantiles():
    histogram = Histogram((1.0, 2.0, 4.0))
    assert histogram.quantile(0.5) == 0.0
    for value in (0.5, 1.0, 1.5, 3.0, 100.0):
        histogram.observe(value)
    assert histogram.counts == [2, 1, 1, 1]
    assert (histogram.count, histogram.total) == (5, 106.0)
    assert 0.0 < histogram.quantile(0.2) <= 1.0
    assert 1.0 < histogram.quantile(0.6) <= 2.0
    assert histogram.quantile(1.0) == 4.0
    earlier = histogram.copy()
    histogram.observe(1.7)
    assert histogram.since(earlier).counts == [0, 1, 0, 0]

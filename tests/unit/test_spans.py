"""What is recorded of requests that belong to a trace, and that recording holds up nobody."""

from __future__ import annotations

import sys
import threading

import pytest
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from kvstore import app
from kvstore.client.tracing import current_traceparent, joined
from kvstore.daemon import otel
from kvstore.daemon.otel import OtelRecorder
from kvstore.daemon.spans import Parent, RequestSpans, Step, parent_in
from kvstore.errors import ConfigError
from kvstore.limits import SPANS_PER_EXPORT_MAX, SPANS_WAITING_MAX
from kvstore.protocol import messages as m
from kvstore.store.lane import TierRead
from kvstore.types import TierKind
from tests.support.waiting import DEADLINE_SECONDS

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{SPAN}-01"
DIGEST = bytes(32)


@pytest.fixture
def exporter():
    return InMemorySpanExporter()


@pytest.fixture
def recorder(exporter):
    recorder = OtelRecorder(exporter)
    yield recorder
    recorder.close()


def test_a_load_is_told_with_one_step_for_every_tier_that_was_read(exporter, recorder):
    spans = RequestSpans(recorder)
    spans.begin(m.Load(4, 50, 0, [DIGEST] * 3, traceparent=PARENT))
    times = [(2.0, 3.0), (2.5, 4.0), (1.0, 6.0)]
    kinds = [TierKind.DISK, TierKind.DISK, TierKind.REDIS]
    reads = [TierRead(kind, 10, *time) for kind, time in zip(kinds, times, strict=True)]
    spans.reads(4, reads)
    spans.reads(5, reads)  # a request that nobody records
    spans.end(m.Loaded(4, 7, [[], []]))
    recorder.close()
    load, disk, redis = exporter.get_finished_spans()
    assert (load.name, load.attributes) == (
        "kvstore load",
        {"kvstore.chunks": 3, "kvstore.loaded": 2},
    )
    assert (f"{load.parent.trace_id:032x}", f"{load.parent.span_id:016x}") == (TRACE, SPAN)
    assert load.resource.attributes["service.name"] == "kvstore"
    assert {disk.parent.span_id, redis.parent.span_id} == {load.context.span_id}
    assert disk.attributes == {"kvstore.tier": "disk", "kvstore.shards": 2, "kvstore.bytes": 20}
    assert disk.end_time - disk.start_time == 2_000_000_000
    assert disk.start_time - redis.start_time == 1_000_000_000


def test_errors_and_sessions_that_end_are_told_as_such(exporter, recorder):
    spans = RequestSpans(recorder)
    spans.begin(m.Reserve(5, 50, 0, [DIGEST], traceparent=PARENT))
    spans.end(m.Error(5, 20, "no room", retryable=True))
    spans.begin(m.HandoffAwait(6, 50, 0, "one", traceparent=PARENT))
    spans.end_all()
    spans.end(m.Done(6, 1))
    recorder.close()
    told = [(span.name, span.status.description) for span in exporter.get_finished_spans()]
    assert told == [
        ("kvstore reserve", "no room"),
        ("kvstore handoffawait", "the session has ended"),
    ]


@pytest.mark.parametrize(
    "traceparent",
    [
        "",
        PARENT[:-1] + "0",  # nobody records it
        PARENT.upper(),
        "01" + PARENT[2:],
        PARENT + "-extra",
        PARENT.replace(TRACE, "0" * 32),
        PARENT.replace(SPAN, "0" * 16),
        "0" * 64,
    ],
)
def test_what_is_not_recorded_or_malformed_is_ignored(exporter, recorder, traceparent):
    assert parent_in(traceparent) is None
    spans = RequestSpans(recorder)
    spans.begin(m.Commit(6, 50, [m.Filled(1, 1)], traceparent))
    spans.begin(m.Stats(7, 50))
    spans.end_all()
    recorder.close()
    assert exporter.get_finished_spans() == ()


def test_an_exporter_that_hangs_costs_spans_and_nothing_else(monkeypatch):
    monkeypatch.setattr(otel, "SPANS_TIMEOUT_SECONDS", 0.01)
    held, lost = threading.Event(), threading.Event()

    class Hanging:
        seen = 0

        def export(self, spans):
            self.seen += len(spans)
            held.wait()
            return SpanExportResult.SUCCESS

        def shutdown(self):
            lost.set()

    exporter = Hanging()
    recorder = OtelRecorder(exporter)
    for _ in range(3 * SPANS_WAITING_MAX):
        recorder.record(Parent(1, 1), Step("kvstore lookup", 1.0, 2.0, {}))
    recorder.close()
    assert lost.is_set(), "the end does not wait for it"
    assert exporter.seen <= SPANS_PER_EXPORT_MAX, "nothing more is sent while one export hangs"
    held.set()
    for thread in threading.enumerate():
        if thread.name == "spans-end":
            thread.join(DEADLINE_SECONDS)
    # What hung, and all that could wait behind it.
    assert exporter.seen <= SPANS_PER_EXPORT_MAX + SPANS_WAITING_MAX


def test_what_was_handed_over_goes_before_what_is_current():
    assert current_traceparent() == ""
    with joined(PARENT):
        assert current_traceparent() == PARENT
        with joined(None), joined(""):
            assert current_traceparent() == PARENT
    assert current_traceparent() == ""


def test_without_the_extra_the_daemon_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "kvstore.daemon.otel")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"pip install 'kvstore\[otel\]'"):
        app._open_recorder("http://127.0.0.1:4318/v1/traces")

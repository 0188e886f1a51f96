"""Steps as spans of OpenTelemetry, exported over OTLP. Needs the extra `otel`.

A span waits in a queue of fixed length; when it is full, the oldest is lost. A thread of the SDK
sends what waits, and nothing here waits for the receiver, but the end of the daemon for a moment.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)

from kvstore import __version__
from kvstore.limits import SPANS_PER_EXPORT_MAX, SPANS_TIMEOUT_SECONDS, SPANS_WAITING_MAX

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter

    from kvstore.daemon.spans import Parent, Step

log = logging.getLogger(__name__)

_EXPORT_PAUSE_MS: Final = 1000
_NANOSECONDS: Final = 1_000_000_000


class OtelRecorder:
    """Gives finished steps to *exporter*, in the background and only if their parent is sampled."""

    def __init__(self, exporter: SpanExporter) -> None:
        # It says the same again and again; `_Exporting` says it once.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        self._exporting = _Exporting(exporter)
        resource = {
            "service.name": "kvstore",
            "service.version": __version__,
            "host.name": socket.gethostname(),
        }
        self._provider = TracerProvider(
            sampler=ParentBased(ALWAYS_OFF),
            resource=Resource.create(resource),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(
            BatchSpanProcessor(
                self._exporting,
                max_queue_size=SPANS_WAITING_MAX,
                schedule_delay_millis=_EXPORT_PAUSE_MS,
                max_export_batch_size=SPANS_PER_EXPORT_MAX,
            )
        )
        self._tracer = self._provider.get_tracer("kvstore", __version__)

    def record(self, parent: Parent, step: Step, inner: Iterable[Step] = ()) -> None:
        """Record *step* as a part of *parent*, and *inner* as parts of it."""
        sampled = TraceFlags(TraceFlags.SAMPLED)
        caller = SpanContext(parent.trace_id, parent.span_id, is_remote=True, trace_flags=sampled)
        began_clock_ns = time.time_ns() - round(time.perf_counter() * _NANOSECONDS)
        context = set_span_in_context(NonRecordingSpan(caller))
        within = self._span(step, context, SpanKind.SERVER, began_clock_ns)
        for one in inner:
            self._span(one, within, SpanKind.INTERNAL, began_clock_ns)

    def close(self) -> None:
        """Export what waits, as far as time allows, and end."""
        ending = threading.Thread(target=self._provider.shutdown, name="spans-end", daemon=True)
        ending.start()
        ending.join(SPANS_TIMEOUT_SECONDS)
        self._exporting.shutdown()

    def _span(self, step: Step, context: Context, kind: SpanKind, clock_ns: int) -> Context:
        span = self._tracer.start_span(
            step.name,
            context,
            kind,
            step.fields,
            start_time=clock_ns + round(step.began_at * _NANOSECONDS),
        )
        if step.error:
            span.set_status(Status(StatusCode.ERROR, step.error))
        span.end(clock_ns + round(step.ended_at * _NANOSECONDS))
        return set_span_in_context(span)


class _Exporting:
    """An exporter that says when it begins to fail and when that is over, and is ended once."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self._has_failed = False
        self._is_ended = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        has_failed = result is not SpanExportResult.SUCCESS
        if has_failed and not self._has_failed:
            log.warning("spans are not exported", extra={"lost": len(spans)})
        elif self._has_failed and not has_failed:
            log.info("spans are exported again")
        self._has_failed = has_failed
        return result

    def shutdown(self) -> None:
        if not self._is_ended:
            self._is_ended = True
            self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return bool(self._exporter.force_flush(timeout_millis))


def open_recorder(endpoint: str) -> OtelRecorder:
    """Return what exports to the receiver at the URL *endpoint*, which need not be there yet.

    What it asks for besides, such as a header, is told by the `OTEL_EXPORTER_OTLP_*` variables.
    """
    return OtelRecorder(OTLPSpanExporter(endpoint, timeout=SPANS_TIMEOUT_SECONDS))

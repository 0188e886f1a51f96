"""Which trace a request belongs to: that of whoever calls, where the daemon records it.

Nothing is imported for it: where nobody else in this process has loaded OpenTelemetry, there is
no trace to belong to but one that was handed over (`joined`).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from types import ModuleType

_joined: Final[ContextVar[str]] = ContextVar("kvstore_traceparent", default="")


@contextlib.contextmanager
def joined(traceparent: str | None) -> Iterator[None]:
    """Let what is asked inside belong to *traceparent*, as W3C writes it; None changes nothing.

    For work that is done for a request in a thread that does not serve it.
    """
    if not traceparent:
        yield
        return
    token = _joined.set(traceparent)
    try:
        yield
    finally:
        _joined.reset(token)


def current_traceparent() -> str:
    """Return the trace of whoever calls, as W3C writes it; empty when there is none."""
    trace: ModuleType | None = sys.modules.get("opentelemetry.trace")
    if (handed_over := _joined.get()) or trace is None:
        return handed_over
    context = trace.get_current_span().get_span_context()
    if not context.is_valid:
        return ""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"

"""What engines look up, for `kvstore trace record`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvstore.admin.routes import Call, Parameter, Route, whole
from kvstore.admin.schema import Shown
from kvstore.limits import TRACE_PAGE_MAX

if TYPE_CHECKING:
    from kvstore.store.tracing import Tracing

_NUMBER_MAX = 2**53


class LookupTraced(Shown, frozen=True):
    """One look-up. A chunk goes by 16 hex digits that stand for it while the daemon runs."""

    number: int
    at: float
    namespace: str
    chunk_tokens: int
    chunk_bytes: int
    hits: int
    chunks: list[str]


class TracePage(Shown, frozen=True):
    """Look-ups in their order; *next* goes into `after`. Numbers that are missing were too many."""

    lookups: list[LookupTraced]
    next: int


class Traces:
    """Shows what engines look up; the daemon notes it for as long as somebody asks."""

    def __init__(self, tracing: Tracing) -> None:
        self._tracing = tracing

    def routes(self) -> list[Route]:
        """Return the one route."""
        number = {"type": "integer", "minimum": 0, "maximum": _NUMBER_MAX}
        return [
            Route(
                *("GET", "/v1/trace", "trace", "What engines look up, from the first call on"),
                self._trace,
                TracePage,
                parameters=(Parameter("after", number, "only those behind this number"),),
            )
        ]

    async def _trace(self, call: Call) -> TracePage:
        after = whole(call.query, "after", 0, _NUMBER_MAX)
        found = self._tracing.after(after, TRACE_PAGE_MAX)
        lookups = [
            LookupTraced(
                number=one.number,
                at=one.at,
                namespace=one.space.id.hex(),
                chunk_tokens=one.space.manifest.chunk_tokens,
                chunk_bytes=one.space.manifest.chunk_bytes,
                hits=one.hits,
                chunks=one.chunks,
            )
            for one in found
        ]
        return TracePage(lookups=lookups, next=found[-1].number if found else after)

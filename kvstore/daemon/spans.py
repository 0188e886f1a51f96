"""Requests that belong to somebody's trace: what each took, told when it has been answered.

A request names its trace (`traceparent`, as W3C writes it). The daemon begins none of its own,
and does nothing at all for a request without one, or one that its sender does not record.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from kvstore.protocol import messages as m
from kvstore.types import HandoffState, ReserveOutcome, TierKind

if TYPE_CHECKING:
    from kvstore.store.lane import TierRead

Fields = Mapping[str, str | int]

_TRACE_PARENT: Final = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_SAMPLED: Final = 1


class Parent(NamedTuple):
    """Whose part a request is: a trace, and a span of it."""

    trace_id: int
    span_id: int


class Step(NamedTuple):
    """Something that was done, from and to a reading of `time.perf_counter`."""

    name: str
    began_at: float
    ended_at: float
    fields: Fields
    error: str = ""


class Recorder(Protocol):
    """Where finished steps go. Returns at once and never raises; what it cannot keep is lost."""

    def record(self, parent: Parent, step: Step, inner: Iterable[Step] = ()) -> None:
        """Record *step* as a part of *parent*, and *inner* as parts of it."""
        ...

    def close(self) -> None:
        """Pass on what is kept, for a while, and end."""
        ...


class _Open(NamedTuple):
    parent: Parent
    name: str
    began_at: float
    fields: Fields
    inner: list[Step]


class RequestSpans:
    """The requests of one session that are recorded and not answered yet."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._open: dict[int, _Open] = {}

    def begin(self, request: m.AnyRequest) -> None:
        """Note *request* if it belongs to a trace that is recorded."""
        parent = parent_in(getattr(request, "traceparent", ""))
        if parent is not None:
            name, now = f"kvstore {type(request).__name__.lower()}", perf_counter()
            self._open[request.request_id] = _Open(parent, name, now, _asked(request), [])

    def reads(self, request_id: int, reads: Sequence[TierRead]) -> None:
        """Add what was read from slower tiers for a request: all of one tier as one step."""
        opened = self._open.get(request_id)
        if opened is not None:
            opened.inner.extend(_of_tiers(reads))

    def end(self, reply: m.AnyReply) -> None:
        """Record the request that *reply* answers."""
        opened = self._open.pop(reply.request_id, None)
        if opened is not None:
            error = reply.message if isinstance(reply, m.Error) else ""
            self._record(opened, _answered(reply), error)

    def end_all(self) -> None:
        """Record what will never be answered: the session has ended."""
        while self._open:
            _, opened = self._open.popitem()
            self._record(opened, {}, "the session has ended")

    def _record(self, opened: _Open, answered: Fields, error: str) -> None:
        fields = {**opened.fields, **answered}
        step = Step(opened.name, opened.began_at, perf_counter(), fields, error)
        self._recorder.record(opened.parent, step, opened.inner)


def parent_in(traceparent: str) -> Parent | None:
    """Return what *traceparent* names; None when it is empty, malformed or not recorded."""
    found = _TRACE_PARENT.fullmatch(traceparent)
    if found is None or not int(found[3], 16) & _SAMPLED:
        return None
    parent = Parent(int(found[1], 16), int(found[2], 16))
    return parent if all(parent) else None


def _asked(request: m.AnyRequest) -> Fields:
    match request:
        case m.Lookup():
            named = {"kvstore.name": request.name} if request.name else {}
            return {"kvstore.chunks": len(request.digests), **named}
        case m.Load() | m.Reserve():
            return {"kvstore.chunks": len(request.digests)}
        case m.Commit():
            return {"kvstore.chunks": len(request.filled)}
        case m.HandoffAwait():
            return {"kvstore.handoff": request.name, "kvstore.peer": request.peer}
        case _:
            return {}


def _answered(reply: m.AnyReply) -> Fields:
    match reply:
        case m.Found():
            return {"kvstore.hits": reply.hits, "kvstore.arriving": reply.arriving}
        case m.Loaded():
            return {"kvstore.loaded": len(reply.chunks)}
        case m.Reserved():
            outcomes = [slot.outcome for slot in reply.slots]
            return {f"kvstore.{o.name.lower()}": outcomes.count(o) for o in ReserveOutcome}
        case m.Committed():
            return {
                "kvstore.failed": len(reply.failures),
                "kvstore.volatile": len(reply.volatile),
            }
        case m.HandoffReady():
            state = HandoffState(reply.state).name.lower()
            return {"kvstore.state": state, "kvstore.ready": len(reply.digests)}
        case _:
            return {}


def _of_tiers(reads: Sequence[TierRead]) -> Iterable[Step]:
    for kind in TierKind:
        those = [read for read in reads if read.kind is kind]
        if those:
            yield Step(
                f"kvstore read {kind.name.lower()}",
                min(read.began_at for read in those),
                max(read.ended_at for read in those),
                {
                    "kvstore.tier": kind.name.lower(),
                    "kvstore.shards": len(those),
                    "kvstore.bytes": sum(read.size_bytes for read in those),
                },
            )

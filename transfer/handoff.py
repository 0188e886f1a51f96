"""The life of a hand-off from a prefill engine to decode engines: states and transitions.

Everything that may happen to a hand-off is in `TRANSITIONS`; what is not there is refused. The
diagram in docs/disaggregation.md is made from it.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from kvstore.errors import HandoffError
from kvstore.types import HandoffState


class HandoffEvent(Enum):
    """What can happen to a hand-off; the value is how the diagram says it."""

    OPENED = "open"
    PUBLISHED = "publish"
    CLOSED = "close"
    ABORTED = "abort"
    LOST = "producer lost"
    TAKEN = "all consumers leave"
    QUIET = "no news for its time"


TRANSITIONS: Final[dict[tuple[HandoffState, HandoffEvent], HandoffState]] = {
    (HandoffState.ABSENT, HandoffEvent.OPENED): HandoffState.OPEN,
    (HandoffState.OPEN, HandoffEvent.PUBLISHED): HandoffState.OPEN,
    (HandoffState.OPEN, HandoffEvent.CLOSED): HandoffState.CLOSED,
    (HandoffState.OPEN, HandoffEvent.ABORTED): HandoffState.BROKEN,
    (HandoffState.OPEN, HandoffEvent.LOST): HandoffState.BROKEN,
    (HandoffState.OPEN, HandoffEvent.QUIET): HandoffState.EXPIRED,
    (HandoffState.CLOSED, HandoffEvent.TAKEN): HandoffState.TAKEN,
    (HandoffState.CLOSED, HandoffEvent.QUIET): HandoffState.EXPIRED,
    (HandoffState.BROKEN, HandoffEvent.TAKEN): HandoffState.TAKEN,
    (HandoffState.BROKEN, HandoffEvent.QUIET): HandoffState.EXPIRED,
}

FINAL: Final = frozenset({HandoffState.TAKEN, HandoffState.EXPIRED})
"""Nothing is held any more; only the name is remembered, so that it is never used again."""


def after(state: HandoffState, event: HandoffEvent, name: str) -> HandoffState:
    """Return the state that *event* leads to; raises `HandoffError` where it may not happen."""
    following = TRANSITIONS.get((state, event))
    if following is None:
        raise HandoffError(f"hand-off {name!r}: {event.value} while it is {state.name.lower()}")
    return following


def diagram() -> str:
    """Return the transitions as a Mermaid state diagram."""
    lines = ["stateDiagram-v2", f"    [*] --> {HandoffState.ABSENT.name}"]
    lines += [
        f"    {before.name} --> {following.name}: {event.value}"
        for (before, event), following in TRANSITIONS.items()
    ]
    lines += [f"    {state.name} --> [*]" for state in HandoffState if state in FINAL]
    return "\n".join(lines) + "\n"

"""The session's state machine: which message may come when. No I/O, no clock.

NEW --hello--> GREETED --attach--> ATTACHED
               ping, stats         every other request
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Final

from kvstore.errors import LimitError, OrderError, VersionError
from kvstore.limits import IN_FLIGHT_PER_SESSION_MAX
from kvstore.protocol.messages import (
    VERSIONS_SPOKEN,
    AnyRequest,
    Attach,
    Hello,
    Ping,
    Stats,
)


class SessionState(Enum):
    """How far a session has come."""

    NEW = auto()
    GREETED = auto()
    ATTACHED = auto()


_ALLOWED_BEFORE_ATTACH: Final[dict[SessionState, tuple[type, ...]]] = {
    SessionState.NEW: (Hello,),
    SessionState.GREETED: (Attach, Ping, Stats),
}


class SessionMachine:
    """Judges each request of one session before anything acts on it."""

    __slots__ = ("_in_flight", "state")

    def __init__(self) -> None:
        self.state = SessionState.NEW
        self._in_flight: set[int] = set()

    def receive(self, request: AnyRequest) -> None:
        """Admit *request*, or raise.

        `OrderError` and `VersionError` end the session. `LimitError` refuses the request
        alone. An admitted request is in flight until `answered`.
        """
        if self.state is not SessionState.ATTACHED or isinstance(request, Hello):
            self._check_order(request)
        if isinstance(request, Hello):
            if request.version not in VERSIONS_SPOKEN:
                spoken = " and ".join(map(str, VERSIONS_SPOKEN))
                raise VersionError(
                    f"client speaks protocol {request.version}, this daemon {spoken}"
                )
            self.state = SessionState.GREETED
        if request.request_id in self._in_flight or request.request_id == 0:
            raise OrderError(f"request id {request.request_id} is in use or reserved")
        if len(self._in_flight) >= IN_FLIGHT_PER_SESSION_MAX:
            raise LimitError(f"more than {IN_FLIGHT_PER_SESSION_MAX} requests in flight")
        self._in_flight.add(request.request_id)

    def attached(self) -> None:
        """Note that an attach succeeded."""
        assert self.state is not SessionState.NEW, "attach comes after hello"
        self.state = SessionState.ATTACHED

    def answered(self, request_id: int) -> None:
        """Note that *request_id* got its reply; every admitted request gets exactly one."""
        assert request_id in self._in_flight, f"request {request_id} is answered twice"
        self._in_flight.remove(request_id)

    @property
    def in_flight(self) -> frozenset[int]:
        """Ids of requests admitted and not yet answered."""
        return frozenset(self._in_flight)

    def _check_order(self, request: AnyRequest) -> None:
        """Judge a hello, or anything that comes before attach; behind it, all else may come."""
        if isinstance(request, _ALLOWED_BEFORE_ATTACH.get(self.state, ())):
            return
        if isinstance(request, Hello):
            raise OrderError("a second hello")
        missing = "hello" if self.state is SessionState.NEW else "attach"
        raise OrderError(f"{type(request).__name__.lower()} before {missing}")

"""The session's state machine: every message in every state, ids, and the limit in flight."""

from __future__ import annotations

import msgspec
import pytest

from kvstore.errors import LimitError, OrderError, VersionError
from kvstore.limits import IN_FLIGHT_PER_SESSION_MAX
from kvstore.protocol import messages as m
from kvstore.protocol.machine import SessionMachine, SessionState
from tests.support.goldens import REQUESTS

ALLOWED = {
    SessionState.NEW: {"hello"},
    SessionState.GREETED: {"attach", "ping", "stats"},
    SessionState.ATTACHED: {name.rstrip("_0123456789").replace("_", "") for name in REQUESTS}
    - {"hello"},
}


def machine_in(state: SessionState) -> SessionMachine:
    machine = SessionMachine()
    if state is not SessionState.NEW:
        machine.receive(m.Hello(1001, 1, m.PROTOCOL_VERSION))
        machine.answered(1001)
    if state is SessionState.ATTACHED:
        machine.attached()
    assert machine.state is state
    return machine


def ping(request_id: int) -> m.Ping:
    return m.Ping(request_id, 50)


@pytest.mark.parametrize("state", SessionState)
@pytest.mark.parametrize("name", REQUESTS)
def test_every_message_is_admitted_in_the_states_that_allow_it_and_in_no_other(state, name):
    machine, request = machine_in(state), REQUESTS[name].message
    name = name.rstrip("_0123456789").replace("_", "")
    if name in ALLOWED[state]:
        machine.receive(request)
        assert machine.in_flight == {request.request_id}
    else:
        missing = {SessionState.NEW: "before hello", SessionState.GREETED: "before attach"}
        said = "a second hello" if name == "hello" else f"{name} {missing.get(state)}"
        with pytest.raises(OrderError, match=said):
            machine.receive(request)
        assert not machine.in_flight


@pytest.mark.parametrize("version", [0, 4, 2**40, -1])
def test_another_protocol_version_is_refused_with_both_versions(version):
    machine = SessionMachine()
    with pytest.raises(VersionError, match=f"protocol {version}, this daemon 1 and 2 and 3"):
        machine.receive(m.Hello(1, 50, version))
    assert machine.state is SessionState.NEW


@pytest.mark.parametrize("version", m.VERSIONS_SPOKEN)
def test_every_version_that_is_spoken_is_greeted(version):
    machine = SessionMachine()
    machine.receive(m.Hello(1, 50, version))
    assert machine.state is SessionState.GREETED


def test_attaching_again_is_allowed_and_changes_no_state():
    machine = machine_in(SessionState.ATTACHED)
    machine.receive(m.Attach(2, 50, b"{}", 1))
    machine.attached()
    assert machine.state is SessionState.ATTACHED


def test_nothing_can_be_attached_before_hello():
    with pytest.raises(AssertionError, match="after hello"):
        SessionMachine().attached()


@pytest.mark.parametrize("state", SessionState)
def test_an_id_of_zero_is_reserved(state):
    machine = machine_in(state)
    request = m.Hello(0, 50, 1) if state is SessionState.NEW else ping(0)
    with pytest.raises(OrderError, match="request id 0 is in use or reserved"):
        machine.receive(request)


def test_an_id_can_be_used_again_only_after_its_answer():
    machine = machine_in(SessionState.GREETED)
    machine.receive(ping(7))
    with pytest.raises(OrderError, match="request id 7"):
        machine.receive(ping(7))
    machine.answered(7)
    machine.receive(ping(7))


def test_one_request_too_many_is_refused_alone():
    machine = machine_in(SessionState.GREETED)
    for request_id in range(1, IN_FLIGHT_PER_SESSION_MAX + 1):
        machine.receive(ping(request_id))
    with pytest.raises(LimitError, match=f"more than {IN_FLIGHT_PER_SESSION_MAX}"):
        machine.receive(ping(999))
    machine.answered(3)
    machine.receive(ping(999))
    assert len(machine.in_flight) == IN_FLIGHT_PER_SESSION_MAX


def test_a_request_is_answered_once():
    machine = machine_in(SessionState.GREETED)
    machine.receive(ping(7))
    machine.answered(7)
    with pytest.raises(AssertionError, match="request 7 is answered twice"):
        machine.answered(7)


def test_requests_cannot_be_changed_while_they_are_in_flight():
    with pytest.raises(AttributeError):
        REQUESTS["ping_2"].message.request_id = 5
    assert msgspec.structs.replace(ping(1), request_id=2) == ping(2)

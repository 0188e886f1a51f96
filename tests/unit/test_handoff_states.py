"""The life of a hand-off is the table, all of it, and the diagram in the documentation is too."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from kvstore.errors import HandoffError
from kvstore.transfer.handoff import FINAL, TRANSITIONS, HandoffEvent, after, diagram
from kvstore.types import HandoffState

PAGE = Path(__file__).parents[2] / "docs" / "disaggregation.md"


@pytest.mark.parametrize(("state", "event"), list(product(HandoffState, HandoffEvent)))
def test_what_is_not_in_the_table_is_refused(state, event):
    if (state, event) in TRANSITIONS:
        assert after(state, event, "x") is TRANSITIONS[state, event]
        return
    with pytest.raises(HandoffError, match=f"'x': {event.value} while it is {state.name.lower()}"):
        after(state, event, "x")


def test_every_state_is_reached_and_every_life_ends():
    reached = {HandoffState.ABSENT}
    for _ in HandoffState:
        reached |= {to for (state, _), to in TRANSITIONS.items() if state in reached}
    assert reached == set(HandoffState)
    assert {state for state, _ in TRANSITIONS} == set(HandoffState) - FINAL
    # Whatever state it is in, time ends it.
    alive = set(HandoffState) - FINAL - {HandoffState.ABSENT}
    assert {state for state, event in TRANSITIONS if event is HandoffEvent.QUIET} == alive


def test_the_diagram_in_the_documentation_is_made_from_the_table():
    assert f"```mermaid\n{diagram()}```" in PAGE.read_text(encoding="utf-8")

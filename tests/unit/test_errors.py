"""Errors: every class has its own wire code, and a code leads back to its class."""

from __future__ import annotations

import pytest

from kvstore import errors
from kvstore.errors import InternalError, KVStoreError, from_code


def kinds() -> list[type[KVStoreError]]:
    return [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, KVStoreError) and kind is not KVStoreError
    ]


def test_no_two_errors_share_a_code():
    codes = [kind.code for kind in kinds()]
    assert len(codes) == len(set(codes)) == len(kinds())


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.__name__)
def test_a_code_leads_back_to_its_class_and_keeps_the_message(kind):
    error = from_code(kind.code, "why")
    assert type(error) is kind
    assert str(error) == "why"


def test_an_unknown_code_is_an_internal_error_and_worth_a_retry():
    error = from_code(1234, "from a newer daemon")
    assert type(error) is InternalError
    assert error.retryable


def test_only_what_can_pass_by_itself_is_retryable():
    assert {kind.__name__ for kind in kinds() if kind.retryable} == {
        "DeadlineError",
        "DrainingError",
        "InternalError",
        "LimitError",
        "NoSpaceError",
        "TierError",
        "UnavailableError",
    }

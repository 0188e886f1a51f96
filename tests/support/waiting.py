"""The one way in which tests wait: for a condition, up to a deadline far above any real wait."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")

DEADLINE_SECONDS = 20.0
_POLL_SECONDS = 0.002


def wait_until(
    condition: Callable[[], Found], *, seconds: float = DEADLINE_SECONDS, what: str = ""
) -> Found:
    """Return the first true value of *condition*; fails the test after *seconds* without one."""
    ends_at = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > ends_at:
            raise AssertionError(f"not within {seconds} s: {what or condition}")
        time.sleep(_POLL_SECONDS)
    return found

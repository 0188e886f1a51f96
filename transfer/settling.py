"""Waiting for what cannot be broken off: a thread that still has somebody's memory, a process."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TypeVar

Result = TypeVar("Result")


async def settle(working: asyncio.Future[Result]) -> None:
    """Wait until *working* is done, however often this is cancelled; how it ended counts as seen.

    For what ends soon by itself, or has been told to.
    """
    while not working.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([working])
    if not working.cancelled():
        working.exception()

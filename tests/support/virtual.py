"""An event loop whose time passes at once, so that a run with waits can be repeated exactly."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import TypeVar

Answer = TypeVar("Answer")


class _Instant(selectors.DefaultSelector):
    """Waits for nothing: when nothing is ready, time moves on to what is due next."""

    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "stuck: nothing will ever happen again"
        self.loop.now += max(timeout, 0.0)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """Starts at second 0."""

    def __init__(self) -> None:
        self.now = 0.0
        selector = _Instant()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self.now


def run(main: Coroutine[object, object, Answer]) -> Answer:
    """Run *main* on a loop of its own; fails when it can never end."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)

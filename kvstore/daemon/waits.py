"""Requests that wait: each ends once, by what it waits for, by its time, or with its session."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvstore.store.lane import TierRead
    from kvstore.store.namespace import Namespace
    from kvstore.store.promotion import PendingLoad
    from kvstore.store.store import Store
    from kvstore.types import Digest


class Wait:
    """Something that a request waits for, up to some time."""

    def __init__(self) -> None:
        self.is_over = False
        self._timer: asyncio.TimerHandle | None = None

    def cancel(self) -> None:
        """End without an answer: nobody is there any more."""
        self._end()

    def _end(self) -> bool:
        """Return whether this is the end, and not one that comes behind it."""
        was_over, self.is_over = self.is_over, True
        if self._timer is not None:
            self._timer.cancel()
        return not was_over

    def _limit(
        self, loop: asyncio.AbstractEventLoop, seconds: float, act: Callable[[], None]
    ) -> None:
        if not self.is_over:
            self._timer = loop.call_later(seconds, act)


class FindWait(Wait):
    """A look-up that waits for other hosts' tiers to say what they have."""

    def __init__(self, loop: asyncio.AbstractEventLoop, go_on: Callable[[], None]) -> None:
        super().__init__()
        self._loop = loop
        self._go_on = go_on

    def start(self, seconds: float) -> None:
        """Wait for so long at most."""
        self._limit(self._loop, seconds, self.finish)

    def finish(self) -> None:
        """Go on with what is known now."""
        if self._end():
            self._go_on()


class LookupWait(Wait):
    """A look-up that waits for the chunk behind its hits, which is being written."""

    def __init__(self, store: Store, answer: Callable[[], None]) -> None:
        super().__init__()
        self._store = store
        self._answer = answer
        self._watched: tuple[Namespace, Digest] | None = None

    def watch(
        self,
        space: Namespace,
        blocking: Callable[[], Digest | None],
        loop: asyncio.AbstractEventLoop,
        seconds: float,
    ) -> None:
        """Wait until *blocking* names no chunk any more."""
        self._limit(loop, seconds, self._finish)
        self._blocking = blocking
        self._space = space
        self._changed()

    def cancel(self) -> None:
        """End the watch, too."""
        super().cancel()
        if self._watched is not None:
            self._store.unwatch(*self._watched, self._changed)

    def _changed(self) -> None:
        digest = self._blocking()
        if digest is None:
            self._watched = None
            self._finish()
        else:
            self._watched = (self._space, digest)
            self._store.watch(self._space, digest, self._changed)

    def _finish(self) -> None:
        if not self.is_over:
            self.cancel()
            self._answer()


class LoadWait(Wait):
    """A load that waits for chunks from slower tiers."""

    def __init__(self, answer: Callable[[int], None]) -> None:
        super().__init__()
        self._answer = answer
        self._pending: PendingLoad | None = None

    def begin(
        self,
        load: Callable[[Callable[[int], None]], PendingLoad],
        loop: asyncio.AbstractEventLoop,
        seconds: float,
    ) -> None:
        """Start *load*, which may be over at once, and answer it in time."""
        self._pending = load(self._finish)
        self._limit(loop, seconds, self._pending.give_up)

    @property
    def reads(self) -> Sequence[TierRead]:
        """What was read for it from slower tiers so far."""
        return () if self._pending is None else self._pending.reads

    def cancel(self) -> None:
        """Withdraw from what is on its way."""
        super().cancel()
        if self._pending is not None:
            self._pending.abandon()

    def _finish(self, count: int) -> None:
        if self._end():
            self._answer(count)


class CommitWait(Wait):
    """A commit that waits until slower tiers have its chunks, or have said no."""

    def __init__(self, answer: Callable[[list[int]], None]) -> None:
        super().__init__()
        self._answer = answer
        self._left: dict[int, int] = {}
        self._volatile: dict[int, None] = {}
        self._is_started = False

    @property
    def is_needed(self) -> bool:
        """Whether there is anything to wait for, or to say."""
        return bool(self._left or self._volatile)

    def expect(
        self, reservation: int, when_written: Callable[[Callable[[bool], None]], int]
    ) -> None:
        """Wait for all copies of one reservation; *when_written* tells of each, and how many."""

        def told(kept: bool) -> None:
            self._left[reservation] = self._left.get(reservation, 0) - 1
            if not kept:
                self._volatile[reservation] = None
            if not self._left[reservation]:
                del self._left[reservation]
            self._finish_if_complete()

        copies = when_written(told)
        # Some may have been told of already.
        left = self._left.get(reservation, 0) + copies
        if left:
            self._left[reservation] = left
        else:
            self._left.pop(reservation, None)

    def start(self, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        """Answer as soon as all is known, or when the time is over."""
        self._is_started = True
        self._limit(loop, seconds, self._give_up)
        self._finish_if_complete()

    def _give_up(self) -> None:
        self._volatile |= dict.fromkeys(self._left)
        self._left.clear()
        self._finish_if_complete()

    def _finish_if_complete(self) -> None:
        if self._is_started and not self._left and self._end():
            self._answer(list(self._volatile))

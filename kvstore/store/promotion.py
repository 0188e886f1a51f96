"""Loads that wait for slower tiers: who waits for which shard, and when a load is answered."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kvstore.store.lane import Fetch, TierRead

if TYPE_CHECKING:
    from kvstore.store.store import Loading


class PendingLoad:
    """A load some of whose chunks are on their way into the host tier.

    Answered once, by *done*, with the number of leading chunks that are still possible: as
    soon as all of those have come, or when it is given up.
    """

    def __init__(
        self,
        loading: Loading,
        done: Callable[[int], None],
        withdrawn: Callable[[Fetch], None],
    ) -> None:
        self.loading = loading
        self.limit = len(loading.slots)
        self.reads: list[TierRead] = []
        self._done: Callable[[int], None] | None = done
        self._withdrawn = withdrawn
        self._missing: dict[Fetch, int] = {}
        self._is_complete = False

    def wait_for(self, fetch: Fetch, position: int) -> None:
        """Count *fetch* as needed for the chunk at *position*."""
        self._missing.setdefault(fetch, position)
        fetch.waiters[self.arrived] = None

    def arrived(self, fetch: Fetch, is_here: bool) -> None:
        """Note that *fetch* has ended: a chunk that did not come ends the prefix."""
        position = self._missing.pop(fetch)
        self.reads += fetch.reads
        if not is_here:
            self._end_at(position)
        if self._is_complete and not self._missing:
            self._answer()

    def start(self) -> None:
        """Answer as soon as nothing is waited for any more; all that is needed has been named."""
        self._is_complete = True
        if not self._missing:
            self._answer()

    def give_up(self) -> None:
        """Answer now, with what has come."""
        self._end_at(min(self._missing.values(), default=self.limit))
        self._answer()

    def abandon(self) -> None:
        """Stop waiting; nobody is there to be answered."""
        self._done = None
        self._end_at(0)

    def _end_at(self, position: int) -> None:
        """Let the prefix end before *position*, and withdraw from all that lies behind."""
        self.limit = min(self.limit, position)
        for fetch in [fetch for fetch, at in self._missing.items() if at >= self.limit]:
            del self._missing[fetch]
            fetch.waiters.pop(self.arrived, None)
            self._withdrawn(fetch)

    def _answer(self) -> None:
        done, self._done = self._done, None
        if done is not None:
            done(self.limit)

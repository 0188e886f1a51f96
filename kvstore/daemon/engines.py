"""What engines tell of their transfers between GPU and daemon: each of its session, and all told.

Counts of a session only grow, and stay in the sum when it has ended.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Final

from kvstore.limits import STATS_ENGINES_MAX
from kvstore.metrics import ENGINE_GPU_COUNTERS
from kvstore.protocol.stats import EngineStats
from kvstore.types import SessionId

# What fits everywhere that it is shown. Only an engine that makes its counts up comes so far.
_SUM_MAX: Final = 2**63 - 1


class EngineCounters:
    """The counters of engines with a GPU, by the names of `ENGINE_GPU_COUNTERS`."""

    def __init__(self) -> None:
        self._open: dict[SessionId, dict[str, int]] = {}
        self._ended: Counter[str] = Counter()

    def tell(self, session: SessionId, counters: Mapping[str, int]) -> None:
        """Take what the engine of *session* has counted since that began.

        Names that are not known here say nothing, and neither does a count below an earlier one.
        """
        known = {name: n for name, n in counters.items() if name in ENGINE_GPU_COUNTERS}
        if not known:
            return
        # Who has told last is shown first.
        before = self._open.pop(session, {})
        self._open[session] = before | {n: max(v, before.get(n, 0)) for n, v in known.items()}

    def end(self, session: SessionId) -> None:
        """Note that *session* has ended: nothing more will come of it."""
        self._ended.update(self._open.pop(session, {}))

    def totals(self) -> dict[str, int]:
        """Return every counter, of all sessions that are and were."""
        found = Counter(self._ended)
        for counters in self._open.values():
            found.update(counters)
        return {name: min(found[name], _SUM_MAX) for name in ENGINE_GPU_COUNTERS}

    def latest(self, names: Mapping[SessionId, str]) -> Iterator[EngineStats]:
        """Yield the open sessions that have told last; *names* are those of their clients."""
        told: Iterable[SessionId] = islice(reversed(self._open), STATS_ENGINES_MAX)
        for session in told:
            counters = {name: n for name, n in self._open[session].items() if n}
            yield EngineStats(session=session, client=names.get(session, ""), counters=counters)

"""One lane: the chunks of one shape and source, stored, loaded, and moved by the bare copy.

Every pass goes once over all chunks, far more bytes than the caches hold, so each pass finds
its bytes as cold as the others do. The floor moves the very same bytes between the very same
addresses as the pass through the daemon before it.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Final, NamedTuple

from kvstore.bench.echo import request_of
from kvstore.transfer import copies
from kvstore.transfer.native import address_of
from kvstore.types import Digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kvstore.bench.daemon import BenchDaemon
    from kvstore.bench.echo import EchoClient
    from kvstore.client.sync import Space
    from kvstore.transfer.copies import Runs

_ROUND_TRIP_BYTES: Final = 64
"""About what a reserve, a load or a commit of one chunk takes on the wire."""

_numbers = count()


class Pass(NamedTuple):
    """One pass: the median call, and the CPU time of all calls on both sides."""

    seconds: float
    client_cpu_seconds: float
    daemon_cpu_seconds: float


class Lane:
    """Chunks at *runs*, *batch* of them a call, through *daemon*."""

    def __init__(
        self, daemon: BenchDaemon, space: Space, runs: Sequence[Runs], batch: int, echo: EchoClient
    ) -> None:
        self.checksums = daemon.checksums
        self.batch = batch
        self._daemon = daemon
        self._space = space
        self.runs = runs
        self._echo = echo
        self._digests: list[Digest] = []
        self._addresses: list[int] = []

    def store(self) -> Pass:
        """Store all chunks under new digests."""
        self._digests = [_new_digest() for _ in self.runs]
        done = self._timed(
            [partial(self._store, self._digests[at], self.runs[at]) for at in self._slices()]
        )
        with self._space.load(self._digests) as loaded:
            self._addresses = [address_of(chunk.shards[0].view) for chunk in loaded.chunks]
        return done

    def load(self) -> Pass:
        """Load all chunks to where they came from."""
        return self._timed(
            [partial(self._load, self._digests[at], self.runs[at]) for at in self._slices()]
        )

    def copy_in(self, *, checksums: bool = False) -> Pass:
        """Gather the same bytes to the same places, and nothing else."""
        gather = partial(self._gather, checksums=checksums)
        return self._timed([partial(gather, at) for at in self._slices()])

    def copy_out(self, *, checksums: bool = False) -> Pass:
        """Scatter the same bytes from the same places, and nothing else."""
        scatter = partial(self._scatter, checksums=checksums)
        return self._timed([partial(scatter, at) for at in self._slices()])

    def thin_store(self) -> Pass:
        """Do what no store can do without: a round trip, the copy, a round trip."""
        return self._timed([partial(self._thin_store, at) for at in self._slices()])

    def thin_load(self) -> Pass:
        """Do what no load can do without: a round trip and the copy."""
        return self._timed([partial(self._thin_load, at) for at in self._slices()])

    def clear(self) -> None:
        """Delete what was stored."""
        self._space.delete(self._digests)

    def _timed(self, calls: Sequence[Callable[[], object]]) -> Pass:
        seconds: list[float] = []
        daemon_cpu, client_cpu = self._daemon.cpu_seconds, time.process_time()
        for call in calls:
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        client_cpu = time.process_time() - client_cpu
        return Pass(statistics.median(seconds), client_cpu, self._daemon.cpu_seconds - daemon_cpu)

    def _slices(self) -> Iterator[slice]:
        return (slice(at, at + self.batch) for at in range(0, len(self.runs), self.batch))

    def _store(self, digests: Sequence[Digest], runs: Sequence[Runs]) -> None:
        report = self._space.store(digests, runs)
        assert report.stored == len(digests), "the arena has room for all"

    def _load(self, digests: Sequence[Digest], runs: Sequence[Runs]) -> None:
        with self._space.load(digests) as loaded:
            loaded.copy_to(runs)

    def _gather(self, at: slice, *, checksums: bool) -> None:
        for address, runs in zip(self._addresses[at], self.runs[at], strict=True):
            copies.gather_at(address, runs.size_bytes, runs, checksums=checksums)

    def _scatter(self, at: slice, *, checksums: bool) -> None:
        for address, runs in zip(self._addresses[at], self.runs[at], strict=True):
            copies.scatter_from(address, runs.size_bytes, runs, checksums=checksums)

    def _thin_store(self, at: slice) -> None:
        self._round_trip()
        self._gather(at, checksums=False)
        self._round_trip()

    def _thin_load(self, at: slice) -> None:
        self._round_trip()
        self._scatter(at, checksums=False)

    def _round_trip(self) -> None:
        self._echo.call(_REQUEST, _ROUND_TRIP_BYTES)


_REQUEST: Final = request_of(_ROUND_TRIP_BYTES, _ROUND_TRIP_BYTES)


def _new_digest() -> Digest:
    return Digest(hashlib.sha256(next(_numbers).to_bytes(8, "little")).digest())

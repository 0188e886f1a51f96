"""The client for engine threads: blocking, thread-safe, one round trip a call.

with Client.connect(path) as client:
    space = client.attach(manifest)
    space.store(digests, sources)
    with space.load(digests) as loaded:
        loaded.copy_to(targets)
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from kvstore.client.chunks import AttachedSpace, LoadedChunks, Vacancy, check_digests, check_sources
from kvstore.client.coding import Coding, Part, plain_part
from kvstore.client.connection import Connection, Waiter, deadline_ms
from kvstore.client.handoff import Handoffs
from kvstore.errors import UnavailableError, from_code
from kvstore.limits import (
    CHUNKS_PER_TRANSFER_MAX,
    LOOKUP_NAME_MAX_CHARS,
    MIB,
    PATIENCE_SECONDS,
)
from kvstore.protocol import messages as m
from kvstore.transfer.arena import ArenaMapping
from kvstore.types import Digest, HeadRange, HintKind, ReserveOutcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from kvstore.protocol.manifest import Manifest
    from kvstore.transfer.copies import Runs

_TIMEOUT_SECONDS: Final = 5.0
# A commit costs both sides some 0.1 ms and, where they share a core, the time of two switches:
# one for every few milliseconds of copying (8 MiB a commit cost a tenth of the speed).
_COMMIT_BYTES: Final = 64 * MIB
_COMMITS_IN_FLIGHT_MAX: Final = 32
_ALIVE_WHILE_WRITING_SECONDS: Final = 1.0


class StoreReport(NamedTuple):
    """The truth about a store, in chunks.

    *stored* are new, *present* were here or on their way, *refused* found no room or do not fit
    their codec. *volatile* of the stored ones are in the host tier alone, though a slower tier was
    to have them.
    """

    stored: int
    present: int
    refused: int
    bytes_stored: int
    volatile: int = 0

    def plus(self, other: StoreReport) -> StoreReport:
        """Return both as one."""
        return StoreReport(*(a + b for a, b in zip(self, other, strict=True)))


NOTHING_STORED: Final = StoreReport(0, 0, 0, 0)


class Client:
    """A session with the daemon. Safe to share between threads; every error is typed."""

    def __init__(self, connection: Connection, timeout_seconds: float) -> None:
        self._connection = connection
        self._timeout_seconds = timeout_seconds
        self._arena: ArenaMapping | None = None

    @classmethod
    def connect(
        cls,
        path: Path,
        *,
        name: str = "",
        tenant: str = "",
        timeout_seconds: float = _TIMEOUT_SECONDS,
    ) -> Self:
        """Open a session at the socket *path*, for *tenant* if it is one's.

        *timeout_seconds* bounds this and every later call. Raises `UnavailableError`,
        `RefusedError`, `VersionError` or `LimitError`.
        """
        connection = Connection(path, client=name, timeout_seconds=timeout_seconds, tenant=tenant)
        return cls(connection, timeout_seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_open(self) -> bool:
        """Whether the session still stands, as far as is known here."""
        return self._connection.is_open

    def attach(self, manifest: Manifest) -> Space:
        """Enter the namespace of *manifest*; raises `ManifestError` or `TooLargeError`."""
        request = m.Attach(*self._head(), manifest.encode(), manifest.chunk_bytes)
        attached = self._connection.call(request, m.Attached, self._timeout_seconds)
        if self._arena is None:
            if self._connection.arena_fd is None:
                raise UnavailableError("the daemon did not pass its arena")
            self._arena = ArenaMapping.open(self._connection.arena_fd)
            if attached.prefaulted:
                self._arena.map_in()
        space = AttachedSpace(manifest, attached, self._arena)
        return Space(self._connection, space, self._timeout_seconds)

    def ping(self, payload: bytes = b"") -> bytes:
        """Return *payload* as it comes back from the daemon."""
        request = m.Ping(*self._head(), payload)
        return self._connection.call(request, m.Pong, self._timeout_seconds).payload

    def stats(self) -> m.DaemonStats:
        """Return what the daemon holds and has done."""
        request = m.Stats(*self._head())
        return self._connection.call(request, m.StatsReply, self._timeout_seconds).stats

    def close(self) -> None:
        """End the session; the daemon frees all that it held. Idempotent."""
        self._connection.close()
        if self._arena is not None:
            self._arena.stop()

    def _head(self) -> tuple[int, int]:
        return self._connection.next_id(), deadline_ms(self._timeout_seconds)


class Space:
    """One namespace, entered through one client."""

    def __init__(
        self, connection: Connection, space: AttachedSpace, timeout_seconds: float
    ) -> None:
        self.attached = space
        self.manifest = space.manifest
        self._connection = connection
        self._timeout_seconds = timeout_seconds

    @property
    def connection(self) -> Connection:
        """The session that it belongs to."""
        return self._connection

    @property
    def timeout_seconds(self) -> float:
        """The bound for its calls."""
        return self._timeout_seconds

    @property
    def handoffs(self) -> Handoffs:
        """The hand-offs of this namespace."""
        return Handoffs(self._connection, self.attached, self._timeout_seconds)

    def with_timeout(self, timeout_seconds: float) -> Space:
        """Return the same space with another bound for its calls."""
        return Space(self._connection, self.attached, timeout_seconds)

    def lookup(
        self,
        digests: Sequence[Digest],
        *,
        window: int = 0,
        wait: bool = False,
        lease: bool = False,
        recompute_us: int = 0,
        name: str = "",
        timeout_seconds: float | None = None,
    ) -> m.Found:
        """Count the leading chunks present, or those of a sliding window (see `messages.Lookup`).

        With *lease*, they stay until `release(found.lease)`. With *recompute_us*, what computing
        a chunk costs, those that take longer to load are not counted.
        """
        timeout_seconds = timeout_seconds or self._timeout_seconds
        # A look-up that waits is answered by the daemon, a little before this side gives up.
        deadline = deadline_ms(timeout_seconds * 0.9 if wait else timeout_seconds)
        request = m.Lookup(
            self._connection.next_id(),
            deadline,
            self.attached.number,
            check_digests(digests),
            window,
            wait,
            lease,
            recompute_us,
            name[:LOOKUP_NAME_MAX_CHARS],
            self.attached.traceparent(),
        )
        return self._connection.call(request, m.Found, timeout_seconds)

    def load(
        self,
        digests: Sequence[Digest],
        *,
        heads: HeadRange | None = None,
        recompute_us: int = 0,
        patience_seconds: float | None = None,
    ) -> LoadedChunks:
        """Lease the leading chunks present and return them, with the shards that hold *heads*.

        What is in slower tiers is waited for, up to *patience_seconds* (None: no longer than
        for any other answer); what has not come by then is left out.
        """
        return self.begin_load(
            digests, heads=heads, recompute_us=recompute_us, patience_seconds=patience_seconds
        ).finish()

    def begin_load(
        self,
        digests: Sequence[Digest],
        *,
        heads: HeadRange | None = None,
        recompute_us: int = 0,
        patience_seconds: float | None = None,
    ) -> BegunLoad:
        """Ask for a load and go on: its chunks come up meanwhile. `finish` or `abandon` it."""
        wanted = heads or self.manifest.all_heads
        patience = self._timeout_seconds * 0.9 if patience_seconds is None else patience_seconds
        asked_at = time.monotonic()
        request = m.Load(
            self._connection.next_id(),
            deadline_ms(patience),
            self.attached.number,
            check_digests(digests),
            *wanted,
            recompute_us,
            self.attached.traceparent(),
        )
        waiter = self._connection.begin(request)

        def finish() -> LoadedChunks:
            left = max(asked_at + patience - time.monotonic(), 0.0) + self._timeout_seconds
            loaded = self._connection.finish_slowly(waiter, m.Loaded, left, self._timeout_seconds)
            return LoadedChunks(
                self.attached,
                digests,
                wanted,
                loaded,
                asked_at=asked_at,
                let_go=self._let_go,
                is_open=lambda: self._connection.is_open,
            )

        return BegunLoad(finish, lambda: self._connection.abandon(waiter, self._let_go_of))

    def prefetch(self, digests: Sequence[Digest]) -> int:
        """Have chunks brought into the host tier ahead of need; return how many will come."""
        request = m.Prefetch(*self._head(), check_digests(digests))
        return self._connection.call(request, m.Done, self._timeout_seconds).count

    def hint(
        self, digests: Sequence[Digest], kind: HintKind, *, seconds: int = 0, host: str = ""
    ) -> int:
        """Say what is expected of a conversation (see `messages.Hint`); return its chunks here."""
        request = m.Hint(*self._head(), check_digests(digests), kind, seconds, host)
        return self._connection.call(request, m.Done, self._timeout_seconds).count

    def release(self, lease: int) -> None:
        """End *lease*; raises `LeaseError` when this session does not hold it."""
        request = m.Release(self._connection.next_id(), deadline_ms(self._timeout_seconds), [lease])
        self._connection.call(request, m.Done, self._timeout_seconds)

    @contextlib.contextmanager
    def reserve(
        self,
        digests: Sequence[Digest],
        *,
        parent: Digest | None = None,
        heads: HeadRange | None = None,
        sizes: Sequence[int] = (),
    ) -> Iterator[list[Vacancy]]:
        """Reserve room for consecutive chunks; fill it inside the block.

        On leaving, what was filled is committed and the rest given back; after an exception
        all of it is given back. Raises the error of the first commit that failed.
        """
        vacancies = self._reserve(digests, parent, heads, sizes)
        try:
            yield vacancies
        except BaseException:
            self._abort(vacancies)
            raise
        self._abort([vacancy for vacancy in vacancies if vacancy.root is None])
        filled = [vacancy for vacancy in vacancies if vacancy.root is not None]
        if filled:
            self._finish_commit(self._begin_commit(filled))

    def store(
        self,
        digests: Sequence[Digest],
        sources: Sequence[Runs],
        *,
        parent: Digest | None = None,
        heads: HeadRange | None = None,
        coding: Coding | None = None,
    ) -> StoreReport:
        """Store chunk i from `sources[i]`; what is stored already costs no copy.

        They are encoded by *coding*, or as the manifest's codec does by default; where the codec
        is of variable rate, before it is known what is stored already. Chunks are
        committed in groups, while the next are being copied. Raises the error of the first
        commit that failed.
        """
        check_sources(digests, sources)
        wanted = heads or self.manifest.all_heads
        coding = coding or self.attached.coding(wanted)
        if coding is None:
            return self._store_part(plain_part(digests, sources, parent), wanted)
        report = NOTHING_STORED
        for part in coding.parts(digests, sources, parent):
            report = report.plus(self._store_part(part, wanted))
        return report._replace(refused=len(digests) - report.stored - report.present)

    def _store_part(self, part: Part, heads: HeadRange) -> StoreReport:
        """Store *part*, in turns when it is larger than the arena and is written through.

        What a slower tier has can leave for what did not fit beside it.
        """
        total, start, turn = NOTHING_STORED, 0, len(part.digests)
        while start < len(part.digests):
            vacancies, volatile = self._store_what_fits(part.between(start, start + turn), heads)
            outcomes = [vacancy.outcome for vacancy in vacancies]
            is_short = ReserveOutcome.NO_SPACE in outcomes
            fits = outcomes.index(ReserveOutcome.NO_SPACE) if is_short else len(outcomes)
            goes_on = not is_short or (self.attached.through and fits and not volatile)
            total = total.plus(report_of(vacancies[:fits] if goes_on else vacancies, volatile))
            if not goes_on:
                break
            start, turn = start + fits, fits
        return total._replace(refused=len(part.digests) - total.stored - total.present)

    def _store_what_fits(self, part: Part, heads: HeadRange) -> tuple[list[Vacancy], int]:
        """Return what became of *part*, and how many a slower tier was to have and has not."""
        vacancies = self._reserve(part.digests, part.parent, heads, part.sizes)
        todo = [(n, vacancy) for n, vacancy in enumerate(vacancies) if vacancy.is_reserved]
        commits: deque[Waiter] = deque()
        volatile = 0
        for start, stop in _groups([vacancy.size_bytes for _, vacancy in todo]):
            filled: list[Vacancy] = []
            unfit: list[Vacancy] = []
            try:
                for number, vacancy in todo[start:stop]:
                    (filled if part.fill(number, vacancy) else unfit).append(vacancy)
                if len(commits) == _COMMITS_IN_FLIGHT_MAX:
                    volatile += self._finish_commit(commits.popleft())
            except BaseException:
                self._abort([vacancy for _, vacancy in todo[start:]])
                raise
            self._abort(unfit)
            if filled:
                commits.append(self._begin_commit(filled))
        for commit in commits:
            volatile += self._finish_commit(commit)
        return vacancies, volatile

    def take_room(
        self,
        digests: Sequence[Digest],
        *,
        parent: Digest | None = None,
        heads: HeadRange | None = None,
        sizes: Sequence[int] = (),
    ) -> list[Vacancy]:
        """Reserve room that the caller commits or gives back, each in its own time.

        For memory that others write to, such as a device: see `reserve` for what does both.
        """
        return self._reserve(digests, parent, heads, sizes)

    def commit(self, vacancies: Sequence[Vacancy]) -> int:
        """Publish what was sealed; return how many a slower tier was to have and has not.

        Raises the error of the first that failed.
        """
        return self._finish_commit(self._begin_commit(vacancies))

    def give_back(self, vacancies: Sequence[Vacancy]) -> None:
        """Return room to which nobody writes any more. Silent when the session is gone."""
        self._abort(vacancies)

    def pin(self, digests: Sequence[Digest], *, hard: bool = False) -> int:
        """Pin the chunks that are present; return their number."""
        request = m.Pin(*self._head(), check_digests(digests), hard)
        return self._connection.call(request, m.Done, self._timeout_seconds).count

    def unpin(self, digests: Sequence[Digest]) -> int:
        """End the pins on chunks; return how many had one."""
        request = m.Unpin(*self._head(), check_digests(digests))
        return self._connection.call(request, m.Done, self._timeout_seconds).count

    def delete(self, digests: Sequence[Digest], *, damaged: bool = False) -> m.Done:
        """Remove chunks, perhaps as *damaged*; those in use are counted as busy and stay."""
        request = m.Delete(*self._head(), check_digests(digests), damaged)
        return self._connection.call(request, m.Done, self._timeout_seconds)

    def _head(self) -> tuple[int, int, int]:
        number = self.attached.number
        return self._connection.next_id(), deadline_ms(self._timeout_seconds), number

    def _reserve(
        self,
        digests: Sequence[Digest],
        parent: Digest | None,
        heads: HeadRange | None,
        sizes: Sequence[int],
    ) -> list[Vacancy]:
        wanted = heads or self.manifest.all_heads
        request = m.Reserve(
            *self._head(),
            check_digests(digests),
            parent or b"",
            *wanted,
            list(sizes),
            self.attached.traceparent(),
        )
        reserved = self._connection.call(request, m.Reserved, self._timeout_seconds)
        lengths = sizes or [self.manifest.shard_bytes(wanted)] * len(digests)
        return [
            Vacancy(self.attached, digest, slot, size)
            for digest, slot, size in zip(digests, reserved.slots, lengths, strict=True)
        ]

    def _begin_commit(self, vacancies: Sequence[Vacancy]) -> Waiter:
        filled = [m.Filled(v.reservation, v.root) for v in vacancies if v.root is not None]
        deadline = deadline_ms(PATIENCE_SECONDS if self.attached.through else self._timeout_seconds)
        traceparent = self.attached.traceparent()
        request = m.Commit(self._connection.next_id(), deadline, filled, traceparent)
        return self._connection.begin(request)

    def _finish_commit(self, commit: Waiter) -> int:
        """Raise what failed; return how many chunks a slower tier was to have and has not."""
        patience, alive = 0.0, self._timeout_seconds
        if self.attached.through:
            # The daemon's disk threads take the processor from it, and nobody waits for a store.
            patience, alive = PATIENCE_SECONDS, max(alive, _ALIVE_WHILE_WRITING_SECONDS)
        committed = self._connection.finish_slowly(
            commit, m.Committed, patience + self._timeout_seconds, alive
        )
        for failure in committed.failures:
            raise from_code(failure.code, failure.message)
        return len(committed.volatile)

    def _abort(self, vacancies: Sequence[Vacancy]) -> None:
        reservations = [vacancy.reservation for vacancy in vacancies if vacancy.is_reserved]
        if reservations:
            deadline = deadline_ms(self._timeout_seconds)
            # The session may have ended, and the reservations with it.
            with contextlib.suppress(UnavailableError):
                self._connection.post(m.Abort(self._connection.next_id(), deadline, reservations))

    def _let_go(self, lease: int) -> None:
        request = m.Release(self._connection.next_id(), deadline_ms(self._timeout_seconds), [lease])
        with contextlib.suppress(UnavailableError):
            self._connection.post(request)

    def _let_go_of(self, reply: m.AnyReply) -> None:
        """End the lease of a load that nobody waits for any more."""
        if isinstance(reply, m.Loaded) and reply.lease:
            self._let_go(reply.lease)


class BegunLoad:
    """A load that was asked for: the daemon brings its chunks up while the caller does else."""

    def __init__(self, finish: Callable[[], LoadedChunks], abandon: Callable[[], None]) -> None:
        self.finish = finish
        """Wait for the chunks, once, and return them."""
        self.abandon = abandon
        """Let them go as soon as they have come, without waiting for them."""


def _groups(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield the bounds of runs of *sizes* that are each worth a commit of their own."""
    start = filled_bytes = 0
    for position, size in enumerate(sizes, 1):
        filled_bytes += size
        is_full = filled_bytes >= _COMMIT_BYTES or position - start == CHUNKS_PER_TRANSFER_MAX
        if is_full or position == len(sizes):
            yield start, position
            start, filled_bytes = position, 0


def report_of(vacancies: Sequence[Vacancy], volatile: int) -> StoreReport:
    """Return what became of *vacancies*, of which those that are sealed were committed."""
    stored = [vacancy for vacancy in vacancies if vacancy.root is not None]
    here = {ReserveOutcome.PRESENT, ReserveOutcome.ARRIVING}
    present = sum(vacancy.outcome in here for vacancy in vacancies)
    refused = len(vacancies) - len(stored) - present
    return StoreReport(len(stored), present, refused, sum(v.size_bytes for v in stored), volatile)

"""The client for connectors: it never raises because of the daemon. What fails is a miss."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, Self, TypeVar

from kvstore.client.breaker import Breaker
from kvstore.client.coding import coding_for
from kvstore.client.handoff import CacheHandoffs
from kvstore.client.sync import BegunLoad, Client, Space, StoreReport
from kvstore.compression.guard import CodecCounters
from kvstore.config import default_socket_path
from kvstore.errors import (
    ChecksumError,
    ContainerError,
    KVStoreError,
    RequestError,
    UnavailableError,
)
from kvstore.limits import (
    CHUNKS_PER_TRANSFER_MAX,
    KEYS_PER_REQUEST_MAX,
    LOAD_PART_BYTES,
    PATIENCE_SECONDS,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kvstore.client.chunks import LoadedChunks
    from kvstore.client.coding import Coding
    from kvstore.compression.policy import CodecPolicy
    from kvstore.protocol.manifest import Manifest
    from kvstore.transfer.copies import Runs
    from kvstore.types import Digest, HeadRange, HintKind

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

if TYPE_CHECKING:
    CopyPart = Callable[[int, Sequence[Digest], LoadedChunks, Space], int]
    PutBatch = Callable[[int, Sequence[Digest], Digest | None, Space], StoreReport]

# With what it takes to give up, a daemon that hangs costs 50 ms, once.
_TIMEOUT_SECONDS: Final = 0.04
# A connection is made in the background, so it may take longer than a call.
_CONNECT_TIMEOUT_SECONDS: Final = 1.0
_NOTHING_STORED: Final = StoreReport(0, 0, 0, 0)
# Beyond these, more loads in flight would not make any of them sooner.
_LOADS_AHEAD: Final = 2
# Damaged chunks that could not be deleted yet, because others were reading them.
_DAMAGED_MAX: Final = 256


class _Link(NamedTuple):
    """One session that has entered the namespace."""

    client: Client
    space: Space


class Hits(NamedTuple):
    """What a look-up found: *chunks* leading ones can be served.

    *tiers* is run-length, [(bits of `TierKind`, chunks)] in prefix order, for the chunks that
    the hit needs: all of them, or those of the window.
    """

    chunks: int
    tiers: list[tuple[int, int]]


_NOTHING_FOUND: Final = Hits(0, [])


class PrefixCache:
    """The chunks of one namespace, as one engine uses them. Thread-safe, fails open.

    With *heads*, the engine is one of several that share the model's heads: only those are
    loaded and stored, and a chunk is found when all heads of it have been stored.

    A daemon that is gone, or does not answer within *timeout_seconds*, costs that time once;
    from then on every call is a miss at once, until a background probe finds the daemon
    again. Construction itself never fails for want of a daemon.

    Loads from slower tiers may take longer, for as long as the daemon shows that it lives:
    what computing the same tokens takes, when *recompute_us_per_token* says so, and
    `PATIENCE_SECONDS` at most. With *tenant*, all of it is that tenant's.

    Chunks are encoded as the manifest's codec does, *policy* saying how in detail, and decoded
    by what was stored. Raises `CodecError` for what the codec cannot do with such chunks.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        heads: HeadRange | None = None,
        socket: Path | str | None = None,
        timeout_seconds: float = _TIMEOUT_SECONDS,
        name: str = "",
        tenant: str = "",
        recompute_us_per_token: float = 0.0,
        policy: CodecPolicy | None = None,
    ) -> None:
        self.manifest = manifest
        self.heads = heads or manifest.all_heads
        self.damaged_chunks = 0
        if not 0 <= self.heads.start < self.heads.stop <= manifest.kv_heads:
            raise RequestError(f"heads {heads} of a model with {manifest.kv_heads}")
        self._coding = coding_for(manifest, self.heads, policy)
        self._path = default_socket_path(os.environ) if socket is None else Path(socket)
        self._timeout_seconds = timeout_seconds
        self._name = name
        self._tenant = tenant
        chunk_bytes = self._coding.chunk_bytes if self._coding else manifest.shard_bytes(self.heads)
        part_chunks = LOAD_PART_BYTES // max(chunk_bytes, 1)
        self._chunks_per_part = max(1, min(CHUNKS_PER_TRANSFER_MAX, part_chunks))
        self._recompute_us = round(recompute_us_per_token * manifest.chunk_tokens)
        self.handoffs = CacheHandoffs(self.ask)
        self._damaged: list[Digest] = []
        self._breaker = Breaker(self._connect, lambda link: link.client.close())
        self._breaker.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_connected(self) -> bool:
        """Whether the daemon is being asked at present."""
        return self._breaker.link is not None

    @property
    def coding(self) -> Coding | None:
        """How chunks are encoded; None where they are stored as they are."""
        return self._coding

    @property
    def codec_counters(self) -> CodecCounters:
        """What encoding has done so far: bytes, errors, fallbacks, chunks that did not fit."""
        return CodecCounters() if self._coding is None else self._coding.counters

    def lookup(self, digests: Sequence[Digest], *, window: int = 0) -> int:
        """Return how many leading chunks are present.

        With *window* w > 0: the largest n such that chunks [n - w, n) are all present, the
        rule for sliding-window layers.
        """
        return self.find(digests, window=window).chunks

    def find(self, digests: Sequence[Digest], *, window: int = 0, name: str = "") -> Hits:
        """Return the same, and which tiers hold what was found.

        By its *name*, such as the engine's id of the request, a look-up can be explained later.
        """
        window = min(window, len(digests))
        is_one_request = len(digests) <= KEYS_PER_REQUEST_MAX
        # Longer windows would make requests overlap too much to get on. For them the leading
        # chunks are counted, which are right for every window.
        if window > 0 and (is_one_request or window <= KEYS_PER_REQUEST_MAX // 2):
            return self._find_window(digests, window, name)
        hits, tiers = 0, list[tuple[int, int]]()
        for start, batch in _batches(digests, KEYS_PER_REQUEST_MAX):
            found = self.ask(partial(self._find, batch, 0, name), _NOTHING_FOUND)
            hits += found.chunks
            tiers += found.tiers
            if hits < start + len(batch):
                break
        return Hits(hits, tiers)

    def load(self, digests: Sequence[Digest], targets: Sequence[Runs]) -> int:
        """Copy chunk i to `targets[i]`; return how many leading ones are whole and right.

        Targets behind those may hold anything.
        """

        def copy(start: int, part: Sequence[Digest], loaded: LoadedChunks, space: Space) -> int:
            return self._copy(part, loaded, targets[start : start + len(part)], space)

        return self.load_with(digests, copy)

    def load_with(
        self,
        digests: Sequence[Digest],
        copy: CopyPart,
        *,
        via: Callable[[Space], Space] | None = None,
    ) -> int:
        """Load, and have *copy* bring what has come to where it belongs; see `load`.

        *copy* is given consecutive chunks and the number of the first, and returns how many
        leading ones are whole and right. *via* says which space of the session to ask.
        """
        progress = _Progress()

        def load(space: Space) -> None:
            self._load_parts(digests, copy, progress, via(space) if via else space)

        self.ask(load, None)
        return progress.chunks

    def prefetch(self, digests: Sequence[Digest]) -> int:
        """Have chunks brought into the host tier ahead of need; return how many will come."""
        return sum(
            self.ask(partial(_prefetch, batch), 0)
            for _, batch in _batches(digests, KEYS_PER_REQUEST_MAX)
        )

    def hint(
        self, digests: Sequence[Digest], kind: HintKind, *, seconds: int = 0, host: str = ""
    ) -> None:
        """Say what is expected of the conversation that ends with the last of *digests*.

        It comes back in about *seconds*, goes on at *host*, or is finished. Nothing depends on it.
        """
        for _, batch in _batches(digests, KEYS_PER_REQUEST_MAX):
            self.ask(partial(_hint, batch, kind, seconds, host), 0)

    def store(
        self, digests: Sequence[Digest], sources: Sequence[Runs], *, parent: Digest | None = None
    ) -> StoreReport:
        """Store chunk i from `sources[i]`; *parent* is the digest before the first.

        Reports what was kept; nothing, while there is no daemon.
        """

        def put(
            start: int, batch: Sequence[Digest], parent: Digest | None, space: Space
        ) -> StoreReport:
            some = sources[start : start + len(batch)]
            return space.store(batch, some, parent=parent, heads=self.heads, coding=self._coding)

        return self.store_with(digests, put, parent=parent)

    def store_with(
        self, digests: Sequence[Digest], put: PutBatch, *, parent: Digest | None = None
    ) -> StoreReport:
        """Store, and have *put* fill the room; see `store`.

        *put* is given consecutive chunks, the number of the first, and the digest before it.
        """
        stored = _NOTHING_STORED
        for start, batch in _batches(digests, CHUNKS_PER_TRANSFER_MAX):
            report = self.ask(partial(self._store, start, batch, parent, put), _NOTHING_STORED)
            stored = StoreReport(*(a + b for a, b in zip(stored, report, strict=True)))
            parent = batch[-1]
        return stored

    def close(self) -> None:
        """End the session. Idempotent."""
        self._breaker.close()

    def _find_window(self, digests: Sequence[Digest], window: int, name: str) -> Hits:
        """Look from the end, request by request, overlapping by what a window may reach back."""
        stop = len(digests)
        while stop > 0:
            start = max(0, stop - KEYS_PER_REQUEST_MAX)
            part = digests[start:stop]
            found = self.ask(partial(self._find, part, window, name), _NOTHING_FOUND)
            if found.chunks >= window or start == 0:
                return Hits(start + found.chunks if found.chunks else 0, found.tiers)
            stop = start + window - 1
        return _NOTHING_FOUND

    def _find(self, digests: Sequence[Digest], window: int, name: str, space: Space) -> Hits:
        found = space.lookup(digests, window=window, recompute_us=self._recompute_us, name=name)
        return Hits(found.hits, found.tiers)

    def _load_parts(
        self,
        digests: Sequence[Digest],
        copy: CopyPart,
        progress: _Progress,
        space: Space,
    ) -> None:
        """Load part by part: while one is copied, the daemon brings up the next."""
        patience = PATIENCE_SECONDS
        if self._recompute_us:
            cost_seconds = len(digests) * self._recompute_us / 1e6
            patience = min(patience, max(cost_seconds, self._timeout_seconds))
        ends_at = time.monotonic() + patience
        parts = deque(_batches(digests, self._chunks_per_part))
        begun: deque[tuple[int, Sequence[Digest], BegunLoad]] = deque()
        try:
            while parts or begun:
                while parts and len(begun) < _LOADS_AHEAD:
                    start, part = parts.popleft()
                    begun.append((start, part, self._begin(part, ends_at, space)))
                start, part, load = begun.popleft()
                with load.finish() as loaded:
                    whole = copy(start, part, loaded, space)
                progress.chunks += whole
                if whole < len(part):
                    break
        finally:
            for _, _, load in begun:
                load.abandon()

    def _begin(self, part: Sequence[Digest], ends_at: float, space: Space) -> BegunLoad:
        left = max(ends_at - time.monotonic(), self._timeout_seconds)
        return space.begin_load(
            part, heads=self.heads, recompute_us=self._recompute_us, patience_seconds=left
        )

    def _copy(
        self, digests: Sequence[Digest], loaded: LoadedChunks, targets: Sequence[Runs], space: Space
    ) -> int:
        """Copy what was *loaded*; return how many leading chunks are whole and right."""
        whole = 0
        for chunk, target in zip(loaded.chunks, targets, strict=False):
            try:
                loaded.copy_one(chunk, target)
            except (ChecksumError, ContainerError) as error:
                trusted = whole if loaded.is_trusted else 0
                self.drop_damaged(digests[whole], loaded, space, error)
                return trusted
            whole += 1
        return whole if loaded.is_trusted else 0

    def drop_damaged(
        self, digest: Digest, loaded: LoadedChunks, space: Space, error: KVStoreError
    ) -> None:
        """Let go of what was *loaded* and delete *digest*, whose bytes are not what was stored."""
        log.error("stored bytes are wrong, recomputing", extra={"reason": str(error)})
        self.damaged_chunks += 1
        loaded.release()
        self._delete_damaged([digest], space)

    def _store(
        self,
        start: int,
        digests: Sequence[Digest],
        parent: Digest | None,
        put: PutBatch,
        space: Space,
    ) -> StoreReport:
        if self._damaged:
            self._delete_damaged((), space)
        return put(start, digests, parent, space)

    def _delete_damaged(self, digests: Sequence[Digest], space: Space) -> None:
        """Delete *digests*, so that whoever computes them next can store them anew.

        What others are reading is deleted before the next store: with it they come back.
        """
        damaged = [*self._damaged, *digests][-_DAMAGED_MAX:]
        self._damaged = [digest for digest in damaged if space.delete([digest], damaged=True).busy]

    def ask(self, question: Callable[[Space], Answer], miss: Answer) -> Answer:
        """Put *question* to the daemon; return *miss* when it is away, or cannot answer."""
        link = self._breaker.link
        if link is None:
            return miss
        try:
            return question(link.space)
        except KVStoreError as error:
            if isinstance(error, UnavailableError) or not link.client.is_open:
                self._breaker.trip(link, error)
            else:
                log.warning("counted as a miss", extra={"reason": str(error)})
            return miss

    def _connect(self) -> _Link:
        client = Client.connect(
            self._path,
            name=self._name,
            tenant=self._tenant,
            timeout_seconds=_CONNECT_TIMEOUT_SECONDS,
        )
        try:
            space = client.attach(self.manifest)
        except KVStoreError:
            client.close()
            raise
        return _Link(client, space.with_timeout(self._timeout_seconds))


def _batches(digests: Sequence[Digest], most: int) -> Iterator[tuple[int, Sequence[Digest]]]:
    """Yield at most *most* digests at a time, with the position of the first."""
    for start in range(0, len(digests), most):
        yield start, digests[start : start + most]


class _Progress:
    """How far a load has come, also when it ends with an error."""

    chunks = 0


def _prefetch(digests: Sequence[Digest], space: Space) -> int:
    return space.prefetch(digests)


def _hint(digests: Sequence[Digest], kind: HintKind, seconds: int, host: str, space: Space) -> int:
    return space.hint(digests, kind, seconds=seconds, host=host)

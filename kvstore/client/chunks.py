"""Chunks as engines see them: views into the arena, filled and read in place, with checksums.

Shared by the synchronous and the asynchronous client. Nothing here talks to the daemon.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Final, Self

from kvstore.client.coding import Coding, Scratch, coding_for, sections_at, sections_in
from kvstore.client.tracing import current_traceparent
from kvstore.compression.chunks import chunk_header, decode
from kvstore.errors import ChecksumError, LeaseError, RequestError, ReservationError
from kvstore.hashing import Digests64, root_of, table_offset
from kvstore.limits import KEYS_PER_REQUEST_MAX
from kvstore.transfer.copies import Runs, copy, digest_blocks, gather, scatter
from kvstore.types import Digest, HeadRange, ReserveOutcome, Root

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvstore.compression.shapes import Bytes, Values
    from kvstore.gpu.pools import Pool
    from kvstore.protocol import messages as m
    from kvstore.protocol.manifest import Manifest
    from kvstore.transfer.arena import ArenaMapping

_ROOT_OFF: Final = Root(0)
_scratch: Final = Scratch()


class AttachedSpace:
    """What a client knows of a namespace that it has entered."""

    def __init__(
        self,
        manifest: Manifest,
        attached: m.Attached,
        arena: ArenaMapping,
        pool: Pool | None = None,
    ) -> None:
        self.manifest = manifest
        self.number = attached.space
        self.arena = arena
        self.pool = pool
        """Device memory behind the arena, where this engine has mapped it."""
        self.checksums = attached.checksums
        self.verify_loads = attached.verify_loads
        self.lease_ttl_seconds = attached.lease_ttl_ms / 1000
        self.through = attached.through
        self._traced = attached.traced
        self._codings: dict[HeadRange, Coding | None] = {}

    def traceparent(self) -> str:
        """Return the trace that a request made now belongs to, if the daemon records any."""
        return current_traceparent() if self._traced else ""

    def bytes_at(self, offset: int, size_bytes: int) -> memoryview:
        """Return what lies at *offset* of the arena, as it is mapped.

        Raises `RequestError` for what lies in device memory: the host does not read that.
        """
        if self.is_pooled(offset):
            raise RequestError(f"{size_bytes} bytes at {offset} lie in device memory")
        return self.arena.view[offset : offset + size_bytes]

    def is_pooled(self, offset: int) -> bool:
        """Return whether *offset* is one in device memory."""
        return offset >= self.arena.size_bytes

    def coding(self, heads: HeadRange) -> Coding | None:
        """Return how *heads* are encoded by default; None where they are stored as they are."""
        if heads not in self._codings:
            self._codings[heads] = coding_for(self.manifest, heads)
        return self._codings[heads]


class Vacancy:
    """Room for one shard of one chunk. Fill it, then commit it through its reservation."""

    __slots__ = ("_space", "digest", "offset", "outcome", "reservation", "root", "size_bytes")

    def __init__(self, space: AttachedSpace, digest: Digest, slot: m.Slot, size_bytes: int) -> None:
        self._space = space
        self.digest = digest
        self.outcome = ReserveOutcome(slot.outcome)
        self.reservation = slot.reservation
        self.offset = slot.offset
        self.size_bytes = size_bytes
        self.root: Root | None = None

    @property
    def is_reserved(self) -> bool:
        """Whether there is room to fill; else the chunk is present, arriving or does not fit."""
        return self.outcome is ReserveOutcome.RESERVED

    @property
    def is_pooled(self) -> bool:
        """Whether that room is device memory."""
        return self._space.is_pooled(self.offset)

    @property
    def view(self) -> memoryview:
        """The room itself, writable. After writing to it directly, call `seal`."""
        self._check_reserved()
        return self._space.bytes_at(self.offset, self.size_bytes)

    def fill(self, source: Runs) -> None:
        """Copy *source* in and seal it, in one pass over memory."""
        self.seal_with(gather(self.view, source, checksums=self._space.checksums))

    def seal(self) -> None:
        """Take the checksum of what was written to `view`."""
        self.seal_with(digest_blocks(self.view) if self._space.checksums else None)

    def seal_with(self, blocks: Digests64 | None) -> None:
        """Take *blocks* for the digests of what was written; None where there are no checksums."""
        if blocks is None:
            self.root = _ROOT_OFF
            return
        if not self.is_pooled:
            table = blocks.astype("<u8", copy=False).tobytes()
            start = self.offset + table_offset(self.size_bytes)
            self._space.arena.view[start : start + len(table)] = table
        self.root = root_of(blocks)

    def _check_reserved(self) -> None:
        if not self.is_reserved:
            raise ReservationError(
                f"no room was reserved: the chunk is {self.outcome.name.lower()}"
            )


class StoredShard:
    """One shard of a loaded chunk, readable in place for as long as its lease lasts."""

    __slots__ = ("_copy", "_shard", "_space", "heads")

    def __init__(self, space: AttachedSpace, shard: m.Shard) -> None:
        self._space = space
        self._shard = shard
        self._copy: Bytes | None = None
        self.heads = HeadRange(shard.head_start, shard.head_stop)

    @property
    def offset(self) -> int:
        """Where it begins in the arena."""
        return self._shard.offset

    @property
    def is_pooled(self) -> bool:
        """Whether it lies in device memory."""
        return self._space.is_pooled(self._shard.offset)

    @property
    def size_bytes(self) -> int:
        """How many bytes were stored."""
        return self._shard.size_bytes

    @property
    def view(self) -> memoryview:
        """The bytes of the shard, read-only and not yet verified."""
        return self._bytes.toreadonly()

    def verify(self) -> None:
        """Raise `ChecksumError` unless all bytes match the checksum tree."""
        if self._space.checksums:
            self.check(digest_blocks(self._bytes))

    @property
    def is_plain(self) -> bool:
        """Whether it is the values as the engine had them; else it is a container of them.

        Slower tiers may hold smaller forms than what was stored, so its size says so.
        """
        manifest = self._space.manifest
        return manifest.codec == "raw" and self.size_bytes == manifest.plain_bytes(self.heads)

    def copy_to(self, target: Runs, *, verify: bool) -> None:
        """Copy the whole shard to *target*, verifying the same bytes in the same pass.

        Raises `ChecksumError` when they are not what was committed; *target* then holds
        rubbish.
        """
        verify = verify and self._space.checksums
        found = scatter(target, self._bytes, checksums=verify)
        if found is not None:
            self.check(found)

    def take(self, room: Bytes, *, verify: bool) -> None:
        """Copy what was stored to *room*, where nobody else can change it, and verify that."""
        found = copy(room, self._bytes, checksums=verify and self._space.checksums)
        if found is not None:
            self.check(found)

    def read_from(self, copy: Bytes) -> None:
        """Take *copy*, in host memory, for what was stored: for shards that lie on a device."""
        self._copy = copy

    @property
    def _bytes(self) -> memoryview:
        if self._copy is not None:
            return self._copy.data
        # Writable, as it is mapped: the address of a read-only view is dear to find.
        return self._space.bytes_at(self._shard.offset, self._shard.size_bytes)

    def check(self, found: Digests64) -> None:
        """Raise `ChecksumError` unless *found* are the block digests of what was committed."""
        if root_of(found) != self._shard.root:
            raise ChecksumError(f"shard at {self._shard.offset} is not what was committed")


class StoredChunk:
    """A chunk that is loaded: its shards, which together hold the heads asked for."""

    __slots__ = ("digest", "heads", "shards")

    def __init__(self, digest: Digest, heads: HeadRange, shards: Sequence[StoredShard]) -> None:
        self.digest = digest
        self.heads = heads
        self.shards = shards


class LoadedChunks:
    """Leased chunks. Leave the `with` block, or call `release`, to let go of them."""

    def __init__(
        self,
        space: AttachedSpace,
        digests: Sequence[Digest],
        heads: HeadRange,
        loaded: m.Loaded,
        *,
        asked_at: float,
        let_go: Callable[[int], None],
        is_open: Callable[[], bool],
    ) -> None:
        self.space = space
        self.chunks = [
            StoredChunk(digest, heads, [StoredShard(space, shard) for shard in shards])
            for digest, shards in zip(digests, loaded.chunks, strict=False)
        ]
        self._lease = loaded.lease
        # Counted from before the request was sent, so it ends here no later than there.
        self._ends_at = asked_at + space.lease_ttl_seconds
        self._let_go = let_go
        self._is_open = is_open

    def __len__(self) -> int:
        """Return the number of chunks."""
        return len(self.chunks)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    @property
    def is_valid(self) -> bool:
        """Whether the lease still stands; bytes read before now are then the right ones."""
        return self._is_open() and time.monotonic() < self._ends_at

    @property
    def is_trusted(self) -> bool:
        """Whether what `copy_one` has delivered is right.

        Bytes that were verified are right whatever happened since; others are so only if
        their lease has lasted until now.
        """
        return (self.space.verify_loads and self.space.checksums) or self.is_valid

    def copy_one(self, chunk: StoredChunk, target: Runs) -> None:
        """Copy *chunk* to *target*, heads in order, decoded; see `copy_chunk`.

        Ask `is_trusted` behind the last copy.
        """
        copy_chunk(self.space, chunk, target, verify=self.space.verify_loads)

    def copy_to(self, targets: Sequence[Runs]) -> None:
        """Copy chunk i to `targets[i]`.

        Raises `ChecksumError` when bytes are not what was committed, `ContainerError` when they
        cannot be decoded, and, where the daemon does not ask for verification, `LeaseError` when
        the lease ended meanwhile. Targets then hold rubbish.
        """
        for chunk, target in zip(self.chunks, targets, strict=True):
            self.copy_one(chunk, target)
        if not self.is_trusted:
            raise LeaseError("the lease ended while its chunks were being copied")

    def hold(self) -> Callable[[], None]:
        """Keep the chunks beyond `release`, until what is returned is called."""
        lease, self._lease = self._lease, 0
        return partial(self._let_go, lease) if lease else lambda: None

    def release(self) -> None:
        """Let go of the chunks. Idempotent, and silent when the session is gone."""
        if self._lease:
            lease, self._lease = self._lease, 0
            self._let_go(lease)


def copy_chunk(space: AttachedSpace, chunk: StoredChunk, target: Runs, *, verify: bool) -> None:
    """Copy the heads of *chunk* to *target*, decoded by what was stored.

    Raises `ChecksumError`, or `ContainerError` for what cannot have been encoded.
    """
    shards = chunk.shards
    if len(shards) == 1 and shards[0].heads == chunk.heads and shards[0].is_plain:
        shards[0].copy_to(target, verify=verify)
        return
    header = chunk_header(space.manifest, chunk.heads)
    sections, plain = sections_at(target, header) if target.is_writable else None, None
    if sections is None:
        plain = _scratch.room("plain", header.raw_bytes)
        sections = sections_in(plain, header)
    for shard in shards:
        _put_heads(space.manifest, shard, chunk.heads, sections, verify=verify)
    if plain is not None:
        scatter(target, plain, checksums=False)


def _put_heads(
    manifest: Manifest,
    shard: StoredShard,
    wanted: HeadRange,
    sections: Sequence[Values],
    *,
    verify: bool,
) -> None:
    """Put what *shard* has of the heads *wanted* where they belong in *sections*."""
    stored = _scratch.room("stored", shard.size_bytes)
    shard.take(stored, verify=verify)
    mine = HeadRange(max(shard.heads.start, wanted.start), min(shard.heads.stop, wanted.stop))
    places = [part[mine.start - wanted.start : mine.stop - wanted.start] for part in sections]
    if not shard.is_plain:
        decode(manifest, stored.data, places, mine)
        return
    header = chunk_header(manifest, shard.heads)
    for place, values in zip(places, sections_in(stored, header), strict=True):
        place[...] = values[mine.start - shard.heads.start : mine.stop - shard.heads.start]


def check_digests(digests: Sequence[Digest]) -> list[bytes]:
    """Return *digests* as a request takes them; raises `RequestError` on none or too many."""
    if not 1 <= len(digests) <= KEYS_PER_REQUEST_MAX:
        raise RequestError(
            f"{len(digests)} digests in one request, must be 1 to {KEYS_PER_REQUEST_MAX}"
        )
    return list(digests)


def check_sources(digests: Sequence[Digest], sources: Sequence[Runs]) -> None:
    """Raise `RequestError` unless there is one source for each digest."""
    if len(digests) != len(sources):
        raise RequestError(f"{len(sources)} sources for {len(digests)} digests")

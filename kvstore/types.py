"""The domain's names as types. Nothing here does any work."""

from __future__ import annotations

from enum import IntEnum, unique
from typing import Final, NamedTuple, NewType

Digest = NewType("Digest", bytes)
"""32 bytes of SHA-256 that stand for a whole token prefix up to the end of one chunk."""

NamespaceId = NewType("NamespaceId", bytes)
"""16 bytes of SHA-256 over a canonical manifest: what must match for KV to be reusable."""

NO_SLOT: Final = -1
"""Stands for no chunk wherever the number of a slot is expected."""

SessionId = NewType("SessionId", int)
LeaseId = NewType("LeaseId", int)
ReservationId = NewType("ReservationId", int)

BytesLike = bytes | bytearray | memoryview

Root = NewType("Root", int)
"""XXH3-64 over the block digests of a chunk: the head of its checksum tree."""


Place = NewType("Place", int)
"""Where a slower tier keeps a shard, in that tier's own terms; it fits 64 bits."""


class HeadRange(NamedTuple):
    """A run of KV heads `[start, stop)`: which shard of a chunk is meant."""

    start: int
    stop: int

    @property
    def width(self) -> int:
        """Number of heads."""
        return self.stop - self.start


class Extent(NamedTuple):
    """A run of bytes in the arena. *size_bytes* counts what was asked for, not the padding."""

    offset: int
    size_bytes: int


@unique
class TierKind(IntEnum):
    """The tiers, fastest first. The value is the bit that marks residence."""

    DEVICE = 1
    HOST = 2
    DISK = 4
    REDIS = 8
    PEER = 16


@unique
class HintKind(IntEnum):
    """What an engine expects of a conversation."""

    RETURNS_IN = 0
    GOES_TO = 1
    FINISHED = 2


@unique
class ReserveOutcome(IntEnum):
    """What became of one key of a reserve request."""

    RESERVED = 0
    PRESENT = 1
    ARRIVING = 2
    NO_SPACE = 3


@unique
class HandoffState(IntEnum):
    """How far a hand-off has come; what leads from one to another is in transfer/handoff.py."""

    ABSENT = 0
    OPEN = 1
    CLOSED = 2
    BROKEN = 3
    TAKEN = 4
    EXPIRED = 5

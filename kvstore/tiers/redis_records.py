"""What the Redis tier stores, byte by byte. docs/redis.md describes it for other programs.

Every value begins with a *label* of 128 bytes that says whose bytes follow, so that a reply
proves by itself which request it answers. Keys of one chunk share a hash tag and so a node.
"""

from __future__ import annotations

import re
import struct
from enum import Enum, auto
from typing import Final, NamedTuple

import xxhash

from kvstore.limits import (
    CHUNK_SIZE_MAX_BYTES,
    DIGEST_SIZE_BYTES,
    KV_HEADS_MAX,
    REDIS_STRIPE_BYTES,
)
from kvstore.tiers.base import Shard, ShardKey
from kvstore.types import Digest, HeadRange, NamespaceId, Root

FORMAT_VERSION: Final = 1
LABEL_BYTES: Final = 128

# Magic, version, zero; namespace, digest, heads; size, root, stripe size, stripe, parent; check.
_PREFIX: Final = struct.Struct("<4sHH")
_FIELDS: Final = struct.Struct("<4sHH16s32sIIQQII32s")
_CHECK: Final = struct.Struct("<Q")
_MAGIC: Final = b"KVST"
_NO_STRIPE: Final = 2**32 - 1
_NO_PARENT: Final = bytes(DIGEST_SIZE_BYTES)
_HEADS: Final = re.compile(rb"(0|[1-9][0-9]{0,3})-([1-9][0-9]{0,3})")

assert _FIELDS.size + _CHECK.size == LABEL_BYTES


class Unreadable(Enum):
    """Why bytes are no label that this version understands."""

    DAMAGED = auto()
    NEWER = auto()


class Label(NamedTuple):
    """Which bytes follow: stripe number *stripe* of *shard*, or none in a meta record (None)."""

    shard: Shard
    stripe: int | None


def pack_label(shard: Shard, index: int | None) -> bytes:
    """Return the label of stripe *index*, or the meta record of *shard*.

    Stripes name no parent: their bytes are the same below any.
    """
    parent = shard.parent if index is None and shard.parent is not None else _NO_PARENT
    fields = _FIELDS.pack(
        _MAGIC,
        FORMAT_VERSION,
        0,
        shard.key.namespace,
        shard.key.digest,
        *shard.key.heads,
        shard.size_bytes,
        shard.root,
        REDIS_STRIPE_BYTES,
        _NO_STRIPE if index is None else index,
        parent,
    )
    return fields + _CHECK.pack(xxhash.xxh3_64_intdigest(fields))


def read_label(value: bytes) -> Label | Unreadable:
    """Return what the first bytes of *value* say."""
    if len(value) < _PREFIX.size or not value.startswith(_MAGIC):
        return Unreadable.DAMAGED
    if _PREFIX.unpack_from(value)[1] > FORMAT_VERSION:
        return Unreadable.NEWER
    if len(value) < LABEL_BYTES:
        return Unreadable.DAMAGED
    fields, (check,) = value[: _FIELDS.size], _CHECK.unpack_from(value, _FIELDS.size)
    if xxhash.xxh3_64_intdigest(fields) != check:
        return Unreadable.DAMAGED
    _, _, _, namespace, digest, start, stop, size, root, stripe, index, parent = _FIELDS.unpack(
        fields
    )
    if stripe != REDIS_STRIPE_BYTES:
        return Unreadable.NEWER
    if not (start < stop <= KV_HEADS_MAX and 0 < size <= CHUNK_SIZE_MAX_BYTES):
        return Unreadable.DAMAGED
    key = ShardKey(NamespaceId(namespace), Digest(digest), HeadRange(start, stop))
    above = None if parent == _NO_PARENT else Digest(parent)
    return Label(
        Shard(key, above, size, Root(root)),
        None if index == _NO_STRIPE else index,
    )


class Stripe(NamedTuple):
    """One value: bytes *start* to *stop* of a shard, behind their label, under *name*."""

    name: bytes
    label: bytes
    start: int
    stop: int

    @property
    def value_bytes(self) -> int:
        """Length of the whole value."""
        return LABEL_BYTES + self.stop - self.start


class Names(NamedTuple):
    """The names of keys below one *prefix*."""

    prefix: str

    def manifest(self, namespace: NamespaceId) -> bytes:
        """Name the canonical manifest of *namespace*, a string."""
        return f"{self.prefix}:{namespace.hex()}:manifest".encode()

    def meta(self, namespace: NamespaceId, digest: Digest) -> bytes:
        """Name what is kept of one chunk: a hash with a field for each head range."""
        return f"{self.prefix}:{namespace.hex()}:{{{digest.hex()}}}".encode()

    def stripes(self, shard: Shard) -> list[Stripe]:
        """Return all stripes of *shard*, strings.

        The root stands in the name: two writers whose bytes differ never mix them.
        """
        key = shard.key
        meta, field = self.meta(key.namespace, key.digest), field_of(key.heads)
        starts = range(0, shard.size_bytes, REDIS_STRIPE_BYTES)
        return [
            Stripe(
                b"%b:%b:%016x:%d" % (meta, field, shard.root, index),
                pack_label(shard, index),
                start,
                min(start + REDIS_STRIPE_BYTES, shard.size_bytes),
            )
            for index, start in enumerate(starts)
        ]


def field_of(heads: HeadRange) -> bytes:
    """Return the field of a chunk's hash that stands for *heads*."""
    return b"%d-%d" % heads


def heads_of(field: bytes) -> HeadRange | None:
    """Return the heads that *field* stands for, or None for a field that is not ours."""
    match = _HEADS.fullmatch(field)
    return None if match is None else HeadRange(int(match[1]), int(match[2]))

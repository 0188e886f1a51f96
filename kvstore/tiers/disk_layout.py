"""How chunks and their records lie on disk, format 1. Bytes and numbers only, little-endian.

    extent   header (fixed part, block digests; whole pages), payload (padded to whole pages)
    record   128 bytes in the index: which shard lies in which extent

docs/disk-format.md is this file in words; golden bytes in the tests hold both to format 1.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from kvstore.hashing import Digests64, block_count, root_of
from kvstore.limits import (
    CHECKSUM_BLOCK_BYTES,
    CHECKSUM_SIZE_BYTES,
    CHUNK_SIZE_MAX_BYTES,
    DIGEST_SIZE_BYTES,
    EXTENT_ALIGNMENT_BYTES,
)
from kvstore.tiers.base import RecoveredRun, Shard, ShardKey
from kvstore.types import BytesLike, Digest, HeadRange, NamespaceId

FORMAT: Final = 1

RECORD: Final = np.dtype(
    [
        ("sequence", "<u8"),
        ("page", "<u4"),
        ("size_bytes", "<u4"),
        ("root", "<u8"),
        ("fingerprint", "<u8"),
        ("head_start", "<u2"),
        ("head_stop", "<u2"),
        ("flags", "<u4"),
        ("namespace", "V16"),
        ("digest", "V32"),
        ("parent", "V32"),
        ("checksum", "<u8"),
    ]
)
RECORD_BYTES: Final = RECORD.itemsize
VACANT: Final = bytes(RECORD_BYTES)
"""A record of nothing: its sequence is 0."""

Rows = npt.NDArray[np.void]
"""Records in an array of dtype `RECORD`."""

_BODY: Final = struct.Struct("<QIIQQHHI16s32s32s")
_BODY_BYTES: Final = RECORD_BYTES - CHECKSUM_SIZE_BYTES
_RECORD: Final = struct.Struct(_BODY.format + "Q")
assert _BODY.size == _BODY_BYTES, "struct and dtype are one layout"
assert _RECORD.size == RECORD_BYTES, "a checksum comes behind the body"

_CHECKED_AT_ONCE: Final = 16_384
_HAS_PARENT: Final = 1
_NO_PARENT: Final = bytes(DIGEST_SIZE_BYTES)

_MAGIC: Final = b"kvstchk\n"
# Magic, format, length of the header, shard as in a record, block size and count, a reserve.
_HEADER: Final = struct.Struct("<8sII16s32s32sIHHQQII120x")
_CHECKSUM: Final = struct.Struct("<Q")
_FIXED_BYTES: Final = _HEADER.size + _CHECKSUM.size
assert _FIXED_BYTES == 256, "the block digests start at byte 256"

_PAGE: Final = EXTENT_ALIGNMENT_BYTES


def _pages(size_bytes: int) -> int:
    return -(-size_bytes // _PAGE)


def header_size(size_bytes: int) -> int:
    """Return how many bytes, in whole pages, the header of a chunk of *size_bytes* takes."""
    return _pages(_FIXED_BYTES + block_count(size_bytes) * CHECKSUM_SIZE_BYTES) * _PAGE


HEADER_MAX_BYTES: Final = header_size(CHUNK_SIZE_MAX_BYTES)


def footprint(size_bytes: int) -> int:
    """Return how many bytes the extent of a chunk of *size_bytes* takes, header included."""
    return header_size(size_bytes) + padded(size_bytes)


def padded(size_bytes: int) -> int:
    """Return *size_bytes* rounded up to whole pages."""
    return _pages(size_bytes) * _PAGE


def footprints(sizes: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Return `footprint` of every size."""
    signed = sizes.astype(np.int64)
    tables = -(-signed // CHECKSUM_BLOCK_BYTES) * CHECKSUM_SIZE_BYTES
    headers = -(-(tables + _FIXED_BYTES) // _PAGE)
    return (headers - (-signed // _PAGE)) * _PAGE


# --- headers -----------------------------------------------------------------------------


def pack_header(shard: Shard, digests: Digests64) -> bytes:
    """Return the header of *shard*, whose blocks have *digests*."""
    key = shard.key
    length = header_size(shard.size_bytes)
    fixed = _HEADER.pack(
        _MAGIC,
        FORMAT,
        length,
        key.namespace,
        key.digest,
        shard.parent or _NO_PARENT,
        _flags(shard),
        key.heads.start,
        key.heads.stop,
        shard.size_bytes,
        shard.root,
        CHECKSUM_BLOCK_BYTES,
        len(digests),
    )
    table = digests.astype("<u8", copy=False).tobytes()
    header = fixed + _CHECKSUM.pack(xxh3_64_intdigest(fixed + table)) + table
    return header.ljust(length, b"\0")


def header_holds(header: bytes, shard: Shard, digests: Digests64) -> bool:
    """Return whether *header* is that of *shard*, and *digests* are those of its blocks.

    True means that payload, header and *shard* agree in every bit but the parent, by which no
    shard is told apart.
    """
    if root_of(digests) != shard.root or len(header) != header_size(shard.size_bytes):
        return False
    parent = Digest(header[64 : 64 + DIGEST_SIZE_BYTES])
    has_parent = int.from_bytes(header[96:100], "little") & _HAS_PARENT
    return header == pack_header(shard._replace(parent=parent if has_parent else None), digests)


# --- records -----------------------------------------------------------------------------


def fingerprint_of(key: ShardKey, seed: int) -> int:
    """Return 64 bits that stand for *key* in this directory alone."""
    packed = b"%b%b%d:%d" % (key.namespace, key.digest, key.heads.start, key.heads.stop)
    return xxh3_64_intdigest(packed, seed)


def pack_record(shard: Shard, *, sequence: int, page: int, fingerprint: int) -> bytes:
    """Return the record that says that the extent at *page* holds *shard*."""
    key = shard.key
    body = _BODY.pack(
        sequence,
        page,
        shard.size_bytes,
        shard.root,
        fingerprint,
        key.heads.start,
        key.heads.stop,
        _flags(shard),
        key.namespace,
        key.digest,
        shard.parent or _NO_PARENT,
    )
    return body + _CHECKSUM.pack(xxh3_64_intdigest(body))


def unpack_shard(record: BytesLike) -> Shard:
    """Return the shard that a whole *record* is of."""
    found = _RECORD.unpack(record)
    _, _, size_bytes, root, _, start, stop, flags, namespace, digest, parent, _ = found
    before = parent if flags & _HAS_PARENT else None
    return Shard(ShardKey(namespace, digest, HeadRange(start, stop)), before, size_bytes, root)


def unpack_runs(rows: Rows, places: npt.NDArray[np.uint64]) -> Iterator[RecoveredRun]:
    """Yield the shards that *rows*, all of them whole, are of, and their *places*.

    One run for each namespace and range of heads; in each, the order is that of *rows*.
    """
    while len(rows):
        first = rows[0]
        alike: npt.NDArray[np.bool_] = rows["namespace"] == first["namespace"]
        alike &= rows["head_start"] == first["head_start"]
        alike &= rows["head_stop"] == first["head_stop"]
        run = rows[alike]
        parents = run["parent"].tolist()
        for number in np.flatnonzero((run["flags"] & _HAS_PARENT) == 0).tolist():
            parents[number] = None
        yield RecoveredRun(
            NamespaceId(bytes(first["namespace"])),
            HeadRange(int(first["head_start"]), int(first["head_stop"])),
            run["digest"].tolist(),
            parents,
            run["size_bytes"],
            run["root"],
            places[alike],
        )
        rows, places = rows[~alike], places[~alike]


def whole_records(rows: Rows) -> npt.NDArray[np.bool_]:
    """Return which of *rows* are records, and not vacant, torn or damaged."""
    whole = np.zeros(len(rows), np.bool_)
    # A part at a time: millions of numbers as Python has them would not be given back.
    for first in range(0, len(rows), _CHECKED_AT_ONCE):
        part = np.ascontiguousarray(rows[first : first + _CHECKED_AT_ONCE])
        view, checksums = part.view(np.uint8).data, part["checksum"].tolist()
        for number in np.flatnonzero(part["sequence"]).tolist():
            start = number * RECORD_BYTES
            body = view[start : start + _BODY_BYTES]
            whole[first + number] = xxh3_64_intdigest(body) == checksums[number]
    return whole


def _flags(shard: Shard) -> int:
    return 0 if shard.parent is None else _HAS_PARENT

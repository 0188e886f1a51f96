"""How records lie in memory: header, manifests, table. Bytes and numbers only, little-endian.

    header      magic, format, geometry, which arena and boot this belongs to; one page
    namespaces  two banks of a log, of which one is in use; a full one is rewritten to the other
    table       one record of 160 bytes for every 64 KiB of the arena

The golden bytes in the tests hold every part to format 1.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

import numpy as np
from xxhash import xxh3_64_intdigest

from kvstore.limits import (
    EXTENT_ALIGNMENT_BYTES,
    MANIFEST_SIZE_MAX_BYTES,
    RECORD_BANK_SIZE_BYTES,
    RECORD_SPAN_BYTES,
    RECORDS_MAX,
    RECORDS_MIN,
)
from kvstore.tiers.base import Shard
from kvstore.types import Extent, NamespaceId

FORMAT: Final = 1
"""Another format is never read: the host tier starts cold."""

WORD_BYTES: Final = 8

VACANT: Final = 0
FILLING: Final = 1
READY: Final = 2

HAS_PARENT: Final = 1
"""The one flag: `parent` is a digest, not merely empty."""

RECORD: Final = np.dtype(
    [
        ("checksum", "<u8"),
        ("state", "<u4"),
        ("flags", "<u4"),
        ("head_start", "<u2"),
        ("head_stop", "<u2"),
        ("size_bytes", "<u4"),
        ("sequence", "<u8"),
        ("offset", "<u8"),
        ("root", "<u8"),
        ("pid", "<u4"),
        ("unused", "<u4"),
        ("started", "<u8"),
        ("pid_space", "<u8"),
        ("tenant", "<u8"),
        ("namespace", "V16"),
        ("digest", "V32"),
        ("parent", "V32"),
    ]
)
RECORD_WORDS: Final = RECORD.itemsize // WORD_BYTES
OFFSET_WORD: Final = 4
_BODY: Final = struct.Struct("<IIHHIQQQIIQQQ16s32s32s")
assert _BODY.size + WORD_BYTES == RECORD.itemsize, "struct and dtype are one layout"

# Magic and format come first in every format that there will be.
_HEADER: Final = struct.Struct("<8sIIQQQQQ16s")
_MAGIC: Final = b"kvstrec\n"
HEADER_BYTES: Final = EXTENT_ALIGNMENT_BYTES
_BANK_WORD: Final = HEADER_BYTES // WORD_BYTES - 1

_ENTRY: Final = struct.Struct("<QI4x16s")
_INTRODUCTION_MAX_BYTES: Final = 2 * MANIFEST_SIZE_MAX_BYTES


class Owner(NamedTuple):
    """A process that may write to an extent: its pid and start, as seen in one pid namespace.

    A pid of 0 is one that cannot be seen from here.
    """

    pid: int = 0
    started: int = 0
    pid_space: int = 0


class Identity(NamedTuple):
    """Which arena records belong to; for any other, or after a boot, they are void."""

    capacity_bytes: int
    device: int
    inode: int
    boot: bytes


class Geometry(NamedTuple):
    """How many records there are, and how much room for namespaces."""

    entries: int
    bank_bytes: int

    @property
    def table_offset(self) -> int:
        """Where the first record is."""
        return HEADER_BYTES + 2 * self.bank_bytes

    @property
    def size_bytes(self) -> int:
        """How much room all of it takes."""
        return self.table_offset + self.entries * RECORD.itemsize


def geometry_for(capacity_bytes: int) -> Geometry:
    """Return the geometry of new records for an arena of *capacity_bytes*."""
    entries = min(max(capacity_bytes // RECORD_SPAN_BYTES, RECORDS_MIN), RECORDS_MAX)
    return Geometry(entries, RECORD_BANK_SIZE_BYTES)


# --- the header --------------------------------------------------------------------------


def write_header(view: memoryview, geometry: Geometry, identity: Identity) -> None:
    """Make all-zero memory an empty table of records; it is none until the last store."""
    head = _HEADER.pack(
        _MAGIC,
        FORMAT,
        RECORD.itemsize,
        identity.capacity_bytes,
        *geometry,
        identity.device,
        identity.inode,
        identity.boot,
    )
    view[WORD_BYTES : len(head)] = head[WORD_BYTES:]
    view[len(head) : len(head) + WORD_BYTES] = _checksum(head).to_bytes(WORD_BYTES, "little")
    view[:WORD_BYTES] = head[:WORD_BYTES]


def read_header(view: memoryview, identity: Identity) -> Geometry | str:
    """Return the geometry of the records in *view*, or why they are void for *identity*."""
    if len(view) < HEADER_BYTES or bytes(view[: len(_MAGIC)]) != _MAGIC:
        return "there are no records of it"
    head = bytes(view[: _HEADER.size])
    _, version, record_bytes, capacity, entries, bank_bytes, device, inode, boot = _HEADER.unpack(
        head
    )
    if version != FORMAT:
        return f"its records have format {version}, this version reads format {FORMAT}"
    checksum = int.from_bytes(view[_HEADER.size : _HEADER.size + WORD_BYTES], "little")
    geometry = Geometry(entries, bank_bytes)
    is_whole = checksum == _checksum(head) and geometry.size_bytes <= len(view)
    if not is_whole or record_bytes != RECORD.itemsize:
        return "the header of its records is damaged"
    if capacity != identity.capacity_bytes:
        return f"it has {capacity} bytes, tiers.host.capacity is {identity.capacity_bytes}"
    if boot != identity.boot:
        return "the machine has been started again since"
    if (device, inode) != (identity.device, identity.inode):
        return "its records are those of another file"
    return geometry


# --- one record ----------------------------------------------------------------------------


def filling_body(extent: Extent, owner: Owner) -> bytes:
    """Return the body of a record that says who may write to *extent*."""
    return _BODY.pack(
        FILLING, 0, 0, 0, extent.size_bytes, 0, extent.offset, 0,
        owner.pid, 0, owner.started, owner.pid_space, 0, b"", b"", b"",
    )  # fmt: skip


def ready_body(extent: Extent, shard: Shard, sequence: int, tenant: int) -> bytes:
    """Return the body of a record that says what *extent* holds."""
    namespace, digest, heads = shard.key
    flags = 0 if shard.parent is None else HAS_PARENT
    return _BODY.pack(
        READY, flags, heads.start, heads.stop, extent.size_bytes, sequence, extent.offset,
        shard.root, 0, 0, 0, 0, tenant, namespace, digest, shard.parent or b"",
    )  # fmt: skip


def checksum_of(body: bytes | memoryview) -> int:
    """Return the checksum of a record's body, never 0: that stands for no record."""
    return _checksum(body) or 1


# --- namespaces ------------------------------------------------------------------------------


class NamespaceLog:
    """What introduces each namespace, appended one after the other to one of two banks.

    What is read ends with the first entry that is not whole.
    """

    def __init__(self, view: memoryview, geometry: Geometry) -> None:
        self._banks = view[HEADER_BYTES : geometry.table_offset]
        self._bank_bytes = geometry.bank_bytes
        self._header = view[:HEADER_BYTES].cast("Q")
        self._end = sum(_entry_size(introduction) for _, introduction in self._read())

    def read(self) -> dict[NamespaceId, bytes]:
        """Return namespace -> introduction of all that are kept."""
        return dict(self._read())

    def append(self, namespace: NamespaceId, introduction: bytes) -> bool:
        """Keep one more; return whether there was room."""
        size = _entry_size(introduction)
        if len(introduction) > _INTRODUCTION_MAX_BYTES or self._end + size > self._bank_bytes:
            return False
        self._put(self._bank(self._header[_BANK_WORD] & 1), self._end, namespace, introduction)
        self._end += size
        return True

    def rewrite(self, kept: Mapping[NamespaceId, bytes]) -> None:
        """Keep only *kept*, which were among those kept before: all of them, or no change."""
        number = ~self._header[_BANK_WORD] & 1
        bank, end = self._bank(number), 0
        bank[:] = bytes(len(bank))
        for namespace, introduction in kept.items():
            self._put(bank, end, namespace, introduction)
            end += _entry_size(introduction)
        self._header[_BANK_WORD] = number
        self._end = end

    def close(self) -> None:
        """Let go of the memory."""
        self._header.release()
        self._banks.release()

    def _bank(self, number: int) -> memoryview:
        return self._banks[number * self._bank_bytes : (number + 1) * self._bank_bytes]

    def _put(self, bank: memoryview, at: int, namespace: NamespaceId, introduction: bytes) -> None:
        start = at + _ENTRY.size
        bank[start : start + len(introduction)] = introduction
        checksum = checksum_of(namespace + introduction)
        bank[at:start] = _ENTRY.pack(checksum, len(introduction), namespace)

    def _read(self) -> Iterator[tuple[NamespaceId, bytes]]:
        bank, at = self._bank(self._header[_BANK_WORD] & 1), 0
        while at + _ENTRY.size <= len(bank):
            checksum, size, namespace = _ENTRY.unpack_from(bank, at)
            start = at + _ENTRY.size
            if size > min(_INTRODUCTION_MAX_BYTES, len(bank) - start):
                return
            introduction = bytes(bank[start : start + size])
            if checksum != checksum_of(namespace + introduction):
                return
            yield NamespaceId(namespace), introduction
            at += _entry_size(introduction)


def _entry_size(introduction: bytes) -> int:
    return _ENTRY.size + -(-len(introduction) // WORD_BYTES) * WORD_BYTES


def _checksum(payload: bytes | memoryview) -> int:
    return xxh3_64_intdigest(payload)

"""Records without files, as one daemon leaves them in memory and the next one finds them."""

from __future__ import annotations

from kvstore.tiers.base import Shard, ShardKey
from kvstore.tiers.record_layout import (
    FILLING,
    HAS_PARENT,
    Geometry,
    Identity,
    Owner,
    write_header,
)
from kvstore.tiers.records import Records
from kvstore.types import Digest, Extent, HeadRange, NamespaceId, Root
from tests.support.making import loose_digest

CAPACITY_BYTES = 64 * 4096
IDENTITY = Identity(CAPACITY_BYTES, 1, 2, b"boot" * 4)
GEOMETRY = Geometry(entries=16, bank_bytes=512)
NAMESPACE = NamespaceId(b"n" * 16)
OWNER = Owner(pid=77, started=12345, pid_space=99)


def make_memory(geometry: Geometry = GEOMETRY) -> memoryview:
    """Return memory with a header and no records."""
    memory = memoryview(bytearray(geometry.size_bytes))
    write_header(memory, geometry, IDENTITY)
    return memory


def open_records(memory: memoryview, geometry: Geometry = GEOMETRY) -> Records:
    """Return the records in *memory* as a daemon has them that knows one namespace."""
    records = Records(memory, CAPACITY_BYTES, geometry)
    assert records.introduce(NAMESPACE, b"introduction")
    return records


def make_shard(number: int, *, namespace: NamespaceId = NAMESPACE, size_bytes: int = 4096) -> Shard:
    """Return a shard that differs in every field from those of other numbers."""
    key = ShardKey(namespace, loose_digest(number), HeadRange(number, number + 2))
    parent = loose_digest(number - 1) if number else None
    return Shard(key, parent, size_bytes, Root(number * 7 + 1))


def page(number: int, size_bytes: int = 4096) -> Extent:
    """Return the extent that starts on page *number*."""
    return Extent(number * 4096, size_bytes)


def kept(records: Records) -> dict[Extent, Shard | Owner]:
    """Return what every record says, by extent."""
    return {Extent(row["offset"], row["size_bytes"]): said_by(row) for row in rows_of(records)}


def said_by(row: dict) -> Shard | Owner:
    """Return what one record says."""
    if row["state"] == FILLING:
        return Owner(row["pid"], row["started"], row["pid_space"])
    key = ShardKey(
        NamespaceId(row["namespace"]),
        Digest(row["digest"]),
        HeadRange(row["head_start"], row["head_stop"]),
    )
    parent = Digest(row["parent"]) if row["flags"] & HAS_PARENT else None
    return Shard(key, parent, row["size_bytes"], Root(row["root"]))


def rows_of(records: Records) -> list[dict]:
    """Return all records that hold, in the order in which they were written."""
    rows = records.scan().rows
    names = rows.dtype.names
    found = [dict(zip(names, row, strict=True)) for row in rows.tolist()]
    return sorted(found, key=lambda row: row["sequence"])

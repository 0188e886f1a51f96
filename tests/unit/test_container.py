"""The container's header and table: read back as written, and refused when anything is wrong."""

from __future__ import annotations

import struct
import zlib
from itertools import pairwise

import numpy as np
import pytest
import xxhash

from kvstore.compression.chunks import ChunkCodec, chunk_header, decode_section
from kvstore.compression.container import (
    ENTRY,
    HEADER,
    HEADER_BYTES,
    WORD_MASK,
    Flags,
    crc32c,
    open_container,
)
from kvstore.compression.policy import CodecPolicy
from kvstore.compression.shapes import CodecId, SourceType
from kvstore.errors import ContainerError
from kvstore.types import HeadRange
from tests.support.codec_chunks import decoded, encode, kv_of, manifest_of

FIELDS = (
    *("magic", "version", "codec", "source", "layout", "layers", "heads", "head_dim", "tail"),
    *("tokens", "first_position", "flags", "first_head", "sinks", "table_id"),
    *("payload_bytes", "digest", "table_check"),
)


def made(codec: str = "int4kv", **settings: object) -> bytearray:
    policy = CodecPolicy(codec=codec, **settings)  # type: ignore[arg-type]
    manifest = manifest_of(layers=3)
    return encode(manifest, policy, kv_of(manifest), first_position=0)[0]


def with_header(stored: bytearray, **changes: object) -> bytearray:
    """Return *stored* with other fields and a header checksum that matches them."""
    fields = dict(zip(FIELDS, HEADER.unpack_from(stored), strict=True))
    packed = HEADER.pack(*(fields | changes).values())
    return bytearray(packed + struct.pack("<I", crc32c(packed)) + stored[HEADER_BYTES:])


def with_entry(stored: bytearray, index: int, **changes: object) -> bytearray:
    """Return *stored* with another entry of its table and checksums that match."""
    names = ("codec", "flags", "group", "error", "offset", "size")
    at = HEADER_BYTES + index * ENTRY.size
    entry = dict(zip(names, ENTRY.unpack_from(stored, at), strict=True)) | changes
    changed = bytearray(stored)
    changed[at : at + ENTRY.size] = ENTRY.pack(*entry.values())
    sections = open_container(stored).header.sections
    table = changed[HEADER_BYTES : HEADER_BYTES + sections * ENTRY.size]
    return with_header(changed, table_check=xxhash.xxh64_intdigest(bytes(table)) & WORD_MASK)


def test_the_checksum_is_castagnolis() -> None:
    # The check value of the catalogue, and two vectors of RFC 3720.
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(b"123456789") != zlib.crc32(b"123456789")


def test_a_header_says_what_was_stored() -> None:
    stored = made("int4kv", edge_layers=1, checksum=True)
    header = open_container(stored).header
    assert header.codec is CodecId.INT4KV
    assert header.source is SourceType.BFLOAT16
    assert (header.layers, header.heads, header.head_dim, header.tokens) == (3, 2, 64, 64)
    assert (header.sinks, header.first_position, header.first_head) == (4, 0, 0)
    assert header.flags == Flags.SINKS | Flags.CHECKSUM
    assert header.raw_bytes == kv_of(manifest_of(layers=3)).nbytes


def test_bytes_are_those_of_the_page() -> None:
    """Read with `struct` alone, from the numbers of docs/codec-format.md."""
    stored = made("int4kv", edge_layers=1)
    assert stored[:8] == b"KVX1\x01\x03\x01\x01"
    assert struct.unpack_from("<4H", stored, 8) == (3, 2, 64, 0)
    assert struct.unpack_from("<3I2H", stored, 16) == (64, 0, 1, 0, 4)
    (payload,) = struct.unpack_from("<Q", stored, 40)
    assert payload == len(stored) - 256
    assert struct.unpack_from("<I", stored, 60)[0] == crc32c(stored[:60])
    entries = [struct.unpack_from("<BBHIQQ", stored, 64 + 24 * index) for index in range(6)]
    assert [entry[:3] for entry in entries] == [
        (2, 0, 256),
        (2, 0, 256),
        (3, 0, 64),
        (3, 0, 64),
        (2, 0, 256),
        (2, 0, 256),
    ]
    assert entries[0][4] == 256
    for entry, after in pairwise(entries):
        assert after[4] == -(-(entry[4] + entry[5]) // 256) * 256
    assert stored[64 + 24 * 6 : 256] == bytes(256 - 64 - 24 * 6)


def test_what_lies_behind_a_container_does_not_matter() -> None:
    stored = made()
    container = open_container(bytes(stored) + b"more")
    assert len(container.octets) == len(stored)


def test_sections_are_decoded_one_by_one() -> None:
    manifest = manifest_of(layers=3)
    values = kv_of(manifest)
    stored = made("int8kv")
    whole = decoded(manifest, stored, values)
    container = open_container(stored)
    for index in (5, 0, 3):
        # Nothing of the others is there yet.
        alone = container.octets.copy()
        for other, section in enumerate(container.sections):
            if other != index:
                alone[section.offset : section.end] = 0
        target = np.zeros_like(values[0, 0])
        decode_section(open_container(alone.data), index, target, HeadRange(0, 2))
        assert np.array_equal(target, whole[index // 2, index % 2])


@pytest.mark.parametrize("size", [0, 3, 63])
def test_less_than_a_header_is_refused(size: int) -> None:
    with pytest.raises(ContainerError, match="at least 64 bytes"):
        open_container(bytes(made()[:size]))


def test_every_bit_of_header_and_table_matters() -> None:
    stored = made()
    for at in range(HEADER_BYTES + 6 * ENTRY.size):
        changed = bytearray(stored)
        changed[at] ^= 1 << (at % 8)
        with pytest.raises(ContainerError):
            open_container(changed)


def test_every_cut_is_noticed() -> None:
    stored = made()
    for size in range(0, len(stored), 97):
        with pytest.raises(ContainerError):
            open_container(stored[:size])


def test_a_payload_with_a_checksum_is_verified() -> None:
    stored = made("int4kv", checksum=True)
    open_container(stored)
    stored[3000] ^= 1
    with pytest.raises(ContainerError, match="payload does not match its checksum"):
        open_container(stored)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"magic": b"KVX2"}, "no container"),
        ({"version": 2}, "version 2 is unknown, 1 is known"),
        ({"codec": 11}, "unknown codec, type or layout"),
        ({"source": 0}, "unknown codec, type or layout"),
        ({"layout": 4}, "unknown codec, type or layout"),
        ({"flags": 64}, "unknown flags 0x40"),
        ({"layers": 0}, "layers is 0"),
        ({"layers": 2000}, "layers is 2000, must lie in"),
        ({"heads": 0}, "heads is 0"),
        ({"heads": 2000}, "heads is 2000"),
        ({"head_dim": 0}, "head size is 0"),
        ({"tokens": 0}, "raw size in bytes is 0"),
        ({"tokens": 1 << 17}, "tokens is 131072"),
        ({"tokens": 60_000, "heads": 1000}, "raw size in bytes is"),
        ({"tail": 64}, "64 of 64 channels are tail"),
        ({"sinks": 65}, "65 of 64 tokens are sinks"),
        ({"layout": 3}, "BFLOAT16 in layout OPAQUE"),
        ({"source": 6}, "OPAQUE in layout KEYS_AND_VALUES"),
        ({"payload_bytes": 1 << 60}, "payload ends at"),
        ({"payload_bytes": 257}, "payload ends at"),
        ({"table_check": 0}, "section table does not match"),
        ({"tokens": 128}, "its geometry has"),
        ({"heads": 4}, "its geometry has"),
        ({"sinks": 0}, "its geometry has"),
    ],
    ids=str,
)
def test_a_header_that_lies_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ContainerError, match=message):
        open_container(with_header(made(), **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codec": 11}, "section 2 has the unknown codec 11"),
        ({"codec": 4}, "section 2 has codec 4"),
        ({"flags": 2}, "flags 2"),
        ({"group": 65}, "group 65"),
        ({"error": float("nan")}, "relative error of nan"),
        ({"error": -1.0}, "relative error of -1"),
        ({"offset": 100}, "claims .* at 100"),
        ({"offset": 0}, "claims .* at 0"),
        ({"offset": 1 << 62}, "claims"),
        ({"size": 1 << 62}, "claims"),
        ({"size": 5}, "has 5 bytes, its geometry has"),
        ({"codec": 9, "group": 0, "size": 30_000}, "more than its cap"),
        ({"offset": 256}, "sections overlap"),
    ],
    ids=str,
)
def test_an_entry_that_lies_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ContainerError, match=message):
        open_container(with_entry(made("int8kv"), 2, **changes))


def test_a_lossy_codec_for_opaque_bytes_is_refused() -> None:
    header = chunk_header(manifest_of(), HeadRange(0, 2))
    assert header.source is SourceType.BFLOAT16
    manifest = manifest_of(dtype="float16")
    stored, _ = encode(manifest, CodecPolicy(codec="rans"), kv_of(manifest))
    assert open_container(stored).header.source is SourceType.FLOAT16
    with pytest.raises(ContainerError, match="exp3 takes bfloat16, not float16"):
        open_container(with_entry(stored, 0, codec=CodecId.EXP3, group=64))


def test_an_unknown_table_is_refused() -> None:
    manifest = manifest_of(layers=3)
    policy = CodecPolicy(codec="ecsq-hi", edge_layers=0)
    values = kv_of(manifest)
    stored, _ = encode(manifest, policy, values)
    with pytest.raises(ContainerError, match="ecsq knows no table 0000000000000005"):
        decoded(manifest, with_header(stored, table_id=5), values)


def test_containers_are_not_copied_when_they_are_opened() -> None:
    stored = made()
    container = open_container(stored)
    assert np.shares_memory(container.octets, np.frombuffer(stored, dtype=np.uint8))


def test_a_plan_is_made_once() -> None:
    codec = ChunkCodec(manifest_of(), CodecPolicy())
    assert codec.plan(HeadRange(0, 1)) is codec.plan(HeadRange(0, 1))

"""Whatever bytes come along: a container is decoded, or refused by a `ContainerError`.

Checksums are made to match after every change, so that what is behind them is reached. Memory
stays within a few times the chunk, whatever a container claims.
"""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings, strategies as st

from kvstore.compression import native, reference
from kvstore.compression.chunks import ChunkCodec, decode
from kvstore.compression.container import (
    ENTRY,
    HEADER,
    HEADER_BYTES,
    WORD_MASK,
    crc32c,
    open_container,
)
from kvstore.compression.policy import CodecPolicy
from kvstore.compression.registry import BUILT_IN
from kvstore.errors import ContainerError, UnfitError
from kvstore.limits import MIB
from kvstore.types import HeadRange
from tests.support.codec_chunks import decoded, encode, kv_of, manifest_of

MANIFEST = manifest_of(layers=1, tokens=70, dim=80)
VALUES = kv_of(MANIFEST)
STORED = {
    name: bytes(
        encode(
            MANIFEST,
            CodecPolicy(codec=name, edge_layers=0, sinks=2, tail_channels=8, spare_sections=0),
            VALUES,
            first_position=0,
        )[0]
    )
    for name in BUILT_IN
    if name != "nvfp4-compat"
}
NAMES = st.sampled_from(sorted(STORED))
TABLE = slice(HEADER_BYTES, HEADER_BYTES + 2 * ENTRY.size)
NOT_SEALED = HEADER.size - 4
SINKS_AT = 30


@pytest.fixture(params=["numpy", "compiled"], autouse=True, scope="module")
def _coders(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "numpy":
            patch.setattr(reference.native, "find", lambda codec, shape: None)
        elif native.KERNEL == "numpy":
            pytest.skip("the C library was not built")
        yield


def sealed(content: bytearray) -> bytearray:
    """Make the checksums of header and table match."""
    struct.pack_into("<I", content, NOT_SEALED, xxhash.xxh64_intdigest(content[TABLE]) & WORD_MASK)
    struct.pack_into("<I", content, HEADER.size, crc32c(content[: HEADER.size]))
    return content


def read(content: bytes | bytearray) -> np.ndarray | None:
    """Return what *content* decodes to, or None when it is refused as it must be."""
    try:
        return decoded(MANIFEST, content, VALUES)
    except ContainerError:
        return None


def test_what_is_not_changed_is_read() -> None:
    assert all(read(stored) is not None for stored in STORED.values())


@settings(max_examples=300)
@given(st.binary(max_size=400))
def test_any_bytes_are_refused(content: bytes) -> None:
    with pytest.raises(ContainerError):
        open_container(content)


@settings(max_examples=300)
@given(NAMES, st.data())
def test_changed_headers_and_tables_are_read_or_refused(name: str, data: st.DataObject) -> None:
    content = bytearray(STORED[name])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(4, TABLE.stop - 1))
        content[at] = data.draw(st.integers(0, 255))
    read(sealed(content))


@pytest.mark.parametrize("name", sorted(STORED))
def test_a_section_without_room_for_its_sinks_is_read_or_refused(name: str) -> None:
    for sinks in range(3, 70):
        content = bytearray(STORED[name])
        content[SINKS_AT] = sinks
        read(sealed(content))


@settings(max_examples=300)
@given(NAMES, st.data())
def test_changed_sections_are_read_or_refused(name: str, data: st.DataObject) -> None:
    content = bytearray(STORED[name])
    # Directories and parameters of entropy-coded sections lie at the start.
    start = 256
    stop = start + 800 if data.draw(st.booleans()) else len(content)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(start, stop - 1))
        content[at] = data.draw(st.integers(0, 255))
    read(content)


@settings(max_examples=200)
@given(NAMES, st.data())
def test_words_of_directories_may_say_anything(name: str, data: st.DataObject) -> None:
    content = bytearray(STORED[name])
    for _ in range(data.draw(st.integers(1, 3))):
        at = 256 + 4 * data.draw(st.integers(0, 200))
        word = data.draw(st.sampled_from([0, 1, 16, 4096, 2**31, 2**32 - 1, 2**32 - 16]))
        struct.pack_into("<I", content, at, word)
    read(content)


@settings(max_examples=200)
@given(NAMES, NAMES, st.integers(0, 2**32 - 1))
def test_sections_of_noise_are_read_or_refused(name: str, other: str, seed: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, len(STORED[name]), dtype=np.uint8)
    content = bytearray(noise.tobytes())
    content[:256] = STORED[name][:256]
    read(content)
    # And sections of one codec under the table of another.
    mixed = bytearray(STORED[name])
    size = min(len(mixed), len(STORED[other]))
    mixed[256:size] = STORED[other][256:size]
    read(mixed)


@settings(max_examples=200)
@given(NAMES, st.data())
def test_cut_containers_are_refused(name: str, data: st.DataObject) -> None:
    stored = STORED[name]
    size = data.draw(st.integers(0, len(stored) - 1))
    with pytest.raises(ContainerError):
        open_container(stored[:size])


def test_memory_is_bounded_whatever_a_container_claims() -> None:
    """Every header field in turn claims as much as it can."""
    tracemalloc.start()
    try:
        for name in ("int4kv", "exp3", "rans", "ecsq-mid", "lz4"):
            for at in range(4, TABLE.stop):
                content = bytearray(STORED[name])
                content[at] = 0xFF
                read(sealed(content))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16 * MIB


@settings(max_examples=150)
@given(
    st.sampled_from(sorted(BUILT_IN)),
    st.sampled_from(["bfloat16", "float16", "float32", "float8_e4m3", "float8_e5m2"]),
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 140), st.integers(1, 9)),
    st.integers(0, 2**32 - 1),
    st.sampled_from(["bits", "finite"]),
)
def test_any_bits_of_any_shape_come_back_or_are_refused(
    name: str, dtype: str, form: tuple[int, int, int, int], seed: int, kind: str
) -> None:
    layers, heads, tokens, dim = form
    dim *= 16
    manifest = manifest_of(layers=layers, heads=heads, tokens=tokens, dim=dim, dtype=dtype)
    values = kv_of(manifest, seed)
    if kind == "bits":
        rng = np.random.default_rng(seed)
        values = rng.integers(0, 256, values.nbytes, dtype=np.uint8)
        values = values.view(kv_of(manifest).dtype).reshape(layers, 2, heads, tokens, dim)
    codec = ChunkCodec(manifest, CodecPolicy(codec=name))
    room = bytearray(codec.encoded_size(manifest.all_heads))
    try:
        codec.encode(values, memoryview(room), manifest.all_heads)
    except UnfitError:
        assert not BUILT_IN[name].is_lossless
        return
    found = decoded(manifest, room, values)
    if BUILT_IN[name].is_lossless:
        assert np.array_equal(found, values)
    part = np.zeros_like(values[:, :, heads - 1 :])
    decode(manifest, room, part, HeadRange(heads - 1, heads))
    assert np.array_equal(part, found[:, :, heads - 1 :])

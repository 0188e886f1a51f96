"""The C library gives NumPy's bytes: every fixed-rate codec, type, odd shape and vector width."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from kvstore.compression import native
from kvstore.compression.reference import REFERENCE
from kvstore.compression.shapes import (
    FIXED_RATE,
    CodecId,
    Encoded,
    Kind,
    SectionCoder,
    SectionShape,
    SourceType,
    section_cap_bytes,
)
from kvstore.compression.tables import HQ3, HQ4
from kvstore.errors import CodecError, ContainerError
from kvstore.types import HeadRange
from tests.support.native_codecs import KERNELS, SHAPES, TYPES, chance, kv_like, with_kernel

TABLES = {CodecId.HQ4: HQ4.table_id, CodecId.HQ3: HQ3.table_id}
CODERS = {codec: REFERENCE[codec] for codec in sorted(native.CODECS & FIXED_RATE)}


@pytest.fixture(params=KERNELS)
def library(request: pytest.FixtureRequest) -> Iterator[native.Library]:
    yield from with_kernel(request.param)


def shape_of(
    codec: CodecId, kind: Kind, source: SourceType, size: tuple[int, int, int], sinks: int = 0
) -> SectionShape:
    heads, tokens, dim = size
    return SectionShape(
        kind, source, heads, tokens, dim, 0, min(sinks, tokens), 3, TABLES.get(codec, 0)
    )


def run(coder: SectionCoder, codec: CodecId, shape: SectionShape, values: np.ndarray):
    # What the coder leaves alone must not differ, and what it does not must not be left alone.
    section = np.full(section_cap_bytes(codec, shape), 0xA5, dtype=np.uint8)
    found = coder.encode(shape, values, section)
    decoded = np.zeros_like(values)
    if found.is_fit:
        coder.decode(shape, section, decoded, HeadRange(0, shape.heads))
    return found, section, decoded


def check_same(
    library: native.Library, codec: CodecId, shape: SectionShape, values: np.ndarray
) -> Encoded:
    """Assert that C and NumPy agree about *values*; return what they said."""
    compiled = native.coder_of(library, codec, shape)
    assert compiled is not None
    theirs, their_section, their_values = run(CODERS[codec], codec, shape, values)
    ours, our_section, our_values = run(compiled, codec, shape, values)
    assert ours.is_fit == theirs.is_fit
    if theirs.is_fit:
        assert np.array_equal(our_section, their_section)
        assert np.array_equal(our_values[:, shape.sinks :], their_values[:, shape.sinks :])
        assert ours.size_bytes == theirs.size_bytes
        assert ours.relative_error == pytest.approx(theirs.relative_error, rel=1e-3, abs=1e-5)
    return ours


@pytest.mark.parametrize("size", SHAPES, ids=str)
@pytest.mark.parametrize("codec", CODERS, ids=lambda codec: codec.name)
def test_c_gives_the_bytes_of_numpy(
    library: native.Library, codec: CodecId, size: tuple[int, int, int]
) -> None:
    rng = chance(codec, size)
    for kind in Kind:
        for source in TYPES:
            for sinks in (0, 4):
                shape = shape_of(codec, kind, source, size, sinks)
                assert check_same(library, codec, shape, kv_like(rng, shape)).is_fit


# --- values that hurt ----------------------------------------------------------------------

SPECIAL = {
    "zeros": [0.0, -0.0],
    "subnormal": [1e-40, -3e-41, 0.0, 1.1754944e-38],
    "tiny": [1e-30, -1e-37, 2e-36],
    "mixed": [1e-38, 1.0, -1e4, 0.0, 6e-5, -6e-8],
    "large": [1e5, -6e4, 65504.0],
    "huge": [3e38, -3e38, 1e38],
    "nan": [1.0, float("nan"), 2.0],
    "infinite": [1.0, float("inf"), -1.0],
    "negative infinite": [1.0, float("-inf"), -1.0],
}


@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize("codec", CODERS, ids=lambda codec: codec.name)
def test_c_and_numpy_agree_about_extreme_values(
    library: native.Library, codec: CodecId, name: str
) -> None:
    rng = chance(codec, name)
    for kind in Kind:
        for source in (SourceType.BFLOAT16, SourceType.FLOAT32):
            shape = shape_of(codec, kind, source, (2, 70, 96))
            chosen = rng.choice(np.array(SPECIAL[name], dtype=np.float32), (2, 70, 96))
            values = chosen.view(np.uint32)
            if source is SourceType.BFLOAT16:
                values = (values >> 16).astype(np.uint16)
            found = check_same(library, codec, shape, values)
            if "nan" in name or "infinite" in name:
                assert not found.is_fit


@pytest.mark.parametrize("codec", CODERS, ids=lambda codec: codec.name)
def test_c_and_numpy_agree_about_any_bits(library: native.Library, codec: CodecId) -> None:
    rng = chance(codec, "bits")
    for kind in Kind:
        shape = shape_of(codec, kind, SourceType.BFLOAT16, (1, 65, 64))
        values = rng.integers(0, 0x7F80, (1, 65, 64), dtype=np.uint16)
        values |= rng.integers(0, 2, values.shape, dtype=np.uint16) << 15
        check_same(library, codec, shape, values)


@pytest.mark.parametrize("codec", CODERS, ids=lambda codec: codec.name)
def test_any_codes_decode_to_what_numpy_makes_of_them(
    library: native.Library, codec: CodecId
) -> None:
    rng = chance(codec, "codes")
    for kind in Kind:
        shape = shape_of(codec, kind, SourceType.BFLOAT16, (2, 70, 48))
        section = rng.integers(0, 256, section_cap_bytes(codec, shape), dtype=np.uint8)
        compiled = native.coder_of(library, codec, shape)
        assert compiled is not None
        ours, theirs = np.zeros((2, 2, 70, 48), dtype=np.uint16)
        compiled.decode(shape, section, ours, HeadRange(0, 2))
        CODERS[codec].decode(shape, section, theirs, HeadRange(0, 2))
        is_number = (theirs & 0x7F80) != 0x7F80
        assert np.array_equal(ours[is_number], theirs[is_number])


# --- where values lie ------------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODERS, ids=lambda codec: codec.name)
def test_values_may_lie_anywhere(library: native.Library, codec: CodecId) -> None:
    rng = chance(codec, "strides")
    shape = shape_of(codec, Kind.K, SourceType.BFLOAT16, (3, 40, 64))
    values = kv_like(rng, shape)
    spread = np.zeros((40, 5, 80), dtype=np.uint16)[:, 1:4, 8:72].transpose(1, 0, 2)
    spread[:] = values
    compiled = native.coder_of(library, codec, shape)
    assert compiled is not None
    section, other = np.zeros((2, section_cap_bytes(codec, shape)), dtype=np.uint8)
    compiled.encode(shape, values, section)
    compiled.encode(shape, spread, other)
    assert np.array_equal(section, other)
    decoded = np.zeros_like(values)
    compiled.decode(shape, section, decoded, HeadRange(0, 3))
    spread[:] = 0
    compiled.decode(shape, section, spread[1:3], HeadRange(1, 3))
    assert np.array_equal(spread[1:3], decoded[1:3])
    assert not spread[0].any()


def test_a_section_of_the_wrong_size_is_refused(library: native.Library) -> None:
    shape = shape_of(CodecId.INT4KV, Kind.K, SourceType.BFLOAT16, (2, 64, 64))
    size = section_cap_bytes(CodecId.INT4KV, shape)
    coder = native.coder_of(library, CodecId.INT4KV, shape)
    assert coder is not None
    values = np.zeros((2, 64, 64), dtype=np.uint16)
    with pytest.raises(CodecError, match=str(size)):
        coder.encode(shape, values, np.zeros(size - 1, dtype=np.uint8))
    for wrong in (0, size - 1, size + 16):
        with pytest.raises(ContainerError):
            coder.decode(shape, np.zeros(wrong, dtype=np.uint8), values, HeadRange(0, 2))


def test_values_of_the_wrong_shape_are_refused(library: native.Library) -> None:
    shape = shape_of(CodecId.FP8, Kind.K, SourceType.BFLOAT16, (2, 64, 64))
    coder = native.coder_of(library, CodecId.FP8, shape)
    assert coder is not None
    section = np.zeros(section_cap_bytes(CodecId.FP8, shape), dtype=np.uint8)
    for wrong in (
        np.zeros((2, 64, 63), dtype=np.uint16),
        np.zeros((2, 64, 64), dtype=np.uint32),
        np.zeros((2, 64, 128), dtype=np.uint16)[:, :, ::2],
    ):
        with pytest.raises(CodecError):
            coder.encode(shape, wrong, section)


def test_what_the_library_cannot_do_is_left_to_numpy(library: native.Library) -> None:
    wide = shape_of(CodecId.INT8KV, Kind.K, SourceType.BFLOAT16, (1, 4, native.WIDTH_MAX + 1))
    opaque = shape_of(CodecId.INT8KV, Kind.K, SourceType.OPAQUE, (1, 4, 8))
    assert native.coder_of(library, CodecId.INT8KV, wide) is None
    assert native.coder_of(library, CodecId.INT8KV, opaque) is None
    assert native.coder_of(library, CodecId.LZ4, wide) is None

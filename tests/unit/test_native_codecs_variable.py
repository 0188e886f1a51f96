"""The C library gives NumPy's bytes for exp3, rans and ecsq; the lossless lose nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from kvstore.compression import native
from kvstore.compression.reference import REFERENCE
from kvstore.compression.shapes import (
    CodecId,
    Kind,
    SectionCoder,
    SectionShape,
    SourceType,
    section_cap_bytes,
)
from kvstore.compression.tables import PRESETS
from kvstore.errors import ContainerError
from kvstore.types import HeadRange
from tests.support.native_codecs import KERNELS, SHAPES, TYPES, chance, kv_like, with_kernel

LARGER_SHAPES = (*SHAPES, (2, 130, 128))
BFLOAT16 = SourceType.BFLOAT16


@pytest.fixture(params=KERNELS)
def library(request: pytest.FixtureRequest) -> Iterator[native.Library]:
    yield from with_kernel(request.param)


def compiled_coder(library: native.Library, codec: CodecId, shape: SectionShape) -> SectionCoder:
    found = native.coder_of(library, codec, shape)
    assert found is not None
    return found


def check_same(
    library: native.Library, codec: CodecId, shape: SectionShape, values: np.ndarray
) -> np.ndarray | None:
    """Assert that C and NumPy agree; return the section, or None when both find it unfit."""
    coder, twin = compiled_coder(library, codec, shape), REFERENCE[codec]
    ours, theirs = np.full((2, section_cap_bytes(codec, shape)), 0xA5, dtype=np.uint8)
    found, expected = coder.encode(shape, values, ours), twin.encode(shape, values, theirs)
    assert found.is_fit == expected.is_fit
    if not found.is_fit:
        return None
    assert found.size_bytes == expected.size_bytes
    section = ours[: found.size_bytes].copy()
    assert np.array_equal(section, theirs[: found.size_bytes])
    assert found.relative_error == pytest.approx(expected.relative_error, rel=1e-3, abs=1e-5)
    decoded, twins = np.zeros_like(values), np.zeros_like(values)
    heads = HeadRange(0, shape.heads)
    coder.decode(shape, section, decoded, heads)
    twin.decode(shape, section, twins, heads)
    assert np.array_equal(decoded[:, shape.sinks :], twins[:, shape.sinks :])
    if codec is not CodecId.ECSQ:
        assert np.array_equal(decoded, values)
    return section


def exponents_at_hand(rng: np.random.Generator, size: tuple[int, int, int]) -> np.ndarray:
    """Return bfloat16 bits with many exact zeros, infinities, NaN of all kinds, subnormals."""
    values = rng.integers(0x3E00, 0x4100, size, dtype=np.uint16)
    hurt = rng.random(size) < 0.1
    values[hurt] = rng.integers(0, 0x10000, int(hurt.sum()), dtype=np.uint16)
    return values


@pytest.mark.parametrize("size", LARGER_SHAPES, ids=str)
def test_exp3_in_c_gives_the_bytes_of_numpy(
    library: native.Library,
    size: tuple[int, int, int],
) -> None:
    rng = chance("exp3", size)
    shape = SectionShape(Kind.K, BFLOAT16, *size)
    check_same(library, CodecId.EXP3, shape, kv_like(rng, shape))
    check_same(library, CodecId.EXP3, shape, exponents_at_hand(rng, size))
    check_same(library, CodecId.EXP3, shape, np.zeros(size, dtype=np.uint16))


@pytest.mark.parametrize("size", LARGER_SHAPES, ids=str)
def test_rans_in_c_gives_the_bytes_of_numpy(
    library: native.Library,
    size: tuple[int, int, int],
) -> None:
    rng = chance("rans", size)
    for source in TYPES:
        shape = SectionShape(Kind.V, source, *size)
        check_same(library, CodecId.RANS, shape, kv_like(rng, shape))
    shape = SectionShape(Kind.V, BFLOAT16, *size)
    check_same(library, CodecId.RANS, shape, exponents_at_hand(rng, size))
    check_same(library, CodecId.RANS, shape, np.zeros(size, dtype=np.uint16))


@pytest.mark.parametrize("spread", [1, 3, 40])
def test_opaque_bytes_of_any_distribution_survive_rans(
    library: native.Library,
    spread: int,
) -> None:
    values = chance("opaque", spread).geometric(1 / spread, (1, 20_000, 1)).clip(0, 255)
    shape = SectionShape(Kind.K, SourceType.OPAQUE, 1, 20_000, 1)
    assert check_same(library, CodecId.RANS, shape, values.astype(np.uint8)) is not None


@pytest.mark.parametrize("size", LARGER_SHAPES, ids=str)
@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_ecsq_in_c_gives_the_bytes_of_numpy(
    library: native.Library,
    preset,
    size: tuple[int, int, int],
) -> None:
    rng = chance("ecsq", size)
    for kind in Kind:
        for source in (BFLOAT16, rng.choice(np.array(TYPES))):
            for sinks in (0, min(4, size[1])):
                shape = SectionShape(kind, SourceType(source), *size, tail=8, sinks=sinks)
                shape = replace(shape, table=preset.table_id)
                check_same(library, CodecId.ECSQ, shape, kv_like(rng, shape))


@pytest.mark.parametrize("codec", [CodecId.EXP3, CodecId.RANS, CodecId.ECSQ])
def test_a_cut_section_is_refused_wherever_it_is_cut(
    library: native.Library,
    codec: CodecId,
) -> None:
    shape = SectionShape(Kind.K, BFLOAT16, 2, 64, 64, table=PRESETS[0].table_id)
    section = check_same(library, codec, shape, kv_like(chance(codec), shape))
    assert section is not None
    coder = compiled_coder(library, codec, shape)
    values = np.zeros((2, 64, 64), dtype=np.uint16)
    for length in {*range(0, len(section), 97), len(section) - 16, len(section) - 1}:
        with pytest.raises(ContainerError):
            coder.decode(shape, section[:length].copy(), values, HeadRange(0, 2))


def test_heads_decode_alone(library: native.Library) -> None:
    shape = SectionShape(Kind.K, BFLOAT16, 3, 70, 64, table=PRESETS[0].table_id)
    values = kv_like(chance("heads"), shape)
    for codec in (CodecId.EXP3, CodecId.RANS):
        section = check_same(library, codec, shape, values)
        assert section is not None
        one = np.zeros((1, 70, 64), dtype=np.uint16)
        compiled_coder(library, codec, shape).decode(shape, section, one, HeadRange(1, 2))
        assert np.array_equal(one[0], values[1])

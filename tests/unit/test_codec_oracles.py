"""Arithmetic of codecs beside independent oracles.

Narrow floats beside ml_dtypes and NumPy; NVFP4 beside what NVIDIA ModelOpt 0.47 made of the same
values (kept in tests/golden/codecs, made with `NVFP4QTensor.quantize` on the CPU); rotations and
scales beside plain definitions; static tables beside the distribution they stand for.
"""

from __future__ import annotations

import math
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from kvstore.compression import floats
from kvstore.compression.hadamard import butterflies, rotation_blocks
from kvstore.compression.nvfp4 import NVFP4Compat
from kvstore.compression.planes import pack_rows, unpack_rows
from kvstore.compression.shapes import (
    CodecId,
    Kind,
    SectionShape,
    SourceType,
    fixed_section_bytes,
    head_layout,
    plane_rows,
)
from kvstore.compression.tables import HQ3, HQ4, PRESETS, Codebook, signs

GOLDEN = Path(__file__).parents[1] / "golden" / "codecs"
EVERY_BF16 = floats.widen_bf16(np.arange(1 << 16, dtype=np.uint16))
FINITE = EVERY_BF16[np.isfinite(EVERY_BF16)]


def some_floats() -> np.ndarray:
    """Return floats around every rounding boundary of narrow types, and any others."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 200_000, dtype=np.uint32)
    spread = (rng.standard_normal(200_000) * 10.0 ** rng.uniform(-8, 5, 200_000)).astype("f4")
    edges = np.concatenate([np.nextafter(FINITE, -np.inf), FINITE, np.nextafter(FINITE, np.inf)])
    values = np.concatenate([bits.view(np.float32), spread, edges.astype(np.float32)])
    return values[np.isfinite(values)]


# --- rounding --------------------------------------------------------------------------------


def test_e4m3_of_every_bfloat16_is_that_of_ml_dtypes() -> None:
    within = FINITE[np.abs(FINITE) <= 448]
    expected = within.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    assert np.array_equal(floats.e4m3_codes(within), expected)


def test_e4m3_saturates_where_others_give_nan() -> None:
    beyond = FINITE[np.abs(FINITE) > 448]
    expected = np.where(beyond > 0, np.uint8(0x7E), np.uint8(0xFE))
    assert np.array_equal(floats.e4m3_codes(beyond), expected)


@pytest.mark.parametrize(
    ("codes", "dtype", "most"),
    [
        (floats.e4m3_codes, ml_dtypes.float8_e4m3fn, 448.0),
        (floats.e5m2_codes, ml_dtypes.float8_e5m2, 57344.0),
        (floats.e2m1_codes, ml_dtypes.float4_e2m1fn, 6.0),
    ],
    ids=["e4m3", "e5m2", "e2m1"],
)
def test_small_floats_are_rounded_as_ml_dtypes_does(codes, dtype, most: float) -> None:
    values = some_floats()
    values = values[np.abs(values) <= most]
    expected = values.astype(dtype).view(np.uint8)
    if dtype is ml_dtypes.float4_e2m1fn:
        # The sign of zero is the one thing that ModelOpt and ml_dtypes see differently.
        expected = np.where(values == 0, np.uint8(0), expected)
    assert np.array_equal(codes(values), expected)


@pytest.mark.parametrize(
    ("found", "dtype"),
    [
        (floats.E4M3_VALUES, ml_dtypes.float8_e4m3fn),
        (floats.E5M2_VALUES, ml_dtypes.float8_e5m2),
        (floats.E2M1_VALUES, ml_dtypes.float4_e2m1fn),
    ],
    ids=["e4m3", "e5m2", "e2m1"],
)
def test_small_floats_have_the_values_of_ml_dtypes(found: np.ndarray, dtype) -> None:
    expected = np.arange(len(found), dtype=np.uint8).view(dtype).astype(np.float32)
    assert np.array_equal(found, expected, equal_nan=True)
    is_number = ~np.isnan(expected)
    assert np.array_equal(np.signbit(found)[is_number], np.signbit(expected)[is_number])


def test_bfloat16_is_rounded_as_ml_dtypes_does() -> None:
    values = some_floats()
    with np.errstate(over="ignore"):
        expected = values.astype(ml_dtypes.bfloat16).view(np.uint16)
    assert np.array_equal(floats.bf16_bits(values), expected)
    up = floats.widen_bf16(floats.bf16_up_bits(np.abs(values)))
    assert (up >= np.abs(values)).all()
    assert (floats.bf16_up_bits(np.abs(FINITE)) == floats.bf16_bits(np.abs(FINITE))).all()


def test_decoded_values_saturate_in_every_type() -> None:
    huge = np.array([3.4e38, -3.4e38, np.inf, -np.inf], dtype=np.float32)
    for source in SourceType:
        if source is not SourceType.OPAQUE:
            found = floats.widen(floats.narrow(huge, source), source)
            assert np.isfinite(found).all()
            assert (np.sign(found) == np.sign(huge)).all()


@pytest.mark.parametrize("source", [s for s in SourceType if s is not SourceType.OPAQUE])
def test_widening_and_narrowing_is_exact(source: SourceType) -> None:
    bits = np.arange(1 << 16, dtype=np.uint32).astype(source.carrier)
    if source is SourceType.FLOAT32:
        bits = np.random.default_rng(0).integers(0, 1 << 32, 1 << 16, dtype=np.uint32)
    values = floats.widen(bits, source)
    is_finite = np.isfinite(values)
    assert np.array_equal(floats.narrow(values[is_finite], source), bits[is_finite])


# --- sums ------------------------------------------------------------------------------------


def tree(values: list[np.float32]) -> np.float32:
    """The format's own words."""
    size = 1
    while size < len(values):
        size *= 2
    padded = values + [np.float32(0)] * (size - len(values))
    while size > 1:
        size //= 2
        padded = [padded[i] + padded[i + size] for i in range(size)]
    return padded[0]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 16, 33, 64, 100])
def test_sums_are_taken_in_the_order_of_the_format(count: int) -> None:
    rng = np.random.default_rng(count)
    values = (rng.standard_normal((3, count)) * 10.0 ** rng.uniform(-3, 3, (3, count))).astype("f4")
    found = floats.tree_sum(values, axis=1)
    assert found.tolist() == [tree(list(row)) for row in values]


def test_sums_over_tokens_go_tile_by_tile() -> None:
    values = np.random.default_rng(0).standard_normal((2, 150, 5)).astype(np.float32)
    found = floats.sum_over_tokens(values)
    for head in range(2):
        for channel in range(5):
            column = list(values[head, :, channel])
            total = np.float32(0)
            for start in range(0, 150, 64):
                total = total + tree(column[start : start + 64])
            assert found[head, channel] == total


# --- planes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 3, 8, 31, 64, 65, 100, 128])
def test_row_planes_are_those_of_the_format(bits: int, tokens: int) -> None:
    codes = np.random.default_rng(tokens).integers(0, 1 << bits, (2, tokens, 3), dtype=np.uint8)
    planes = pack_rows(codes, bits)
    assert planes.shape == (2, plane_rows(tokens, bits), 3)
    assert np.array_equal(unpack_rows(planes, bits, tokens), codes)
    fields, row = 8 // bits, 0
    for start in range(0, tokens, 64):
        rows = min(64, tokens - start)
        count = -(-rows // fields)
        for q in range(count):
            expected = np.zeros((2, 3), dtype=np.uint8)
            for j in range(fields):
                if q + j * count < rows:
                    expected |= codes[:, start + q + j * count] << (j * bits)
            assert np.array_equal(planes[:, row], expected)
            row += 1


# --- NVFP4 -----------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 1, 2])
def test_compat_bytes_are_those_of_modelopt(index: int) -> None:
    with np.load(GOLDEN / "modelopt-0.47-nvfp4.npz") as kept:
        values, codes, scales, tensor = (
            kept[f"{name}{index}"] for name in ("values", "codes", "scales", "tensor")
        )
    heads, tokens, dim = values.shape
    for kind in Kind:
        shape = SectionShape(kind, SourceType.BFLOAT16, heads, tokens, dim)
        section = np.zeros(fixed_section_bytes(CodecId.NVFP4_COMPAT, shape), dtype=np.uint8)
        assert NVFP4Compat().encode(shape, values, section).is_fit
        layout = head_layout(CodecId.NVFP4_COMPAT, shape)
        blocks = section.reshape(heads, -1)
        rows = heads * tokens
        assert np.array_equal(layout.view(blocks, "codes").reshape(rows, -1), codes)
        assert np.array_equal(layout.view(blocks, "scales").reshape(rows, -1), scales)
        found = np.ascontiguousarray(layout.view(blocks, "tensor")).view(np.float32)
        assert (found == tensor[0]).all()


# --- rotations and tables --------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 64, 80, 96, 112, 128, 192, 256, 576])
def test_rotations_are_hadamard_matrices(dim: int) -> None:
    blocks = rotation_blocks(dim)
    assert sum(size for _, size in blocks) == dim
    matrix = butterflies(np.eye(dim, dtype=np.float32))
    for start, size in blocks:
        block = matrix[start : start + size, start : start + size]
        index = np.arange(size)
        parity = np.array([[(i & j).bit_count() & 1 for j in index] for i in index])
        assert np.array_equal(block, 1 - 2 * parity)
        matrix[start : start + size, start : start + size] = 0
    assert not matrix.any()


def test_signs_are_those_of_splitmix64() -> None:
    # Published first outputs of SplitMix64 for the seed 1234567.
    words = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    expected = [-1.0 if word >> bit & 1 else 1.0 for word in words for bit in range(64)]
    assert signs(1234567, 0, 0, 192).tolist() == expected
    assert signs(1234567, 0, 0, 80).tolist() == expected[:80]
    assert signs(1234567, 0, 1, 64).tolist() != expected[:64]
    assert signs(1234567, 1, 0, 64).tolist() != signs(1234567, 0, 1, 64).tolist()


@pytest.mark.parametrize("book", [HQ3, HQ4], ids=lambda book: book.name)
def test_codebooks_are_lloyd_and_max(book: Codebook) -> None:
    """Every threshold lies half way between centroids, every centroid is the mean of its piece."""

    def mass(a: float, b: float) -> float:
        return 0.5 * (math.erf(b / math.sqrt(2)) - math.erf(a / math.sqrt(2)))

    def moment(a: float, b: float) -> float:
        return (math.exp(-a * a / 2) - math.exp(-b * b / 2)) / math.sqrt(2 * math.pi)

    edges = [0.0, *book.thresholds, 40.0]
    for index, centroid in enumerate(book.centroids):
        a, b = edges[index], edges[index + 1]
        assert centroid == pytest.approx(moment(a, b) / mass(a, b), abs=2e-4)
    for threshold, (a, b) in zip(
        book.thresholds, zip(book.centroids, book.centroids[1:], strict=False), strict=True
    ):
        assert threshold == pytest.approx((a + b) / 2, abs=2e-4)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_static_tables_fit_their_distribution(preset) -> None:
    def below(x: float) -> float:
        laplace = 0.5 * math.exp(x / 1.5) if x < 0 else 1 - 0.5 * math.exp(-x / 1.5)
        return 0.9 * 0.5 * (1 + math.erf(x / math.sqrt(2))) + 0.1 * laplace

    for delta, bound, frequencies in zip(
        preset.deltas, preset.bounds, preset.frequencies, strict=True
    ):
        assert bound == min(127, math.ceil(round(7 / delta, 6)))
        assert len(frequencies) == 2 * bound + 2
        assert sum(frequencies) == 4096
        assert min(frequencies) >= 1
        shares = [
            below((i + 0.5) * delta) - below((i - 0.5) * delta) for i in range(-bound, bound + 1)
        ]
        shares.append(2 * (1 - below((bound + 0.5) * delta)))
        ideal = -sum(p * math.log2(p) for p in shares)
        used = -sum(p * math.log2(f / 4096) for p, f in zip(shares, frequencies, strict=True))
        assert used - ideal < 0.006


def test_tables_never_change() -> None:
    found = {preset.name: preset.table_id for preset in PRESETS}
    found |= {book.name: book.table_id for book in (HQ3, HQ4)}
    assert found == {
        "ecsq-hi": 0x9A10E22C64001730,
        "ecsq-mid": 0x2B0F38B49A623693,
        "ecsq-lo": 0x5E2015DACDA7382D,
        "hq3": 0x3B6B08EBFC068D47,
        "hq4": 0x48187B9D86545555,
    }

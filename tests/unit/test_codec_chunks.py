"""Whole chunks through every codec: odd shapes, all types, slices of heads, sinks, fallbacks."""

from __future__ import annotations

import numpy as np
import pytest

from kvstore.compression.chunks import ChunkCodec, decode
from kvstore.compression.container import Flags, open_container
from kvstore.compression.floats import narrow, widen
from kvstore.compression.guard import ERROR_EDGES, CodecCounters
from kvstore.compression.policy import CodecPolicy
from kvstore.compression.registry import BUILT_IN
from kvstore.compression.shapes import CodecId, SourceType, source_type
from kvstore.errors import CodecError, ContainerError, UnfitError
from kvstore.types import HeadRange
from tests.support.codec_chunks import (
    decoded,
    encode,
    kv_of,
    manifest_of,
    opaque_of,
    relative_error,
)

NAMES = tuple(BUILT_IN)
LOSSY = tuple(name for name, spec in BUILT_IN.items() if not spec.is_lossless)
LOSSLESS = tuple(name for name, spec in BUILT_IN.items() if spec.is_lossless)
TYPES = ("bfloat16", "float16", "float32", "float8_e4m3", "float8_e5m2")
HEAD_SIZES = (64, 80, 96, 112, 128, 192, 256, 576)

# The relative error that KV of these tests may have in K and V: half again of what it has.
ERRORS = {
    "int8kv": (0.008, 0.010),
    "fp8": (0.030, 0.030),
    "int4kv": (0.08, 0.13),
    "k8v4": (0.008, 0.13),
    "nvfp4": (0.08, 0.13),
    "nvfp4-compat": (0.13, 0.13),
    "hq4": (0.10, 0.14),
    "hq3": (0.18, 0.26),
    "ecsq-hi": (0.07, 0.12),
    "ecsq-mid": (0.10, 0.24),
    "ecsq-lo": (0.17, 0.38),
}


def plain(name: str, **changes: object) -> CodecPolicy:
    """Return a policy of *name* alone: no gentle layers, no sinks, no room to fall back."""
    settings = {"edge_layers": 0, "sinks": 0, "spare_sections": 0} | changes
    return CodecPolicy(codec=name, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("dim", HEAD_SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_every_codec_takes_every_head_size(name: str, dim: int) -> None:
    manifest = manifest_of(dim=dim, tokens=70, layers=1)
    values = kv_of(manifest, seed=dim)
    stored, report = encode(manifest, plain(name), values)
    found = decoded(manifest, stored, values)
    if name in LOSSLESS:
        assert np.array_equal(found, values)
        return
    assert report.fallbacks == 0
    for kind, most in enumerate(ERRORS[name]):
        error = relative_error(values[:, kind], found[:, kind], SourceType.BFLOAT16)
        assert 0 < error < most
        # The report is about values before they are rounded to bfloat16, 0.2 % at most.
        assert error == pytest.approx(report.sections[kind].relative_error, abs=0.003)


@pytest.mark.parametrize("tokens", [1, 2, 15, 63, 65, 129, 257])
@pytest.mark.parametrize("name", NAMES)
def test_every_codec_takes_every_number_of_tokens(name: str, tokens: int) -> None:
    manifest = manifest_of(tokens=tokens, heads=1, layers=1)
    values = kv_of(manifest, seed=tokens)
    stored, report = encode(manifest, plain(name), values)
    found = decoded(manifest, stored, values)
    if all(section.codec is CodecId.RAW for section in report.sections):
        assert np.array_equal(found, values)
    else:
        error = relative_error(values, found, SourceType.BFLOAT16)
        # Few values may be unluckier than many.
        assert error < 1.5 * max(ERRORS.get(name, (0, 1e-9)))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", NAMES)
def test_every_codec_takes_every_type(name: str, dtype: str) -> None:
    manifest = manifest_of(dtype=dtype, tokens=128)
    values = kv_of(manifest)
    stored, report = encode(manifest, plain(name), values)
    found = decoded(manifest, stored, values)
    if name in LOSSLESS or {section.codec for section in report.sections} == {CodecId.RAW}:
        assert np.array_equal(found, values)
        return
    coarse = 0.05 if source_type(dtype).size_bytes == 1 else 0.0
    coarse *= 2 if dtype == "float8_e5m2" else 1
    assert relative_error(values, found, source_type(dtype)) < max(ERRORS[name]) + coarse
    assert len(stored) < values.nbytes


@pytest.mark.parametrize("name", NAMES)
def test_a_reader_of_some_heads_gets_those(name: str) -> None:
    manifest = manifest_of(heads=6, tokens=65)
    values = kv_of(manifest)
    stored, _ = encode(manifest, plain(name), values)
    whole = decoded(manifest, stored, values)
    for heads in (HeadRange(0, 1), HeadRange(2, 5), HeadRange(5, 6)):
        part = np.zeros_like(values[:, :, heads.start : heads.stop])
        decode(manifest, stored, part, heads)
        assert np.array_equal(part, whole[:, :, heads.start : heads.stop])


@pytest.mark.parametrize("name", ["int8kv", "int4kv", "nvfp4", "hq4", "hq3", "fp8"])
def test_a_reader_of_some_heads_needs_only_their_bytes(name: str) -> None:
    manifest = manifest_of(heads=4, tokens=65)
    values = kv_of(manifest)
    stored, _ = encode(manifest, plain(name), values)
    container = open_container(stored)
    known = bytearray(len(stored))
    start = container.header.payload_offset
    known[:start] = stored[:start]
    for offset, size in container.ranges(1, 3):
        known[offset : offset + size] = stored[offset : offset + size]
    part = np.zeros_like(values[:, :, 1:3])
    decode(manifest, known, part, HeadRange(1, 3))
    assert np.array_equal(part, decoded(manifest, stored, values)[:, :, 1:3])
    assert sum(size for _, size in container.ranges(1, 3)) * 2 <= len(stored)


def test_a_shard_is_read_by_the_numbers_of_the_model() -> None:
    manifest = manifest_of(heads=8)
    values = kv_of(manifest)[:, :, 4:8].copy()
    codec = ChunkCodec(manifest, plain("int8kv"))
    heads = HeadRange(4, 8)
    room = bytearray(codec.encoded_size(heads))
    codec.encode(values, memoryview(room), heads)
    part = np.zeros_like(values[:, :, :2])
    decode(manifest, room, part, HeadRange(5, 7))
    assert relative_error(values[:, :, 1:3], part, SourceType.BFLOAT16) < 0.01
    with pytest.raises(ContainerError, match="not all among"):
        decode(manifest, room, part, HeadRange(3, 5))


@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_known_before(name: str) -> None:
    manifest = manifest_of(layers=4, tokens=128, heads=3)
    values = kv_of(manifest)
    for position in (0, 128):
        codec = ChunkCodec(manifest, CodecPolicy(codec=name, edge_layers=1))
        plan = codec.plan(HeadRange(0, 3), first_position=position)
        room = bytearray(codec.encoded_size(HeadRange(0, 3), first_position=position))
        report = codec.encode(values, memoryview(room), HeadRange(0, 3), first_position=position)
        assert report.fallbacks == 0 or not BUILT_IN[name].is_fixed_rate
        if BUILT_IN[name].is_fixed_rate:
            assert report.size_bytes == plan.size_bytes
        else:
            assert report.size_bytes < plan.size_bytes


@pytest.mark.parametrize("name", LOSSY)
def test_the_first_tokens_of_a_sequence_stay_as_they_are(name: str) -> None:
    manifest = manifest_of(tokens=128)
    values = kv_of(manifest)
    # A sink is far larger than everything else, and may be anything at all.
    values[:, :, :, 0] = 0x4700
    values[:, :, :, 1] = 0x7FC0
    policy = plain(name, sinks=4)
    stored, report = encode(manifest, policy, values, first_position=0)
    assert open_container(stored).header.flags & Flags.SINKS
    assert report.fallbacks == 0
    found = decoded(manifest, stored, values)
    assert np.array_equal(found[:, :, :, :4], values[:, :, :, :4])
    others = (values[:, :, :, 4:], found[:, :, :, 4:])
    assert relative_error(*others, SourceType.BFLOAT16) < max(ERRORS[name])


@pytest.mark.parametrize("name", LOSSY)
def test_chunks_of_nothing_but_sinks_keep_everything(name: str) -> None:
    manifest = manifest_of(tokens=3, dim=256)
    values = kv_of(manifest)
    stored, _ = encode(manifest, plain(name, sinks=4), values, first_position=0)
    assert np.array_equal(decoded(manifest, stored, values), values)


@pytest.mark.parametrize("name", LOSSY)
def test_the_rope_part_of_a_latent_stays_as_it_is(name: str) -> None:
    manifest = manifest_of(dim=576, heads=1, values="k", tokens=128)
    values = kv_of(manifest)
    policy = plain(name, tail_channels=64, sinks=4)
    stored, report = encode(manifest, policy, values, first_position=0)
    found = decoded(manifest, stored, values)
    assert np.array_equal(found[..., 512:], values[..., 512:])
    assert np.array_equal(found[:, :, :, :4], values[:, :, :, :4])
    assert 0 < relative_error(values, found, SourceType.BFLOAT16) < max(ERRORS[name])
    assert report.size_bytes < values.nbytes


@pytest.mark.parametrize("name", ["raw", "rans", "lz4"])
def test_opaque_bytes_come_back(name: str) -> None:
    rng = np.random.default_rng(0)
    manifest = opaque_of(20_000)
    noise = rng.integers(0, 256, 20_000, dtype=np.uint8)
    skewed = rng.geometric(0.2, 20_000).astype(np.uint8)
    repeated = np.tile(np.arange(50, dtype=np.uint8), 400)
    for values in (noise, skewed, repeated):
        stored, _ = encode(manifest, CodecPolicy(codec=name), values)
        target = bytearray(20_000)
        decode(manifest, stored, memoryview(target), HeadRange(0, 1))
        assert target == values.tobytes()
    assert (len(stored) < 16_000) == (name != "raw")


@pytest.mark.parametrize("name", [*LOSSY, "exp3"])
def test_opaque_bytes_are_never_made_lossy(name: str) -> None:
    with pytest.raises(CodecError, match="opaque bytes take lz4, rans, raw alone"):
        ChunkCodec(opaque_of(4096), CodecPolicy(codec=name, edge_layers=0))
    with pytest.raises(CodecError, match="opaque bytes take"):
        ChunkCodec(opaque_of(4096), CodecPolicy(codec="raw", layers={0: name}))


# --- the guard -----------------------------------------------------------------------------


def poisoned(value: int) -> tuple[object, np.ndarray]:
    manifest = manifest_of(layers=3, tokens=128)
    values = kv_of(manifest)
    values[1, 1, 1, 77, 5] = value
    return manifest, values


@pytest.mark.parametrize("value", [0x7F80, 0xFF80, 0x7FC1], ids=["inf", "-inf", "nan"])
@pytest.mark.parametrize("name", LOSSY)
def test_a_section_that_is_not_finite_falls_back_to_raw(name: str, value: int) -> None:
    manifest, values = poisoned(value)
    codec = ChunkCodec(manifest, plain(name))  # type: ignore[arg-type]
    heads = HeadRange(0, 2)
    room = bytearray(codec.encoded_size(heads) + values.nbytes)
    report = codec.encode(values, memoryview(room), heads)
    assert [section.codec for section in report.sections].count(CodecId.RAW) == 1
    assert report.sections[3].codec is CodecId.RAW
    found = np.zeros_like(values)
    header = decode(manifest, room, found, heads)  # type: ignore[arg-type]
    assert header.flags & Flags.FALLBACK
    assert np.array_equal(found[1, 1], values[1, 1])
    assert relative_error(values[0], found[0], SourceType.BFLOAT16) < max(ERRORS[name])


def test_without_room_for_its_fallback_a_chunk_is_refused_and_counted() -> None:
    manifest, values = poisoned(0x7FC0)
    counters = CodecCounters()
    codec = ChunkCodec(manifest, plain("int4kv"), counters)  # type: ignore[arg-type]
    heads = HeadRange(0, 2)
    room = bytearray(codec.encoded_size(heads))
    with pytest.raises(UnfitError, match="section 3 is int4kv, falls back to int8kv, raw"):
        codec.encode(values, memoryview(room), heads)
    assert counters.refused == 1
    assert counters.stored_bytes == 0


def test_a_section_above_its_bound_takes_int8_within_the_spare_room() -> None:
    manifest = manifest_of(layers=3, tokens=128)
    values = kv_of(manifest)
    # In every group of K one value far above and one far below all others.
    rng = np.random.default_rng(0)
    hard = rng.standard_normal((2, 128, 64)).astype(np.float32)
    hard[:, 5::64], hard[:, 6::64] = 15.0, -15.0
    values[1, 0] = narrow(hard, SourceType.BFLOAT16)
    policy = plain("int4kv", spare_sections=1)
    nominal = ChunkCodec(manifest, policy).plan(HeadRange(0, 2), first_position=64).size_bytes
    stored, report = encode(manifest, policy, values)
    expected = [CodecId.INT4KV] * 6
    expected[2] = CodecId.INT8KV
    assert [section.codec for section in report.sections] == expected
    container = open_container(stored)
    section = container.sections[2]
    assert (section.offset, section.is_fallback) == (nominal, True)
    # Its nominal place holds nothing of the attempt.
    gap = container.octets[container.sections[1].end : container.sections[3].offset]
    assert not gap.any()
    found = decoded(manifest, stored, values)
    assert relative_error(values[1, 0], found[1, 0], SourceType.BFLOAT16) < 0.02


def test_counters_tell_what_was_done() -> None:
    manifest = manifest_of(layers=4, tokens=128)
    counters = CodecCounters()
    codec = ChunkCodec(manifest, CodecPolicy(codec="int4kv", edge_layers=1), counters)
    heads = HeadRange(0, 2)
    values = kv_of(manifest)
    room = bytearray(codec.encoded_size(heads))
    report = codec.encode(values, memoryview(room), heads)
    assert counters.raw_bytes == values.nbytes == report.raw_bytes
    assert counters.stored_bytes == report.size_bytes
    assert counters.ratio == pytest.approx(values.nbytes / report.size_bytes)
    assert counters.sections == {"int4kv": 4, "int8kv": 4}
    assert sum(counters.errors["int4kv"]) == 4
    assert len(counters.errors["int4kv"]) == len(ERROR_EDGES) + 1
    assert counters.errors["int8kv"][0] == 0
    assert counters.fallbacks == {}


# --- sources and targets ---------------------------------------------------------------------


def test_chunks_may_be_bytes_arrays_of_any_strides_or_lists_of_sections() -> None:
    manifest = manifest_of(heads=3, tokens=70)
    values = kv_of(manifest)
    expected, _ = encode(manifest, plain("int4kv"), values)
    spread = np.zeros((2, 2, 70, 3, 100), dtype=np.uint16).transpose(0, 1, 3, 2, 4)[..., 7:71]
    spread[:] = values
    sections = [values[layer, kind] for layer in range(2) for kind in range(2)]
    for source in (values.tobytes(), memoryview(values.tobytes()), spread, sections):
        codec = ChunkCodec(manifest, plain("int4kv"))
        room = bytearray(len(expected))
        codec.encode(source, memoryview(room), HeadRange(0, 3), first_position=64)
        assert room == expected
    found = decoded(manifest, expected, values)
    spread[:] = 0
    decode(manifest, expected, spread, HeadRange(0, 3))
    assert np.array_equal(spread, found)


def test_a_chunk_of_another_size_is_refused() -> None:
    manifest = manifest_of()
    codec = ChunkCodec(manifest, plain("int8kv"))
    room = memoryview(bytearray(codec.encoded_size(HeadRange(0, 2))))
    with pytest.raises(CodecError, match="a chunk of 10 bytes, its geometry has 65536"):
        codec.encode(bytes(10), room, HeadRange(0, 2))
    with pytest.raises(CodecError, match="a chunk of 1 sections, its geometry has 4"):
        codec.encode([np.zeros((2, 64, 64), np.uint16)], room, HeadRange(0, 2))
    with pytest.raises(CodecError, match="a section is uint8"):
        codec.encode([np.zeros((2, 64, 64), np.uint8)] * 4, room, HeadRange(0, 2))
    with pytest.raises(CodecError, match="lie outside the 2 of the manifest"):
        codec.encoded_size(HeadRange(1, 3))
    with pytest.raises(UnfitError, match="does not fit 256 bytes"):
        codec.encode(kv_of(manifest), memoryview(bytearray(256)), HeadRange(0, 2))


@pytest.mark.parametrize(
    ("field", "value"),
    [("layers", 3), ("head_dim", 128), ("chunk_tokens", 128), ("dtype", "float16")],
)
def test_a_container_of_another_geometry_is_not_decoded(field: str, value: object) -> None:
    manifest = manifest_of()
    values = kv_of(manifest)
    stored, _ = encode(manifest, plain("int8kv"), values)
    names = {"head_dim": "dim", "chunk_tokens": "tokens"}
    other = manifest_of(**{names.get(field, field): value})  # type: ignore[arg-type]
    with pytest.raises(ContainerError, match="the manifest has"):
        decoded(other, stored, values)


def test_transcoding_keeps_what_the_first_codec_kept() -> None:
    manifest = manifest_of(tokens=128)
    values = kv_of(manifest)
    stored, _ = encode(manifest, plain("int8kv", sinks=4), values, first_position=0)
    strong = CodecPolicy(codec="int8kv", edge_layers=0, tiers={"redis": "ecsq-mid"})
    codec = ChunkCodec(manifest, strong.for_tier("redis"))
    room = bytearray(codec.encoded_size(HeadRange(0, 2)))
    report = codec.transcode(stored, memoryview(room))
    assert report.size_bytes < 0.6 * len(stored)
    found = decoded(manifest, room, values)
    assert np.array_equal(found[:, :, :, :4], values[:, :, :, :4])
    assert relative_error(values, found, SourceType.BFLOAT16) < 0.25
    header = open_container(room).header
    assert (header.first_position, header.codec) == (0, CodecId.ECSQ)


def test_equal_chunks_have_equal_bytes() -> None:
    manifest = manifest_of()
    for name in NAMES:
        first, second = (encode(manifest, plain(name), kv_of(manifest))[0] for _ in range(2))
        assert first == second


def test_values_near_the_largest_do_not_become_infinite() -> None:
    manifest = manifest_of(dtype="float16", tokens=128)
    values = kv_of(manifest)
    values[:, 1, :, :, :3] = 0x7BFF
    for name in ("int8kv", "fp8", "int4kv"):
        stored, _ = encode(manifest, plain(name, spare_sections=4), values)
        assert np.isfinite(widen(decoded(manifest, stored, values), SourceType.FLOAT16)).all()

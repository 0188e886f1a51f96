"""Lossless codecs give back every bit: all bfloat16 patterns, adversarial symbols, LZ4 frames."""

from __future__ import annotations

import shutil
import subprocess

import numpy as np
import pytest

from kvstore.compression import native
from kvstore.compression.exp3 import Exp3
from kvstore.compression.lz4frames import Lz4, entropy_bits, is_promising
from kvstore.compression.rans import Rans
from kvstore.compression.shapes import (
    CodecId,
    Encoded,
    Kind,
    SectionCoder,
    SectionShape,
    SourceType,
)
from kvstore.compression.split import merge, split
from kvstore.compression.streams import Coding, normalised, put_streams, streams_of, take_streams
from kvstore.compression.variable_rate import FullError, Reader, Writer
from kvstore.errors import ContainerError
from kvstore.types import HeadRange

EVERY_BF16 = np.arange(1 << 16, dtype=np.uint16)


def shape_of(values: np.ndarray, source: SourceType = SourceType.BFLOAT16) -> SectionShape:
    return SectionShape(Kind.K, source, *values.shape)


def round_trip(coder: SectionCoder, shape: SectionShape, values: np.ndarray) -> Encoded:
    # With as much room as it takes: how much that is, is not the matter here.
    section = np.zeros(2 * shape.raw_bytes + 4096, dtype=np.uint8)
    report = coder.encode(shape, values, section)
    assert report.is_fit
    found = np.zeros_like(values)
    coder.decode(shape, section[: report.size_bytes], found, HeadRange(0, shape.heads))
    assert np.array_equal(found, values)
    return report


# --- exp3 ------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["ascending", "descending", "shuffled", "by exponent"])
def test_exp3_gives_back_every_bfloat16(order: str) -> None:
    rng = np.random.default_rng(0)
    patterns = {
        "ascending": EVERY_BF16,
        "descending": EVERY_BF16[::-1],
        "shuffled": rng.permutation(EVERY_BF16),
        # All values of a channel have one exponent: NaN with every payload, infinities,
        # subnormals and zeros among them.
        "by exponent": EVERY_BF16.reshape(2, 256, 128).transpose(0, 2, 1).copy(),
    }
    values = patterns[order].reshape(-1, 128, 64)
    round_trip(Exp3(), shape_of(values), values)


@pytest.mark.parametrize(
    ("spread", "mode"), [(3, 0), (10, 1), (200, 2)], ids=["exp3", "exp4", "raw"]
)
def test_every_tile_takes_its_shortest_form(spread: int, mode: int) -> None:
    rng = np.random.default_rng(spread)
    exponents = rng.integers(20, 20 + spread, (1, 64, 64))
    values = (exponents << 7 | rng.integers(0, 128, (1, 64, 64))).astype(np.uint16)
    shape = shape_of(values)
    section = np.zeros(2 * shape.raw_bytes, dtype=np.uint8)
    report = Exp3().encode(shape, values, section)
    directory = section[:8].view(np.uint32)
    assert directory[0] % 16 == mode
    assert directory[1] == report.size_bytes
    round_trip(Exp3(), shape, values)


def test_exp3_of_zeros_among_values_lists_them() -> None:
    rng = np.random.default_rng(1)
    values = rng.integers(0x3F00, 0x4000, (2, 70, 48), dtype=np.uint16)
    values[rng.random(values.shape) < 0.02] = 0
    values[rng.random(values.shape) < 0.02] = 0x8000
    report = round_trip(Exp3(), shape_of(values), values)
    assert report.size_bytes < values.nbytes


@pytest.mark.parametrize("source", list(SourceType), ids=lambda source: source.name)
def test_splitting_and_merging_loses_nothing(source: SourceType) -> None:
    rng = np.random.default_rng(2)
    values = rng.integers(0, 256, 1 << 16, dtype=np.uint8).view(source.carrier)
    symbols, rest = split(values, source)
    assert np.array_equal(merge(symbols, rest, source), values)


# --- rans --------------------------------------------------------------------------------------


def adversarial(name: str, count: int = 20_000) -> np.ndarray:
    rng = np.random.default_rng(3)
    made = {
        "one symbol": np.zeros(count, dtype=np.uint8),
        "another symbol": np.full(count, 255, dtype=np.uint8),
        "one and a rare one": np.where(np.arange(count) == 777, 9, 4),
        "two": rng.integers(0, 2, count) * 255,
        "all alike": np.arange(count) % 256,
        "rare ones": np.where(rng.random(count) < 0.01, rng.integers(0, 256, count), 130),
        "every symbol once, then one": np.concatenate([np.arange(256), np.full(count - 256, 7)]),
        "steep": np.minimum(rng.geometric(0.5, count), 255),
        "noise": rng.integers(0, 256, count),
    }
    return made[name].astype(np.uint8)


ADVERSARIAL = (
    "one symbol",
    "another symbol",
    "one and a rare one",
    "two",
    "all alike",
    "rare ones",
    "every symbol once, then one",
    "steep",
    "noise",
)


@pytest.mark.parametrize("name", ADVERSARIAL)
@pytest.mark.parametrize("size", [(1, 20_000, 1), (2, 100, 100), (1, 64, 128), (2, 8193, 1)])
def test_rans_gives_back_adversarial_symbols(name: str, size: tuple[int, int, int]) -> None:
    values = np.resize(adversarial(name), size)
    shape = shape_of(values, SourceType.FLOAT8_E4M3)
    round_trip(Rans(), shape, values)
    # Compiled code gives up where NumPy does, and gives the same bytes where it does not.
    compiled = native.find(CodecId.RANS, shape)
    if compiled is not None:
        sections = np.zeros((2, shape.raw_bytes), dtype=np.uint8)
        reports = [
            coder.encode(shape, values, section)
            for coder, section in zip((Rans(), compiled), sections, strict=True)
        ]
        assert reports[0].is_fit == reports[1].is_fit
        if reports[0].is_fit:
            assert np.array_equal(*sections)
            found = np.zeros_like(values)
            size = reports[1].size_bytes
            compiled.decode(shape, sections[1][:size], found, HeadRange(0, shape.heads))
            assert np.array_equal(found, values)


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_rans_comes_near_the_entropy(name: str) -> None:
    values = adversarial(name).reshape(1, -1, 1)
    report = round_trip(Rans(), shape_of(values, SourceType.FLOAT8_E5M2), values)
    bits = 8 * (report.size_bytes - 512 - 3 * 160) / values.size
    # 4096ths are too coarse for symbols rarer than that; 32 lanes a stream are flushed.
    assert bits < entropy_bits(values) + 0.11


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_frequencies_add_up_and_leave_nobody_out(name: str) -> None:
    counts = np.bincount(adversarial(name), minlength=256)
    frequencies = normalised(counts)
    assert frequencies.sum() == 4096
    assert ((frequencies > 0) == (counts > 0)).all()


def test_a_stream_is_what_the_format_says_symbol_by_symbol() -> None:
    """The format's own words, one symbol at a time, read what the arrays have written."""
    rng = np.random.default_rng(4)
    symbols = np.minimum(rng.geometric(0.3, 700), 12).astype(np.uint8)
    coding = Coding.of(normalised(np.bincount(symbols, minlength=256)))
    section = np.zeros(8192, dtype=np.uint8)
    writer = Writer(section)
    directory = writer.reserve(8).view(np.uint32)
    put_streams(writer, directory, coding, symbols[None])
    stream = section[int(directory[0]) : int(directory[1])]
    count = int(stream[:4].view(np.uint32)[0])
    states = [int(state) for state in stream[16:144].view(np.uint32)]
    words = iter(stream[144 : 144 + 2 * count].view(np.uint16).tolist())
    found = []
    for _ in range(-(-symbols.size // 32)):
        for lane in range(32):
            slot = states[lane] & 4095
            symbol = int(coding.symbols[slot])
            first, frequency = int(coding.starts[symbol]), int(coding.frequencies[symbol])
            states[lane] = frequency * (states[lane] >> 12) + slot - first
            if states[lane] < 1 << 16:
                states[lane] = states[lane] << 16 | next(words)
            found.append(symbol)
    assert found[: symbols.size] == symbols.tolist()
    assert set(found[symbols.size :]) == {int(np.bincount(symbols).argmax())}
    assert states == [1 << 16] * 32
    assert next(words, None) is None


def test_streams_that_are_cut_or_changed_are_refused() -> None:
    symbols = np.resize(adversarial("steep"), (1, 9000))
    coding = Coding.of(normalised(np.bincount(symbols.ravel(), minlength=256)))
    section = np.zeros(20_000, dtype=np.uint8)
    writer = Writer(section)
    directory = writer.reserve(12).view(np.uint32)
    put_streams(writer, directory, coding, symbols)
    section = section[: writer.at]

    def take(octets: np.ndarray) -> np.ndarray:
        reader = Reader(octets, "rans")
        places = reader.directory(streams_of(9000))
        return take_streams(reader, octets, places, coding, 9000, (0, 1))

    assert np.array_equal(take(section), symbols)
    for at in (4, 16, 17, 20, 100, 160, 176, 177, 2000, len(section) - 200):
        changed = section.copy()
        changed[at] ^= 1
        with pytest.raises(ContainerError):
            take(changed)


def test_a_writer_stops_at_its_cap() -> None:
    values = np.random.default_rng(5).integers(0, 1 << 16, (2, 64, 64), dtype=np.uint16)
    shape = shape_of(values)
    for coder in (Exp3(), Rans(), Lz4()):
        section = np.zeros(shape.raw_bytes // 2, dtype=np.uint8)
        assert not coder.encode(shape, values, section).is_fit
    with pytest.raises(FullError):
        Writer(np.zeros(31, dtype=np.uint8)).reserve(17)


# --- lz4 ---------------------------------------------------------------------------------------


def test_lz4_leaves_noise_alone() -> None:
    noise = np.random.default_rng(6).integers(0, 256, (1, 8192, 1), dtype=np.uint8)
    assert not is_promising(noise)
    shape = shape_of(noise, SourceType.FLOAT8_E4M3)
    section = np.zeros(2 * noise.size, dtype=np.uint8)
    assert not Lz4().encode(shape, noise, section).is_fit
    assert entropy_bits(np.zeros(9, dtype=np.uint8)) == 0
    assert entropy_bits(np.arange(256, dtype=np.uint8)) == 8


@pytest.mark.skipif(shutil.which("lz4") is None, reason="the lz4 command is not installed")
def test_the_lz4_command_reads_the_frames() -> None:
    rng = np.random.default_rng(7)
    values = (rng.geometric(0.4, (3, 128, 64)) << 7 | rng.integers(0, 128, (3, 128, 64))).astype(
        np.uint16
    )
    shape = shape_of(values)
    section = np.zeros(values.nbytes, dtype=np.uint8)
    report = Lz4().encode(shape, values, section)
    assert report.is_fit
    places = section[:16].view(np.uint32)
    for head in range(3):
        frame = section[int(places[head]) : int(places[head + 1])].tobytes()
        plain = subprocess.run(
            ["lz4", "-d", "-c"], input=frame, capture_output=True, check=True
        ).stdout
        assert plain == (values[head] >> 7).astype(np.uint8).tobytes()

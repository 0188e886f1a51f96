"""rANS streams: 32 lanes, 32-bit states, 16-bit words, probabilities in 4096ths.

All streams of equal length run side by side, one array operation per step: what a warp does on a
GPU, many at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvstore.compression.shapes import STREAM_SYMBOLS, Bytes, padded
from kvstore.compression.tables import PROBABILITIES
from kvstore.compression.variable_rate import Reader, Writer

LANES: Final = 32
HEAD_BYTES: Final = 16 + 4 * LANES
"""Number of words, padding, and the states."""
LOWEST_STATE: Final = np.uint32(1 << 16)
SLOT_BITS: Final = np.uint32(12)
WORD_BITS: Final = np.uint32(16)
PROBABILITIES_WORD: Final = np.uint32(PROBABILITIES)

Words = NDArray[np.uint32]
Frequencies = NDArray[np.uint16]


def streams_of(symbols: int) -> int:
    """Return how many streams hold *symbols* symbols of a head."""
    return -(-symbols // STREAM_SYMBOLS)


def normalised(counts: NDArray[Any]) -> Frequencies:
    """Return the frequencies of symbols seen *counts* times, as the format lays down."""
    total = int(counts.sum())
    frequencies = np.maximum(counts * PROBABILITIES // total, counts > 0).astype(np.int64)
    missing = PROBABILITIES - int(frequencies.sum())
    if missing > 0:
        frequencies[np.argmax(counts)] += missing
    for _ in range(-missing):
        frequencies[np.argmax(frequencies)] -= 1
    result: Frequencies = frequencies.astype(np.uint16)
    return result


@dataclass(frozen=True)
class Coding:
    """The tables of one set of frequencies, for both directions."""

    frequencies: Words
    starts: Words
    symbols: Bytes
    filling: np.uint8

    @classmethod
    def of(cls, frequencies: Frequencies) -> Coding:
        """Return the tables of *frequencies*, which add up to `PROBABILITIES`."""
        wide = frequencies.astype(np.uint32)
        assert int(wide.sum()) == PROBABILITIES, "the caller checks what comes from outside"
        starts = (np.cumsum(wide) - wide).astype(np.uint32)
        symbols = np.repeat(np.arange(len(wide)), wide).astype(np.uint8)
        return cls(wide, starts, symbols, np.uint8(np.argmax(wide)))


def _encode_group(coding: Coding, symbols: Bytes) -> tuple[NDArray[Any], ...]:
    """Encode `[streams][steps][lanes]`; return states, which steps give words, and the words."""
    streams, steps, _ = symbols.shape
    words = np.empty(symbols.shape, dtype=np.uint16)
    given = np.empty(symbols.shape, dtype=np.bool_)
    states = np.full((streams, LANES), LOWEST_STATE, dtype=np.uint32)
    for step in reversed(range(steps)):
        row = symbols[:, step]
        frequency, start = np.take(coding.frequencies, row), np.take(coding.starts, row)
        gives = (states >> np.uint32(20)) >= frequency
        words[:, step] = states
        given[:, step] = gives
        states = np.where(gives, states >> WORD_BITS, states)
        # x / f * 4096 + x % f + c is x + x / f * (4096 - f) + c.
        states = states + states // frequency * (PROBABILITIES_WORD - frequency) + start
    return states, given, words


def put_streams(writer: Writer, directory: Words, coding: Coding, symbols: Bytes) -> None:
    """Append the streams of *symbols* `[heads][count]` and put their places in *directory*.

    The directory is filled up to its last entry, where they end. Raises `FullError`.
    """
    heads, count = symbols.shape
    whole = count // STREAM_SYMBOLS
    groups: list[Any] = []
    if whole:
        form = (heads * whole, -1, LANES)
        groups.append(_encode_group(coding, symbols[:, : whole * STREAM_SYMBOLS].reshape(form)))
    if count > whole * STREAM_SYMBOLS:
        rest = symbols[:, whole * STREAM_SYMBOLS :]
        steps = -(-rest.shape[1] // LANES)
        last = np.full((heads, steps * LANES), coding.filling, dtype=np.uint8)
        last[:, : rest.shape[1]] = rest
        groups.append(_encode_group(coding, last.reshape(heads, steps, LANES)))
    per_head = streams_of(count)
    for index in range(heads * per_head):
        head, stream = divmod(index, per_head)
        group, place = (groups[0], head * whole + stream) if stream < whole else (groups[-1], head)
        states, given, words = (part[place] for part in group)
        directory[index] = writer.at
        chosen = words[given]
        room = writer.reserve(HEAD_BYTES + 2 * chosen.size)
        room[:16].view(np.uint32)[:] = (chosen.size, 0, 0, 0)
        room[16:HEAD_BYTES].view(np.uint32)[:] = states
        room[HEAD_BYTES:].view(np.uint16)[:] = chosen
    directory[heads * per_head] = writer.at


@dataclass(frozen=True)
class _Placed:
    """Where the words of streams lie among all 16-bit words of a section."""

    states: Words
    first: NDArray[np.int64]
    stop: NDArray[np.int64]


def _find_streams(reader: Reader, source: Bytes, places: Words, indices: NDArray[Any]) -> _Placed:
    """Check and read the heads of the streams *indices* of a directory."""
    starts = places[indices].astype(np.int64)
    ends = places[indices + 1].astype(np.int64)
    if (starts % 16 != 0).any() or (ends > len(source)).any() or (ends - starts < HEAD_BYTES).any():
        raise reader.broken("has a stream that lies outside of it")
    heads = source[starts[:, None] + np.arange(HEAD_BYTES)]
    counts = heads[:, :4].copy().view(np.uint32)[:, 0].astype(np.int64)
    if (heads[:, 4:16] != 0).any() or (padded_all(HEAD_BYTES + 2 * counts) != ends - starts).any():
        raise reader.broken("has a stream that is not as long as it says")
    first = (starts + HEAD_BYTES) // 2
    return _Placed(heads[:, 16:].copy().view(np.uint32), first, first + counts)


def padded_all(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return every one of *sizes* rounded up to the alignment of parts."""
    return -(-sizes // padded(1)) * padded(1)


def _decode_group(
    reader: Reader, coding: Coding, words: NDArray[np.uint16], placed: _Placed, steps: int
) -> Bytes:
    """Return the symbols `[streams][steps][lanes]`."""
    states, at = placed.states, placed.first.copy()
    symbols = np.empty((len(at), steps, LANES), dtype=np.uint8)
    frequency_of = coding.frequencies[coding.symbols]
    above = np.arange(PROBABILITIES, dtype=np.uint32) - coding.starts[coding.symbols]
    for step in range(steps):
        slot = states & np.uint32(PROBABILITIES - 1)
        np.take(coding.symbols, slot, out=symbols[:, step])
        states = np.take(frequency_of, slot) * (states >> SLOT_BITS) + np.take(above, slot)
        needs = states < LOWEST_STATE
        ranks = np.cumsum(needs, axis=1)
        # Behind the last word there is a stream that does not decode, which is found out below.
        chosen = np.take(words, at[:, None] + (ranks - 1), mode="clip")
        states = np.where(needs, states << WORD_BITS | chosen, states)
        at += ranks[:, -1]
    if (at != placed.stop).any() or (states != LOWEST_STATE).any():
        raise reader.broken("has a stream that does not decode")
    return symbols


def take_streams(
    reader: Reader,
    source: Bytes,
    places: Words,
    coding: Coding,
    count: int,
    heads: tuple[int, int],
) -> Bytes:
    """Return the symbols `[heads][count]` of heads [start, stop); raises `ContainerError`.

    *places* is the directory of all streams of the section.
    """
    start, stop = heads
    per_head, whole = streams_of(count), count // STREAM_SYMBOLS
    symbols = np.empty((stop - start, count), dtype=np.uint8)
    even = source[: len(source) // 2 * 2]
    words = np.ascontiguousarray(even).view(np.uint16)
    firsts = np.arange(start, stop)[:, None] * per_head
    if whole:
        indices = (firsts + np.arange(whole)).ravel()
        placed = _find_streams(reader, source, places, indices)
        decoded = _decode_group(reader, coding, words, placed, STREAM_SYMBOLS // LANES)
        symbols[:, : whole * STREAM_SYMBOLS] = decoded.reshape(stop - start, -1)
    rest = count - whole * STREAM_SYMBOLS
    if rest:
        placed = _find_streams(reader, source, places, firsts.ravel() + whole)
        decoded = _decode_group(reader, coding, words, placed, -(-rest // LANES))
        flat = decoded.reshape(stop - start, -1)
        if (flat[:, rest:] != coding.filling).any():
            raise reader.broken("has a stream that is not filled up as it should be")
        symbols[:, whole * STREAM_SYMBOLS :] = flat[:, :rest]
    return symbols

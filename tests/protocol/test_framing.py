"""Frames: cut at any point, judged by their length before their body, never more than one kept."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from kvstore.errors import FrameError
from kvstore.limits import FRAME_SIZE_MAX_BYTES
from kvstore.protocol import messages as m
from kvstore.protocol.framing import HEADER_SIZE_BYTES, FrameReader, frame
from tests.support.goldens import ALL, golden_bytes


def framed(body: bytes) -> bytes:
    return len(body).to_bytes(4, "little") + body


def test_a_frame_is_a_little_endian_length_and_the_message():
    assert frame(m.Stats(12, 600_000)) == framed(golden_bytes("stats"))
    assert frame(m.Stats(1, 1)).hex() == "04000000" + "930c0101"


def test_a_message_over_the_limit_is_not_sent():
    with pytest.raises(FrameError, match=f"at most {FRAME_SIZE_MAX_BYTES} allowed"):
        frame(m.Pong(1, bytes(FRAME_SIZE_MAX_BYTES)))


@given(st.lists(st.sampled_from(sorted(ALL)), max_size=6), st.data())
def test_frames_come_out_as_they_went_in_wherever_the_stream_is_cut(names, data):
    bodies = [golden_bytes(name) for name in names]
    stream = b"".join(map(framed, bodies))
    reader, found, at = FrameReader(), [], 0
    while at < len(stream):
        step = data.draw(st.integers(1, len(stream) - at))
        found += reader.feed(stream[at : at + step])
        at += step
    assert found == bodies


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_kind_of_bytes_can_be_fed(kind):
    assert list(FrameReader().feed(kind(framed(b"abc")))) == [b"abc"]


@pytest.mark.parametrize("length", [0, FRAME_SIZE_MAX_BYTES + 1, 2**32 - 1])
def test_a_length_out_of_range_is_refused_before_any_of_the_body_is_there(length):
    reader = FrameReader()
    assert list(reader.feed(length.to_bytes(4, "little")[:3])) == []
    with pytest.raises(FrameError, match=rf"frame of {length} bytes, .* {FRAME_SIZE_MAX_BYTES}\]"):
        list(reader.feed(length.to_bytes(4, "little")[3:]))


def test_frames_before_a_broken_one_still_come_out():
    bodies = FrameReader().feed(framed(b"good") + bytes(4))
    assert next(bodies) == b"good"
    with pytest.raises(FrameError):
        next(bodies)


def test_the_largest_frame_passes():
    body = bytes(FRAME_SIZE_MAX_BYTES)
    assert list(FrameReader().feed(framed(body))) == [body]


def test_a_reader_that_stops_half_way_goes_on_behind_what_it_took():
    reader = FrameReader()
    bodies = reader.feed(framed(b"one") + framed(b"two") + framed(b"three")[:5])
    assert next(bodies) == b"one"
    bodies.close()
    assert list(reader.feed(framed(b"three")[5:])) == [b"two", b"three"]


def test_a_reader_keeps_no_more_than_what_is_incomplete():
    reader = FrameReader()
    list(reader.feed(framed(bytes(1000)) * 50 + b"\x07\x00"))
    assert len(reader._rest) == 2 < HEADER_SIZE_BYTES

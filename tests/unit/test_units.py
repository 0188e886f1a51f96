"""Sizes and durations: what is accepted, what is refused with which words, and the way back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
from hypothesis import given, strategies as st

from kvstore.units import format_duration, format_size, parse_duration, parse_size, round_size


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("4096", 4096),
        ("12B", 12),
        ("1KiB", 1024),
        ("64GiB", 64 * 2**30),
        ("64 GiB", 64 * 2**30),
        ("64gib", 64 * 2**30),
        (" 1.5GiB ", 3 * 2**29),
        ("2TiB", 2**41),
        ("1kB", 1000),
        ("3MB", 3_000_000),
        ("1GB", 10**9),
        ("1TB", 10**12),
    ],
)
def test_a_size_is_read(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1GiB", "1GiBs", "1 G", "64Gi", "1,5GiB", "1e3", "0x10", "1 GiB 2", "٣GiB"]
)
def test_what_is_no_size_is_refused_with_the_text_and_the_forms(text: str) -> None:
    with pytest.raises(ValueError, match="GiB") as caught:
        parse_size(text)
    assert repr(text) in str(caught.value)
    assert "such as 64GiB" in str(caught.value)


def test_a_fraction_of_a_byte_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'0.3KiB' is not a whole number of bytes"):
        parse_size("0.3KiB")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0.0), ("10s", 10.0), ("250ms", 0.25), ("1.5 s", 1.5), ("2min", 120.0), ("1H", 3600.0)],
)
def test_a_duration_is_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "s", "-1s", "1m", "10 secs", "1s 2ms", "inf", "nan"])
def test_what_is_no_duration_is_refused_with_the_text_and_the_forms(text: str) -> None:
    with pytest.raises(ValueError, match="such as 250ms") as caught:
        parse_duration(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0B"), (1023, "1023B"), (1024, "1KiB"), (1536 * 2**20, "1536MiB"), (2**44, "16TiB")],
)
def test_a_size_is_written_exactly_in_the_largest_whole_unit(size_bytes: int, text: str) -> None:
    assert format_size(size_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0s"), (0.25, "250ms"), (1.0, "1s"), (90.0, "90s"), (60.0, "1min"), (3600.0, "1h")],
)
def test_a_duration_is_written_in_the_largest_whole_unit(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.50 KiB"),
        (10 * 2**20, "10.0 MiB"),
        (2**30 - 1, "1.00 GiB"),
        (int(123.4 * 2**30), "123 GiB"),
        (2000 * 2**40, "2000 TiB"),
    ],
)
def test_a_rounded_size_has_three_digits(size_bytes: int, text: str) -> None:
    assert round_size(size_bytes) == text


@given(st.integers(0, 2**64))
def test_every_size_survives_writing_and_reading(size_bytes: int) -> None:
    assert parse_size(format_size(size_bytes)) == size_bytes


@given(st.integers(0, 10**9))
def test_every_whole_number_of_milliseconds_survives_writing_and_reading(milliseconds: int) -> None:
    seconds = milliseconds / 1000
    assert parse_duration(format_duration(seconds)) == seconds


@given(st.text(max_size=20))
@pytest.mark.parametrize("parse", [parse_size, parse_duration])
def test_any_text_gives_a_value_or_a_value_error(parse: Callable[[str], float], text: str) -> None:
    with contextlib.suppress(ValueError):
        assert parse(text) >= 0

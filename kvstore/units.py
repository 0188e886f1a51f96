"""Sizes and durations as people write them: `64GiB`, `250ms`.

Sizes are whole bytes, durations are seconds. What `format_*` writes, `parse_*` reads back to
the same value.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Final

SIZE_FORMS: Final = "a number and B, KiB, MiB, GiB, TiB, kB, MB, GB or TB, such as 64GiB"
DURATION_FORMS: Final = "a number and ms, s, min, h or d, such as 250ms"

_SIZE_UNITS: Final = {
    "tib": 2**40,
    "gib": 2**30,
    "mib": 2**20,
    "kib": 2**10,
    "tb": 10**12,
    "gb": 10**9,
    "mb": 10**6,
    "kb": 10**3,
    "b": 1,
    "": 1,
}
_BINARY_NAMES: Final = ("TiB", "GiB", "MiB", "KiB")
_DURATION_UNITS: Final = {
    "d": Decimal(86_400),
    "h": Decimal(3600),
    "min": Decimal(60),
    "s": Decimal(1),
    "ms": Decimal("0.001"),
}
_QUANTITY: Final = re.compile(r"\s*([0-9]{1,20}(?:\.[0-9]{1,12})?)\s*([A-Za-z]*)\s*")


def parse_size(text: str) -> int:
    """Return the bytes that *text* stands for; a bare number counts bytes.

    Raises `ValueError` that names the text and the accepted forms.
    """
    number, unit = _split(text, SIZE_FORMS)
    factor = _SIZE_UNITS.get(unit.lower())
    if factor is None:
        raise ValueError(f"{text!r} is not a size; write {SIZE_FORMS}")
    size = number * factor
    if size != int(size):
        raise ValueError(f"{text!r} is not a whole number of bytes")
    return int(size)


def format_size(size_bytes: int) -> str:
    """Return *size_bytes* exactly, in the largest unit that divides it: `1536MiB`."""
    for name in _BINARY_NAMES:
        factor = _SIZE_UNITS[name.lower()]
        if size_bytes >= factor and size_bytes % factor == 0:
            return f"{size_bytes // factor}{name}"
    return f"{size_bytes}B"


def round_size(size_bytes: float) -> str:
    """Return *size_bytes* for a person to read, to three digits: `1.46 GiB`."""
    for name in _BINARY_NAMES:
        factor = _SIZE_UNITS[name.lower()]
        # 1023.5 MiB would round to 1024: the next unit says it better.
        if size_bytes >= factor * 0.9995:
            return f"{_three_digits(size_bytes / factor)} {name}"
    return f"{size_bytes:.0f} B"


def parse_duration(text: str) -> float:
    """Return the seconds that *text* stands for; a bare number other than 0 is refused.

    Raises `ValueError` that names the text and the accepted forms.
    """
    number, unit = _split(text, DURATION_FORMS)
    if not unit and number == 0:
        return 0.0
    factor = _DURATION_UNITS.get(unit.lower())
    if factor is None:
        raise ValueError(f"{text!r} is not a duration; write {DURATION_FORMS}")
    return float(number * factor)


def format_duration(seconds: float) -> str:
    """Return *seconds* exactly, in the largest unit that gives a whole number: `90s`."""
    exact = Decimal(repr(seconds))
    for name, factor in _DURATION_UNITS.items():
        if exact >= factor and exact % factor == 0:
            return f"{(exact / factor).normalize():f}{name}"
    return f"{exact.normalize():f}s"


def _split(text: str, forms: str) -> tuple[Decimal, str]:
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not understood; write {forms}")
    return Decimal(match[1]), match[2]


def _three_digits(value: float) -> str:
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f}"

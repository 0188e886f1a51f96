"""KL against bits per value as an SVG, without a library: a line per codec from level to level."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple
from xml.sax.saxutils import escape

WIDTH: Final = 860
HEIGHT: Final = 560
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 40, 50
_BITS: Final = (2.0, 9.0)
_LEAST_KL: Final = 1e-7
_MOST_KL: Final = 10.0
_OURS, _THEIRS, _GRID, _INK = "#1769aa", "#c0392b", "#dddddd", "#333333"
_LABEL_GAP: Final = 13
_HEAD: Final = (
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"'
    ' font-family="sans-serif" font-size="12">'
)


class Dot(NamedTuple):
    """A codec: its bits, and its KL without outliers and with them."""

    name: str
    is_ours: bool
    bits: float
    calm: float
    outliers: float


def draw(dots: Sequence[Dot], level: int) -> str:
    """Return the plot; *level* is that of the outliers. Codecs beyond the axes are left out."""
    shown = [dot for dot in dots if _BITS[0] <= dot.bits <= _BITS[1] and dot.outliers > 0]
    parts = [
        _HEAD,
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        *_axes(),
        *_legend(level),
        *(_dot(dot) for dot in shown),
        *_labels(shown),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _axes() -> list[str]:
    lines = []
    for power in range(round(math.log10(_LEAST_KL)), round(math.log10(_MOST_KL)) + 1):
        y = _y(10.0**power)
        lines.append(_line(_LEFT, y, WIDTH - _RIGHT, y, _GRID))
        lines.append(_text(_LEFT - 8, y + 4, f"1e{power}", anchor="end"))
    for bits in range(int(_BITS[0]), int(_BITS[1]) + 1):
        x = _x(bits)
        lines.append(_line(x, _TOP, x, HEIGHT - _BOTTOM, _GRID))
        lines.append(_text(x, HEIGHT - _BOTTOM + 18, str(bits), anchor="middle"))
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    lines.append(_text(middle, HEIGHT - 12, "bits per value, scales included", anchor="middle"))
    lines.append(_text(12, _TOP - 14, "KL, nats per byte: less is better"))
    return lines


def _legend(level: int) -> list[str]:
    x = WIDTH - _RIGHT - 420
    return [
        _text(x, _TOP - 14, "kvstore", color=_OURS),
        _text(x + 60, _TOP - 14, "others", color=_THEIRS),
        _text(x + 115, _TOP - 14, f"hollow: keys as they are; solid: outliers of level {level}"),
    ]


def _dot(dot: Dot) -> str:
    x, color = _x(dot.bits), _OURS if dot.is_ours else _THEIRS
    calm, outliers = _y(dot.calm), _y(dot.outliers)
    return (
        _line(x, calm, x, outliers, color)
        + f'<circle cx="{x:.1f}" cy="{calm:.1f}" r="4" fill="white" stroke="{color}"/>'
        + f'<circle cx="{x:.1f}" cy="{outliers:.1f}" r="4" fill="{color}"/>'
    )


def _labels(dots: Sequence[Dot]) -> list[str]:
    """Return names beside the solid dots, moved down where they would lie over each other."""
    taken: list[tuple[float, float]] = []
    found = []
    for dot in sorted(dots, key=lambda dot: (_y(dot.outliers), dot.bits)):
        x, y = _x(dot.bits) + 8, _y(dot.outliers) + 4
        reach = 6.2 * len(dot.name) + 12
        while any(abs(x - at) < reach and abs(y - height) < _LABEL_GAP for at, height in taken):
            y += _LABEL_GAP / 2
        taken.append((x, y))
        is_far_right = x + reach > WIDTH - _RIGHT
        place, anchor = (x - 16, "end") if is_far_right else (x, "start")
        found.append(_text(place, y, dot.name, anchor, _OURS if dot.is_ours else _THEIRS))
    return found


def _x(bits: float) -> float:
    share = (bits - _BITS[0]) / (_BITS[1] - _BITS[0])
    return _LEFT + share * (WIDTH - _LEFT - _RIGHT)


def _y(kl: float) -> float:
    share = math.log(max(kl, _LEAST_KL) / _LEAST_KL) / math.log(_MOST_KL / _LEAST_KL)
    return HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM)


def _line(x1: float, y1: float, x2: float, y2: float, color: str) -> str:
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="{color}"/>'


def _text(x: float, y: float, text: str, anchor: str = "start", color: str = _INK) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}">{escape(text)}</text>'
    )

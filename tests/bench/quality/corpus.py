"""What the small model reads: Python's standard library, and sequences that need a memory.

Text alone teaches a small model little use of a distant prefix. Copies and look-ups of named
values do, and a codec that spoils the prefix spoils them first.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

TOKENS: Final = 512
"""Bytes in one sequence."""

_LETTERS: Final = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8)
_DIGITS: Final = np.frombuffer(b"0123456789", np.uint8)
# Every 16th file is kept out of training.
_HELD_OUT_EVERY: Final = 16

Bytes = NDArray[np.uint8]


def standard_library(*, held_out: bool) -> Bytes:
    """Return all sources, or those that training never sees, in the order of their names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in root.rglob("*.py") if _is_source(path.relative_to(root)))
    chosen = [
        path for number, path in enumerate(files) if (number % _HELD_OUT_EVERY == 0) == held_out
    ]
    return np.frombuffer(b"\n".join(path.read_bytes() for path in chosen), np.uint8)


def text(source: Bytes, chance: np.random.Generator) -> Bytes:
    """Return a piece of *source*."""
    start = int(chance.integers(len(source) - TOKENS))
    return source[start : start + TOKENS]


def copy(source: Bytes, chance: np.random.Generator) -> Bytes:
    """Return a stretch of text or of letters, again and again."""
    period = int(chance.integers(24, TOKENS // 2 + 1))
    if chance.random() < 0.5:
        piece = text(source, chance)[:period]
    else:
        piece = chance.choice(_LETTERS, period)
    return np.resize(piece, TOKENS)


def assignments(chance: np.random.Generator, names: int = 16) -> list[tuple[bytes, bytes]]:
    """Return random names, all different in their first letters, with values of four digits."""
    pairs: dict[bytes, bytes] = {}
    while len(pairs) < names:
        pairs[chance.choice(_LETTERS, 4).tobytes()] = chance.choice(_DIGITS, 4).tobytes()
    return list(pairs.items())


def retrieval(chance: np.random.Generator) -> Bytes:
    """Return lines `name=value`, those of a few names over and over in changing order."""
    pairs = assignments(chance, int(chance.integers(4, 24)))
    lines = b""
    while len(lines) < TOKENS:
        order = chance.permutation(len(pairs))
        lines += b"".join(pairs[i][0] + b"=" + pairs[i][1] + b"\n" for i in order)
    return np.frombuffer(lines[:TOKENS], np.uint8)


def batches(source: Bytes, seed: int, batch: int) -> Iterator[Bytes]:
    """Yield `[batch, TOKENS]` for ever: half text, a quarter copies, a quarter look-ups."""
    chance = np.random.default_rng(seed)
    while True:
        rows = [text(source, chance) for _ in range(batch - 2 * (batch // 4))]
        rows += [copy(source, chance) for _ in range(batch // 4)]
        rows += [retrieval(chance) for _ in range(batch // 4)]
        yield np.stack(rows)


def _is_source(path: Path) -> bool:
    return not {"test", "tests", "site-packages", "idlelib", "encodings"} & set(path.parts)

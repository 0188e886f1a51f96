"""What the small model reads: Python's standard library, and sequences that need a memory.

Text alone teaches a small model little use of a distant prefix. Repetitions and look-ups of named
values do, and a codec that spoils the prefix spoils them first.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

SOURCE: Final = "the sources of Python's standard library (PSF licence)"
"""What the weights in the repository have read."""

NAMES: Final = 40
"""Names of a look-up in the bench; a prefix of 256 bytes gives each of them at least twice."""

_PRINTABLE: Final = np.arange(32, 127, dtype=np.uint8)
_LETTERS: Final = np.frombuffer(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", np.uint8)
_DIGITS: Final = np.frombuffer(b"0123456789", np.uint8)
_SPACE: Final = ord(" ")
_LINE_BYTES: Final = 3
# Every 16th file is kept out of training.
_HELD_OUT_EVERY: Final = 16

Bytes = NDArray[np.uint8]


class Sample(NamedTuple):
    """A sequence, and which of its bytes can be foretold at all."""

    tokens: Bytes
    is_asked: NDArray[np.bool_]


def standard_library(*, held_out: bool) -> Bytes:
    """Return all sources, or those that training never sees, in the order of their names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in root.rglob("*.py") if _is_source(path.relative_to(root)))
    chosen = [
        path for number, path in enumerate(files) if (number % _HELD_OUT_EVERY == 0) == held_out
    ]
    return np.frombuffer(b"\n".join(path.read_bytes() for path in chosen), np.uint8)


def text(source: Bytes, chance: np.random.Generator, tokens: int) -> Sample:
    """Return a piece of *source*."""
    start = int(chance.integers(len(source) - tokens))
    return Sample(source[start : start + tokens], np.ones(tokens, bool))


def copy(source: Bytes, chance: np.random.Generator, tokens: int) -> Sample:
    """Return a stretch of text again and again; asked is what was there before."""
    period = int(chance.integers(8, tokens // 2 + 1))
    return _repeated(text(source, chance, period).tokens, tokens)


def repetition(chance: np.random.Generator, tokens: int) -> Sample:
    """Return a stretch of random bytes again and again, of few different ones or of many."""
    period = int(chance.integers(4, tokens // 2 + 1))
    alphabet = chance.permutation(_PRINTABLE)[: int(chance.integers(12, len(_PRINTABLE) + 1))]
    if period <= len(alphabet) and chance.random() < 0.5:
        return _repeated(chance.permutation(alphabet)[:period], tokens)
    return _repeated(chance.choice(alphabet, period), tokens)


def look_ups(chance: np.random.Generator, tokens: int, names: int | None = None) -> Sample:
    """Return `a7 Q2 ...`: names with their values, all of them over and over in changing order.

    Asked are the values of names that were there before.
    """
    count = names or int(chance.integers(2, min(NAMES, tokens // (2 * _LINE_BYTES)) + 1))
    lines = np.full((count, _LINE_BYTES), _SPACE, np.uint8)
    lines[:, 0] = chance.permutation(_LETTERS)[:count]
    lines[:, 1] = chance.choice(_DIGITS, count)
    rounds = -(-tokens // (_LINE_BYTES * count))
    order = np.concatenate([chance.permutation(count) for _ in range(rounds)])
    is_asked = np.zeros((len(order), _LINE_BYTES), bool)
    is_asked[count:, 1] = True
    return Sample(lines[order].ravel()[:tokens], is_asked.ravel()[:tokens])


def needles(chance: np.random.Generator, prefix: int) -> Sample:
    """Return look-ups of which the part behind *prefix* names every name once.

    So each answer lies in the prefix and nowhere else.
    """
    before = look_ups(chance, prefix // _LINE_BYTES * _LINE_BYTES, NAMES).tokens
    # Bytes that are left over go to the front, where they are harmless.
    padding = np.full(prefix - len(before), _SPACE, np.uint8)
    lines = before.reshape(-1, _LINE_BYTES)[:NAMES]
    asked = chance.permutation(lines)
    is_asked = np.zeros((prefix + asked.size), bool)
    is_asked[prefix + 1 :: _LINE_BYTES] = True
    return Sample(np.concatenate((padding, before, asked.ravel())), is_asked)


def batch(kinds: list[str], source: Bytes, chance: np.random.Generator, tokens: int) -> Sample:
    """Return a sequence of each of *kinds*, stacked."""
    make: dict[str, Callable[[], Sample]] = {
        "text": lambda: text(source, chance, tokens),
        "copy": lambda: copy(source, chance, tokens),
        "repetition": lambda: repetition(chance, tokens),
        "look-up": lambda: look_ups(chance, tokens),
    }
    rows = [make[kind]() for kind in kinds]
    return Sample(np.stack([row.tokens for row in rows]), np.stack([row.is_asked for row in rows]))


def _repeated(piece: Bytes, tokens: int) -> Sample:
    # The first byte of a repetition comes as a surprise.
    return Sample(np.resize(piece, tokens), np.arange(tokens) > len(piece))


def _is_source(path: Path) -> bool:
    return not {"test", "tests", "site-packages", "idlelib", "encodings"} & set(path.parts)

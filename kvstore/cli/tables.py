"""Plain columns of text."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def align(rows: Sequence[Sequence[str]], *, right: Collection[int] = ()) -> list[str]:
    """Return one line a row, with its cells in columns; columns in *right* end flush.

    What a terminal would obey instead of showing it is replaced: names come from clients.
    """
    cells = [[_printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = (
        "  ".join(
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    )
    return [line.rstrip() for line in lines]


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)

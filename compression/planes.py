"""Row planes: how codes of 1, 2 and 4 bits share bytes.

Within a tile of 64 rows, byte row q holds the rows q, q + Q, q + 2Q ... so that rows stay
contiguous over channels and unpacking is a shift and a mask of whole rows.
"""

from __future__ import annotations

import numpy as np

from kvstore.compression.shapes import TILE_TOKENS, Bytes, plane_rows


def pack_rows(codes: Bytes, bits: int) -> Bytes:
    """Return the byte rows `[heads][rows][dim]` of *codes* `[heads][tokens][dim]`.

    Codes are below 2 ** *bits*.
    """
    heads, tokens, dim = codes.shape
    fields = 8 // bits
    whole = tokens // TILE_TOKENS * TILE_TOKENS
    planes = np.empty((heads, plane_rows(tokens, bits), dim), dtype=np.uint8)
    rows_of_tile = TILE_TOKENS // fields
    if whole:
        tiles = codes[:, :whole].reshape(heads, -1, fields, rows_of_tile, dim)
        into = planes[:, : whole // fields].reshape(heads, -1, rows_of_tile, dim)
        _fold(tiles, bits, into)
    if tokens > whole:
        rest = planes[:, whole // fields :]
        rows = rest.shape[1]
        last = np.zeros((heads, fields * rows, dim), dtype=np.uint8)
        last[:, : tokens - whole] = codes[:, whole:]
        _fold(last.reshape(heads, fields, rows, dim), bits, rest)
    return planes


def unpack_rows(planes: Bytes, bits: int, tokens: int) -> Bytes:
    """Return the codes `[heads][tokens][dim]` that `pack_rows` packed into *planes*."""
    heads, _, dim = planes.shape
    fields = 8 // bits
    whole = tokens // TILE_TOKENS * TILE_TOKENS
    codes = np.empty((heads, tokens, dim), dtype=np.uint8)
    rows_of_tile = TILE_TOKENS // fields
    if whole:
        tiles = planes[:, : whole // fields].reshape(heads, -1, rows_of_tile, dim)
        into = codes[:, :whole].reshape(heads, -1, fields, rows_of_tile, dim)
        _unfold(tiles, bits, into)
    if tokens > whole:
        rest = planes[:, whole // fields :]
        rows = rest.shape[1]
        last = np.empty((heads, fields, rows, dim), dtype=np.uint8)
        _unfold(rest, bits, last)
        codes[:, whole:] = last.reshape(heads, fields * rows, dim)[:, : tokens - whole]
    return codes


def _fold(fields: Bytes, bits: int, into: Bytes) -> None:
    """Or the fields of the third axis from the last into one byte each."""
    into[...] = fields[..., 0, :, :]
    for index in range(1, 8 // bits):
        into |= fields[..., index, :, :] << np.uint8(index * bits)


def _unfold(packed: Bytes, bits: int, into: Bytes) -> None:
    mask = np.uint8((1 << bits) - 1)
    for index in range(8 // bits):
        field = into[..., index, :, :]
        np.right_shift(packed, np.uint8(index * bits), out=field)
        field &= mask

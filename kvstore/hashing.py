"""Keys of chunks and checksums of their bytes.

Keys: `digest_i = SHA-256(digest_{i-1} || token ids of chunk i as u32 little-endian || extras_i)`.
The parent of the first chunk is absent, or the *scope*. For plain unscoped text this is the
chain that SGLang computes for its pages.

Checksums: a tree of two levels. Every 64 KiB block of a chunk has its XXH3-64; the *root* is
the XXH3-64 of the block digests as u64 little-endian. A range is verified from its own blocks.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import xxhash

from kvstore.errors import RequestError
from kvstore.limits import (
    CHECKSUM_BLOCK_BYTES,
    CHECKSUM_SIZE_BYTES,
    EXTRA_SIZE_MAX_BYTES,
    TOKEN_ID_MAX,
)
from kvstore.types import BytesLike, Digest, Root

Digests64 = npt.NDArray[np.uint64]

_TABLE_ALIGNMENT_BYTES: Final = 64


def chunk_digests(
    token_ids: Sequence[int] | npt.NDArray[np.integer],
    chunk_tokens: int,
    *,
    scope: Digest | None = None,
    extras: Sequence[Iterable[bytes]] | None = None,
) -> list[Digest]:
    """Return the digest of every whole chunk of *token_ids*; a partial tail has none.

    Equal digests mean equal prefixes: each covers all tokens before it. *extras* gives, chunk
    by chunk, the content hashes of what the tokens stand for (images, audio, embeddings).

    Raises `RequestError` when a token id does not fit 32 bits or an extra is too long.
    """
    packed = _pack_tokens(token_ids)
    step = chunk_tokens * 4
    parent = scope if scope is not None else b""
    digests: list[Digest] = []
    for index in range(len(packed) // step):
        digest = hashlib.sha256(parent)
        digest.update(packed[index * step : (index + 1) * step])
        if extras is not None and index < len(extras):
            digest.update(_pack_fields(extras[index]))
        parent = digest.digest()
        digests.append(Digest(parent))
    return digests


def scope_digest(
    *, adapter: str = "", adapter_revision: str = "", salt: bytes = b""
) -> Digest | None:
    """Return the parent of a first chunk, or None when nothing sets this prefix apart.

    The scope keeps prefixes of different adapters and of different tenant salts from ever
    meeting inside one namespace.
    """
    fields = (adapter.encode(), adapter_revision.encode(), salt)
    if not any(fields):
        return None
    return Digest(hashlib.sha256(b"kvstore-scope-1" + _pack_fields(fields)).digest())


def _pack_tokens(token_ids: Sequence[int] | npt.NDArray[np.integer]) -> memoryview:
    ids = np.asarray(_packed(token_ids) if isinstance(token_ids, list) else token_ids)
    if ids.size == 0:
        return memoryview(b"")
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise RequestError(
            f"token ids must be a flat list of integers, got {ids.dtype} {ids.shape}"
        )
    if int(ids.min()) < 0 or int(ids.max()) > TOKEN_ID_MAX:
        raise RequestError(f"token ids must lie in [0, {TOKEN_ID_MAX}]")
    return memoryview(ids.astype("<u4", copy=False).tobytes())


def _packed(token_ids: list[int]) -> array[int]:
    """Pack a list as it comes from a tokenizer; numpy alone would take three times as long."""
    try:
        return array("I", token_ids)
    except (TypeError, OverflowError) as error:
        raise RequestError(f"token ids must be integers in [0, {TOKEN_ID_MAX}]: {error}") from error


def _pack_fields(fields: Iterable[bytes]) -> bytes:
    """Join *fields* so that no two different lists give the same bytes."""
    parts: list[bytes] = []
    for field in fields:
        if len(field) > EXTRA_SIZE_MAX_BYTES:
            raise RequestError(
                f"an extra has {len(field)} bytes, at most {EXTRA_SIZE_MAX_BYTES} allowed"
            )
        parts += [len(field).to_bytes(4, "little"), field]
    return b"".join(parts)


def block_count(size_bytes: int) -> int:
    """Return how many checksum blocks *size_bytes* make."""
    return -(-size_bytes // CHECKSUM_BLOCK_BYTES)


def table_offset(size_bytes: int) -> int:
    """Return where the block digests of a stored chunk of *size_bytes* begin: behind its bytes."""
    return -(-size_bytes // _TABLE_ALIGNMENT_BYTES) * _TABLE_ALIGNMENT_BYTES


def stored_size(size_bytes: int) -> int:
    """Return how many bytes a chunk of *size_bytes* and its block digests take together."""
    return table_offset(size_bytes) + block_count(size_bytes) * CHECKSUM_SIZE_BYTES


def block_digests(payload: BytesLike) -> Digests64:
    """Return the XXH3-64 of every 64 KiB block of *payload* (the last may be shorter)."""
    view = memoryview(payload).cast("B")
    starts = range(0, len(view), CHECKSUM_BLOCK_BYTES)
    values = [xxhash.xxh3_64_intdigest(view[at : at + CHECKSUM_BLOCK_BYTES]) for at in starts]
    return np.array(values, dtype="<u8")


def root_of(blocks: Digests64) -> Root:
    """Return the root over *blocks* (u64)."""
    return Root(xxhash.xxh3_64_intdigest(np.ascontiguousarray(blocks, dtype="<u8").tobytes()))

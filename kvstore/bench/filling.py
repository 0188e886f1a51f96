"""An index with as many chunks as wanted: reserved and committed through a client, never written.

Chunks are opaque and tiny, checksums are off and the arena is not prefaulted, so a million of
them cost the daemon its index and next to no memory of the arena.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final

from kvstore.limits import EXTENT_ALIGNMENT_BYTES, KEYS_PER_REQUEST_MAX, MIB
from kvstore.protocol.manifest import Manifest
from kvstore.types import Digest

if TYPE_CHECKING:
    from kvstore.client.sync import Space

CHUNK_TOKENS: Final = 256
MANIFEST: Final = Manifest(
    model="kvstore-bench/look-up",
    revision="1",
    dtype="opaque",
    layout="opaque",
    layers=1,
    kv_heads=1,
    head_dim=1,
    chunk_tokens=CHUNK_TOKENS,
    opaque_bytes=EXTENT_ALIGNMENT_BYTES,
)


def arena_bytes_for(chunks: int) -> int:
    """Return the size of an arena that holds *chunks* without evicting any."""
    return max(chunks * MANIFEST.chunk_bytes + 4 * MIB, 16 * MIB)


def prefix(number: int, length: int, *, kind: str = "present") -> list[Digest]:
    """Return *length* digests of prefix *number*; another *kind* gives others."""
    start = f"{kind}/{number}/".encode()
    return [Digest(hashlib.sha256(start + str(at).encode()).digest()) for at in range(length)]


def fill(space: Space, chunks: int) -> int:
    """Commit *chunks* chunks in prefixes of at most 4,096; return the number of prefixes."""
    number = 0
    for start in range(0, chunks, KEYS_PER_REQUEST_MAX):
        length = min(KEYS_PER_REQUEST_MAX, chunks - start)
        with space.reserve(prefix(number, length)) as vacancies:
            for vacancy in vacancies:
                vacancy.seal()
        number += 1
    return number

"""Manifests, digests, bytes and runs to test with. Equal arguments give equal things."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from kvstore.hashing import block_digests, chunk_digests, root_of
from kvstore.protocol.manifest import Manifest
from kvstore.transfer.copies import Runs
from kvstore.types import Digest, Root

CHUNK_TOKENS = 16


def make_manifest(**fields: object) -> Manifest:
    """Return a small model's manifest: four heads of 8 KiB make a chunk of 32 KiB."""
    defaults = {
        "model": "tests/small",
        "revision": "1",
        "dtype": "bfloat16",
        "layers": 2,
        "kv_heads": 4,
        "head_dim": 64,
        "chunk_tokens": CHUNK_TOKENS,
    }
    return Manifest(**(defaults | fields))


def opaque_manifest(size_bytes: int, **fields: object) -> Manifest:
    """Return the manifest of chunks of exactly *size_bytes*."""
    return make_manifest(
        layout="opaque", dtype="opaque", kv_heads=1, opaque_bytes=size_bytes, **fields
    )


def make_digests(count: int, prompt: int = 0) -> list[Digest]:
    """Return the digests of *count* chunks of prompt number *prompt*."""
    return chunk_digests([prompt, *range(1, count * CHUNK_TOKENS)], CHUNK_TOKENS)


def loose_digest(number: int) -> Digest:
    """Return a digest that belongs to no prefix."""
    return Digest(hashlib.sha256(b"loose %d" % number).digest())


def make_payload(digest: Digest, size_bytes: int) -> bytes:
    """Return the bytes that stand for the KV of *digest*: no two places hold the same word."""
    words = np.arange(-(-size_bytes // 8), dtype=np.uint64)
    words += np.frombuffer(digest[:8], dtype=np.uint64)
    return words.tobytes()[:size_bytes]


def make_root(payload: bytes) -> Root:
    """Return the root of *payload*."""
    return root_of(block_digests(payload))


def runs_of(payloads: Sequence[bytes]) -> list[Runs]:
    """Return one source for each of *payloads*."""
    return [Runs.of_buffer(payload) for payload in payloads]


def sources_of(manifest: Manifest, digests: Sequence[Digest]) -> list[Runs]:
    """Return the sources of whole chunks of *digests*."""
    return runs_of([make_payload(digest, manifest.chunk_bytes) for digest in digests])


def empty_targets(manifest: Manifest, count: int) -> tuple[list[bytearray], list[Runs]]:
    """Return room for *count* chunks, and the same as targets."""
    buffers = [bytearray(manifest.chunk_bytes) for _ in range(count)]
    return buffers, [Runs.of_buffer(buffer) for buffer in buffers]

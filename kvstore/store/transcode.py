"""Smaller forms of shards, for tiers that name a codec of their own. Blocking: for threads.

What a form holds is what its container says. What was encoded with loss is not encoded with loss
again, but for the gentle codecs of 8 bits, whose errors vanish in those of any stronger one.
"""

from __future__ import annotations

import mmap
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from kvstore.compression.chunks import ChunkCodec, decode
from kvstore.compression.container import POSITION_MAX, open_container
from kvstore.compression.policy import GENTLE, CodecPolicy
from kvstore.compression.registry import find_codec
from kvstore.compression.shapes import LOSSLESS
from kvstore.errors import ChecksumError, CodecError, ContainerError, UnfitError
from kvstore.hashing import root_of
from kvstore.limits import TRANSCODERS_MAX
from kvstore.transfer.copies import copy, digest_blocks

if TYPE_CHECKING:
    from kvstore.compression.container import Header
    from kvstore.compression.shapes import Bytes
    from kvstore.metrics import Counters
    from kvstore.protocol.manifest import Manifest
    from kvstore.types import HeadRange, Root


class Stored(NamedTuple):
    """A shard as it is stored now. *root* is what its bytes must match."""

    manifest: Manifest
    heads: HeadRange
    is_first: bool
    source: memoryview
    root: Root


class Form(NamedTuple):
    """The same shard, smaller: its bytes, page-aligned, and their root."""

    payload: memoryview
    root: Root


class Transcoder:
    """Makes forms of one codec. Shared by threads, but for its counters: see `Route`.

    Raises `CodecError` for a codec that is unknown.
    """

    def __init__(self, codec: str) -> None:
        self.codec: Final = codec
        self._policy = CodecPolicy(codec=codec)
        self._spec = find_codec(codec)
        self._coders: dict[Manifest, ChunkCodec | None] = {}

    def make(self, stored: Stored) -> Form | None:
        """Return a smaller form of *stored*, or None when it is to stay as it is.

        Raises `ChecksumError` when its bytes are not those of its root, `UnfitError` and
        `ContainerError` when they cannot be encoded or decoded.
        """
        coder = self._coder(stored.manifest)
        if coder is None:
            return None
        # A private copy: what is checked must be what is encoded, and clients can write there.
        mine = np.empty(len(stored.source), dtype=np.uint8)
        found = copy(mine, stored.source, checksums=True)
        if found is None or root_of(found) != stored.root:
            raise ChecksumError("the bytes of a shard are not those of its root; not encoded")
        plain, first_position = self._plain(stored, mine)
        if plain is None:
            return None
        room = _aligned(coder.encoded_size(stored.heads, first_position=first_position))
        report = coder.encode(plain.data, room, stored.heads, first_position=first_position)
        if report.size_bytes >= len(stored.source):
            return None
        payload = room[: report.size_bytes]
        return Form(payload, root_of(digest_blocks(payload)))

    def _plain(self, stored: Stored, mine: Bytes) -> tuple[Bytes | None, int]:
        """Return the values of a shard and where they begin; None when it is to stay as it is."""
        manifest = stored.manifest
        if manifest.codec == "raw" and mine.nbytes == manifest.plain_bytes(stored.heads):
            return mine, 0 if stored.is_first else POSITION_MAX
        header = open_container(mine.data).header
        if not self._may_encode(header):
            return None, 0
        plain = np.empty(manifest.plain_bytes(stored.heads), dtype=np.uint8)
        decode(manifest, mine.data, plain.data, stored.heads)
        return plain, header.first_position

    def _may_encode(self, header: Header) -> bool:
        """Return whether what a container holds may be encoded by this codec."""
        if header.codec in LOSSLESS:
            return (header.codec, header.table_id) != (self._spec.codec, self._spec.table_id)
        return header.codec in GENTLE and not GENTLE.issuperset(self._spec.sections)

    def _coder(self, manifest: Manifest) -> ChunkCodec | None:
        """Return what encodes chunks of *manifest*; None when this codec does not."""
        try:
            return self._coders[manifest]
        except KeyError:
            if len(self._coders) >= TRANSCODERS_MAX:
                # Another thread may do the same now: what is returned is not looked up again.
                self._coders.clear()
        coder: ChunkCodec | None = None
        with suppress(CodecError):
            coder = ChunkCodec(manifest, self._policy)
        self._coders[manifest] = coder
        return coder


def form_of(transcoder: Transcoder, stored: Stored) -> Form | str:
    """Return a smaller form of *stored*, or why it stays as it is: the name of a counter.

    Raises `ChecksumError` when its bytes are not those of its root.
    """
    try:
        form = transcoder.make(stored)
    except (UnfitError, ContainerError, CodecError):
        return "transcode_chunks_failed"
    return form or "transcode_chunks_kept"


def count(counters: Counters, stored: Stored, made: Form | str) -> None:
    """Count what became of *stored*."""
    if isinstance(made, str):
        setattr(counters, made, getattr(counters, made) + 1)
        return
    counters.transcode_chunks += 1
    counters.transcode_bytes_before += len(stored.source)
    counters.transcode_bytes_after += len(made.payload)


def _aligned(size_bytes: int) -> memoryview:
    """Return memory that a disk takes without another copy."""
    return memoryview(mmap.mmap(-1, size_bytes))[:size_bytes]

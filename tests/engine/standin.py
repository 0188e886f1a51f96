"""A store in a dict, with the face of `PrefixCache`: what the connector tests need of a daemon."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kvstore.protocol.manifest import Manifest
from kvstore.transfer.copies import Runs, gather, scatter
from kvstore.types import Digest, NamespaceId


@dataclass
class Counts:
    stored: int = 0
    present: int = 0
    refused: int = 0
    bytes_stored: int = 0


@dataclass
class MemoryStore:
    """All namespaces; `open` is what `PrefixReuse(open_cache=...)` takes."""

    chunks: dict[tuple[NamespaceId, Digest], np.ndarray] = field(default_factory=dict)
    manifests: dict[NamespaceId, Manifest] = field(default_factory=dict)
    parents: dict[tuple[NamespaceId, Digest], Digest | None] = field(default_factory=dict)

    def open(self, manifest: Manifest) -> MemoryCache:
        self.manifests[manifest.namespace_id()] = manifest
        return MemoryCache(self, manifest)


@dataclass
class MemoryCache:
    store_: MemoryStore
    manifest: Manifest

    def _key(self, digest: Digest) -> tuple[NamespaceId, Digest]:
        return self.manifest.namespace_id(), digest

    def lookup(self, digests: Sequence[Digest], *, window: int = 0) -> int:
        there = [self._key(digest) in self.store_.chunks for digest in digests]
        for end in range(len(digests), 0, -1):
            if all(there[max(0, end - window) if window else 0 : end]):
                return end
        return 0

    def load(self, digests: Sequence[Digest], targets: Sequence[Runs], *, start: int = 0) -> int:
        for index, (digest, target) in enumerate(zip(digests, targets, strict=True)):
            payload = self.store_.chunks.get(self._key(digest))
            if payload is None:
                return index
            scatter(target, payload, checksums=False)
        return len(digests)

    def store(
        self, digests: Sequence[Digest], sources: Sequence[Runs], *, parent: Digest | None = None
    ) -> Counts:
        counts = Counts()
        for digest, source in zip(digests, sources, strict=True):
            key = self._key(digest)
            if key in self.store_.chunks:
                counts.present += 1
                continue
            payload = np.empty(self.manifest.chunk_bytes, dtype=np.uint8)
            gather(payload, source, checksums=False)
            self.store_.chunks[key] = payload
            self.store_.parents[key] = parent
            counts.stored += 1
            counts.bytes_stored += payload.nbytes
            parent = digest
        return counts

    def close(self) -> None:
        pass

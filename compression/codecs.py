"""Codecs as manifests name them: how large chunks become, known before anything is encoded.

How they are encoded is the matter of `chunks.py`; which sections take what, of a policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

from kvstore.compression.container import OPAQUE_CODEC_IDS
from kvstore.compression.registry import BUILT_IN
from kvstore.compression.shapes import SECTION_ALIGNMENT_BYTES, padded

HEADER_BYTES: Final = 64
ENTRY_BYTES: Final = 24


class Codec(Protocol):
    """Promises of every codec.

    A chunk says itself what it was encoded with, so it is always decoded by that, never by
    today's configuration.
    """

    @property
    def name(self) -> str:
        """What the manifest calls it."""

    @property
    def is_lossless(self) -> bool:
        """Whether decoding gives back every bit."""

    def encoded_size_bytes(self, size_bytes: int, sections: int = 1) -> int:
        """Return what *size_bytes* of canonical KV in *sections* take once encoded, at most."""

    def least_size_bytes(self, size_bytes: int, sections: int = 1) -> int:
        """Return what they take at least: less cannot have been encoded from them."""


class Raw:
    """Bytes as the engine has them. The gather is the encoding."""

    name: Final = "raw"
    is_lossless: Final = True

    def encoded_size_bytes(self, size_bytes: int, sections: int = 1) -> int:
        """Return *size_bytes*."""
        return size_bytes

    def least_size_bytes(self, size_bytes: int, sections: int = 1) -> int:
        """Return *size_bytes*."""
        return size_bytes


@dataclass(frozen=True)
class Contained:
    """A codec whose chunks are containers; `ChunkCodec.encoded_size` knows their size closely."""

    name: str
    is_lossless: bool

    def encoded_size_bytes(self, size_bytes: int, sections: int = 1) -> int:
        """Return the size of the container when all *sections* have fallen back to raw."""
        most = size_bytes + sections * (SECTION_ALIGNMENT_BYTES - 1)
        return self.least_size_bytes(size_bytes, sections) + most

    def least_size_bytes(self, size_bytes: int, sections: int = 1) -> int:
        """Return the size of header and section table."""
        return padded(HEADER_BYTES + ENTRY_BYTES * sections, SECTION_ALIGNMENT_BYTES)


def _codecs() -> dict[str, Codec]:
    found: dict[str, Codec] = {"raw": Raw()}
    for spec in BUILT_IN.values():
        found.setdefault(spec.name, Contained(spec.name, spec.is_lossless))
    return found


CODECS: Final[dict[str, Codec]] = _codecs()
"""All codecs by name."""

OPAQUE_CODECS: Final = tuple(codec.name.lower() for codec in OPAQUE_CODEC_IDS)
"""Those that take any bytes."""

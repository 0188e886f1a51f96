"""Codecs: how the bytes of a chunk are stored. Sizes are known before anything is encoded."""

from __future__ import annotations

from typing import Final, Protocol


class Codec(Protocol):
    """Promises of every codec.

    A codec is named in the manifest, so a chunk is always decoded by what it was encoded
    with, never by today's configuration.
    """

    @property
    def name(self) -> str:
        """What the manifest calls it."""

    @property
    def is_lossless(self) -> bool:
        """Whether decoding gives back every bit."""

    def encoded_size_bytes(self, size_bytes: int) -> int:
        """Return what *size_bytes* of canonical KV take once encoded, at most."""


class Raw:
    """Bytes as the engine has them. The gather is the encoding."""

    name: Final = "raw"
    is_lossless: Final = True

    def encoded_size_bytes(self, size_bytes: int) -> int:
        """Return *size_bytes*."""
        return size_bytes


CODECS: Final[dict[str, Codec]] = {codec.name: codec for codec in (Raw(),)}
"""All codecs by name."""

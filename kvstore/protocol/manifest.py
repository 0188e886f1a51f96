"""The manifest: everything that a whole engine has in common and that KV depends on.

Two engines share KV exactly when their manifests are equal. The namespace is the first 16
bytes of SHA-256 over the canonical manifest: JSON, keys sorted, no white space, every field
written out, UTF-8.
"""

from __future__ import annotations

import hashlib
from typing import Final, Literal

import msgspec

from kvstore.compression.codecs import CODECS, OPAQUE_CODECS
from kvstore.errors import ManifestError, RequestError
from kvstore.limits import (
    CHUNK_SIZE_MAX_BYTES,
    CHUNK_TOKENS_MAX,
    HEAD_DIM_MAX,
    KV_HEADS_MAX,
    LAYERS_MAX,
    MANIFEST_SIZE_MAX_BYTES,
    NAMESPACE_ID_SIZE_BYTES,
)
from kvstore.types import HeadRange, NamespaceId

DTYPE_SIZE_BYTES: Final = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3": 1,
    "float8_e5m2": 1,
    "opaque": 1,
}


_OWNED_PREFIX: Final = b'{"manifest":'


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What must match, field by field, before one engine's KV is another's.

    A canonical chunk is `X[layer][k|v][kv_head][token][head_dim]` in C order. An *opaque*
    chunk is bytes that only engines of an equal manifest understand; it has one head, and
    *opaque_bytes* says its size. Raises `ManifestError` naming the field and its limit.
    """

    model: str
    revision: str
    dtype: str
    layers: int
    kv_heads: int
    head_dim: int
    chunk_tokens: int
    layout: Literal["canonical", "opaque"] = "canonical"
    codec: str = "raw"
    rope: str = ""
    group: str = ""
    values: Literal["k|v", "k"] = "k|v"
    opaque_bytes: int = 0
    format: Literal[1] = 1

    def __post_init__(self) -> None:
        if not self.model:
            raise ManifestError("manifest.model is empty; a namespace needs a model identity")
        if self.dtype not in DTYPE_SIZE_BYTES:
            known = ", ".join(DTYPE_SIZE_BYTES)
            raise ManifestError(f"manifest.dtype {self.dtype!r} is unknown; known are {known}")
        if self.codec not in CODECS:
            known = ", ".join(CODECS)
            raise ManifestError(f"manifest.codec {self.codec!r} is unknown; known are {known}")
        _check_range("layers", self.layers, LAYERS_MAX)
        _check_range("kv_heads", self.kv_heads, KV_HEADS_MAX)
        _check_range("head_dim", self.head_dim, HEAD_DIM_MAX)
        _check_range("chunk_tokens", self.chunk_tokens, CHUNK_TOKENS_MAX)
        if self.layout == "opaque":
            _check_range("opaque_bytes", self.opaque_bytes, CHUNK_SIZE_MAX_BYTES)
            if self.codec not in OPAQUE_CODECS:
                raise ManifestError(
                    f"manifest.codec {self.codec!r} needs to know what the bytes are; of an opaque "
                    f"layout nobody does: {', '.join(OPAQUE_CODECS)} are for those"
                )
            if self.kv_heads != 1:
                raise ManifestError(
                    f"manifest.kv_heads is {self.kv_heads}; an opaque layout has no heads, use 1"
                )
        elif self.opaque_bytes:
            raise ManifestError("manifest.opaque_bytes is only for layout 'opaque'")
        _check_range("chunk size in bytes", self.chunk_bytes, CHUNK_SIZE_MAX_BYTES)

    @property
    def head_bytes(self) -> int:
        """Bytes of one KV head in one chunk, over all layers."""
        if self.layout == "opaque":
            return self.opaque_bytes
        sides = 2 if self.values == "k|v" else 1
        return (
            self.layers * sides * self.chunk_tokens * self.head_dim * DTYPE_SIZE_BYTES[self.dtype]
        )

    @property
    def sections(self) -> int:
        """Parts of a chunk that codecs encode one by one: layers, K and V apart."""
        if self.layout == "opaque":
            return 1
        return self.layers * (2 if self.values == "k|v" else 1)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk with all its heads, as it is stored."""
        return self.shard_bytes(self.all_heads)

    @property
    def all_heads(self) -> HeadRange:
        """The range that covers every head."""
        return HeadRange(0, self.kv_heads)

    def shard_bytes(self, heads: HeadRange) -> int:
        """Bytes of the shard *heads* of one chunk, as it is stored: at most, but for `raw`."""
        return CODECS[self.codec].encoded_size_bytes(self.plain_bytes(heads), self.sections)

    def plain_bytes(self, heads: HeadRange) -> int:
        """Bytes of the shard *heads* of one chunk, as the engine has it."""
        return self.head_bytes * heads.width

    def check_stored_bytes(self, heads: HeadRange, size_bytes: int) -> None:
        """Raise `RequestError` unless a shard of *heads* can take *size_bytes* once encoded."""
        most = self.shard_bytes(heads)
        least = CODECS[self.codec].least_size_bytes(self.plain_bytes(heads), self.sections)
        if not least <= size_bytes <= most:
            expected = f"{most}" if least == most else f"{least} to {most}"
            raise RequestError(
                f"{size_bytes} bytes for heads [{heads.start}, {heads.stop}) of a chunk of codec "
                f"{self.codec!r}, which takes {expected}"
            )

    def encode(self) -> bytes:
        """Return the canonical form, the one that is hashed."""
        return msgspec.json.encode(self, order="sorted")

    def namespace_id(self, tenant: str = "") -> NamespaceId:
        """Return the 16 bytes that stand for this manifest, or for that of one *tenant*."""
        canonical = encode_namespace(self, tenant)
        return NamespaceId(hashlib.sha256(canonical).digest()[:NAMESPACE_ID_SIZE_BYTES])


class _Owned(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The manifest of one tenant's own namespace."""

    manifest: Manifest
    tenant: str


_decoder = msgspec.json.Decoder(Manifest)
_owned_decoder = msgspec.json.Decoder(_Owned)


def encode_namespace(manifest: Manifest, tenant: str) -> bytes:
    """Return what a namespace is the hash of: a manifest and, if it is one's own, its tenant."""
    if not tenant:
        return manifest.encode()
    return msgspec.json.encode(_Owned(manifest=manifest, tenant=tenant), order="sorted")


def decode_namespace(raw: bytes) -> tuple[Manifest, str]:
    """Return what `encode_namespace` was given; raises `ManifestError`."""
    if not raw.startswith(_OWNED_PREFIX):
        return decode_manifest(raw), ""
    try:
        owned = _owned_decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ManifestError(f"manifest of a tenant does not parse: {error}") from error
    return owned.manifest, owned.tenant


def decode_manifest(raw: bytes) -> Manifest:
    """Return the manifest in *raw*; raises `ManifestError` saying which field is wrong and why."""
    if len(raw) > MANIFEST_SIZE_MAX_BYTES:
        raise ManifestError(
            f"manifest has {len(raw)} bytes, at most {MANIFEST_SIZE_MAX_BYTES} allowed"
        )
    try:
        return _decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ManifestError(f"manifest does not parse: {error}") from error


def _check_range(field: str, value: int, most: int) -> None:
    if not 1 <= value <= most:
        raise ManifestError(f"manifest.{field} is {value}, must lie in [1, {most}]")

"""The settings of the vLLM connector: what `kv_connector_extra_config` may hold."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from kvstore.compression.policy import CodecPolicy
from kvstore.config import default_socket_path
from kvstore.connectors.codecs import check_layout, read_codec
from kvstore.errors import ConfigError
from kvstore.limits import (
    CHUNK_TOKENS_MAX,
    HANDOFF_TTL_MAX_SECONDS,
    STAGING_SIZE_BYTES,
    STAGING_SIZE_MAX_BYTES,
)

CHUNK_TOKENS_DEFAULT: Final = 256


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How an engine uses the store. Raises `ConfigError` naming the setting.

    *chunk_tokens* 0 stands for 256, or the next multiple of the engine's block size.
    *revision* names the weights; without it they are read once and hashed. *layout* "canonical"
    shares KV between engines and is refused where it is not known; "opaque" is the engine's own
    bytes; "auto" takes the canonical one where it is known. *codec* is a name, or a table as in
    `read_codec`. *gpu_staging_bytes* is device memory, for each KV group and direction.
    """

    socket: str = ""
    chunk_tokens: int = 0
    revision: str = ""
    layout: Literal["auto", "canonical", "opaque"] = "auto"
    codec: str | dict[str, Any] = "raw"
    store_decoded: bool = False
    lookup_timeout_seconds: float = 0.25
    transfer_timeout_seconds: float = 1.0
    handoff_timeout_seconds: float = 120.0
    gpu_staging_bytes: int = STAGING_SIZE_BYTES

    def __post_init__(self) -> None:
        if not 0 <= self.chunk_tokens <= CHUNK_TOKENS_MAX:
            raise ValueError(f"chunk_tokens must lie in [0, {CHUNK_TOKENS_MAX}]")
        for name in ("lookup_timeout_seconds", "transfer_timeout_seconds"):
            if not 0 < getattr(self, name) <= 60:
                raise ValueError(f"{name} must lie in (0, 60]")
        if not 0 < self.handoff_timeout_seconds <= HANDOFF_TTL_MAX_SECONDS:
            raise ValueError(
                f"handoff_timeout_seconds must lie in (0, {HANDOFF_TTL_MAX_SECONDS:g}]"
            )
        if not 0 < self.gpu_staging_bytes <= STAGING_SIZE_MAX_BYTES:
            raise ValueError(f"gpu_staging_bytes must lie in [1, {STAGING_SIZE_MAX_BYTES}]")
        check_layout(self.layout, self.policy)

    @property
    def policy(self) -> CodecPolicy:
        """How chunks are encoded; raises `ConfigError`."""
        return read_codec(self.codec)

    @property
    def socket_path(self) -> Path:
        """Where the daemon listens."""
        return Path(self.socket) if self.socket else default_socket_path(os.environ)

    def chunk_for(self, block_tokens: int) -> int:
        """Return the tokens of a chunk for an engine with blocks of *block_tokens*.

        Raises `ConfigError` when a block size does not divide the chunk that was asked for.
        """
        if not self.chunk_tokens:
            return -(-CHUNK_TOKENS_DEFAULT // block_tokens) * block_tokens
        if self.chunk_tokens % block_tokens:
            raise ConfigError(
                f"kv_connector_extra_config.chunk_tokens is {self.chunk_tokens}, which is no"
                f" multiple of the engine's block size {block_tokens}; use"
                f" {max(1, self.chunk_tokens // block_tokens) * block_tokens}, or leave it out"
            )
        return self.chunk_tokens


def read_settings(extra: Mapping[str, Any]) -> Settings:
    """Return the settings in *extra*; raises `ConfigError` on unknown names and bad values."""
    try:
        return msgspec.convert(dict(extra), Settings)
    except msgspec.ValidationError as error:
        known = ", ".join(Settings.__struct_fields__)
        raise ConfigError(f"kv_connector_extra_config: {error}; known are {known}") from error

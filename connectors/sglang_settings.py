"""The settings of the SGLang connector: what `--hicache-storage-backend-extra-config` may hold."""

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

# What SGLang itself reads there, or has read already.
_LOADER_KEYS: Final = frozenset(
    {
        "backend_name",
        "module_path",
        "class_name",
        "interface_v1",
        "prefetch_threshold",
        "prefetch_timeout_base",
        "prefetch_timeout_per_ki_token",
        "hicache_storage_pass_prefix_keys",
        "tp_lcm_size",
    }
)


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How an engine uses the store. Raises `ConfigError` naming the setting.

    *model* is the folder or the hub's name of the model, where SGLang does not say it; *revision*
    names the weights, which else are read once and hashed; *quantization* names what is done to
    them at the start. *layout* "canonical" shares KV between engines and is refused where it is
    not known; "opaque" is SGLang's own bytes; "auto" takes the canonical one where it is known.
    *codec* is a name, or a table as in `read_codec`. A call that the daemon does not answer in
    *timeout_seconds* is a miss.
    """

    socket: str = ""
    model: str = ""
    revision: str = ""
    quantization: str = ""
    layout: Literal["auto", "canonical", "opaque"] = "auto"
    codec: str | dict[str, Any] = "raw"
    tenant: str = ""
    timeout_seconds: float = 1.0
    recompute_us_per_token: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.timeout_seconds <= 60:
            raise ValueError("timeout_seconds must lie in (0, 60]")
        if not 0 <= self.recompute_us_per_token <= 1e6:
            raise ValueError("recompute_us_per_token must lie in [0, 1000000]")
        check_layout(self.layout, self.policy)

    @property
    def policy(self) -> CodecPolicy:
        """How pages are encoded; raises `ConfigError`."""
        return read_codec(self.codec)

    @property
    def socket_path(self) -> Path:
        """Where the daemon listens."""
        return Path(self.socket) if self.socket else default_socket_path(os.environ)


def read_settings(extra: Mapping[str, Any]) -> Settings:
    """Return the settings in *extra*; raises `ConfigError` on unknown names and bad values."""
    ours = {name: value for name, value in extra.items() if name not in _LOADER_KEYS}
    try:
        return msgspec.convert(ours, Settings)
    except msgspec.ValidationError as error:
        known = ", ".join(Settings.__struct_fields__)
        raise ConfigError(
            f"hicache-storage-backend-extra-config: {error}; known are {known}"
        ) from error

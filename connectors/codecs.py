"""How a connector is told which codec its chunks take, and what the codecs have done.

A codec is named (`"int4kv"`), or given as a table that says more of its policy
(`{"name": "int4kv", "edge_layers": 0}`); docs/codecs.md says how to choose.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import msgspec

from kvstore.client.cache import PrefixCache
from kvstore.compression.codecs import CODECS, OPAQUE_CODECS
from kvstore.compression.guard import CodecCounters
from kvstore.compression.policy import CodecPolicy
from kvstore.errors import CodecError, ConfigError

CodecChoice = str | Mapping[str, Any] | CodecPolicy


class _Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a table may hold; see `CodecPolicy`."""

    name: str
    edge_layers: int = CodecPolicy.edge_layers
    edge_codec: str = CodecPolicy.edge_codec
    layers: dict[int, str] = {}
    sinks: int = CodecPolicy.sinks
    spare_sections: int = CodecPolicy.spare_sections


def read_codec(choice: CodecChoice) -> CodecPolicy:
    """Return the policy that *choice* stands for; raises `ConfigError` naming what is wrong."""
    if isinstance(choice, CodecPolicy):
        return choice
    table = {"name": choice} if isinstance(choice, str) else dict(choice)
    try:
        options = msgspec.convert(table, _Options, str_keys=True)
        more = {name: getattr(options, name) for name in _Options.__struct_fields__[1:]}
        policy = CodecPolicy(codec=options.name, **more)
    except msgspec.ValidationError as error:
        known = ", ".join(_Options.__struct_fields__)
        raise ConfigError(f"codec: {error}; known are {known}") from error
    except CodecError as error:
        raise ConfigError(f"codec: {error}") from error
    if policy.codec not in CODECS:
        raise ConfigError(f"codec {policy.codec!r} cannot be named in a manifest")
    return policy


def needs_values(policy: CodecPolicy) -> bool:
    """Return whether the codec must know what the bytes of pages are."""
    return policy.codec not in OPAQUE_CODECS


def check_layout(layout: str, policy: CodecPolicy) -> None:
    """Raise `ValueError` when the setting *layout* hides what the codec must know."""
    if layout == "opaque" and needs_values(policy):
        raise ValueError(
            f"codec {policy.codec!r} must know what the bytes of pages are, so layout"
            f" cannot be 'opaque'; use 'canonical', or one of {', '.join(OPAQUE_CODECS)}"
        )


def with_tail(policy: CodecPolicy, channels: int) -> CodecPolicy:
    """Return *policy* for heads whose last *channels* are to stay as they are."""
    return replace(policy, tail_channels=channels)


def counted(caches: Iterable[object]) -> CodecCounters:
    """Return what encoding for all *caches* has done; other stores than ours count for nothing."""
    total = CodecCounters()
    for cache in caches:
        if isinstance(cache, PrefixCache):
            total.add(cache.codec_counters)
    return total

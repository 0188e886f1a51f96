"""What an engine's KV depends on besides its geometry, as it is written in manifests.

Connectors of different engines write the same words for the same thing, or their namespaces
would never meet.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import xxhash

# Keys of a configuration that KV does not depend on.
_UNRELATED: Final = frozenset(
    {"_name_or_path", "name_or_path", "transformers_version", "architectures", "use_cache", "dtype"}
)
# Scalings that look at more than the position: KV depends on how long texts may get.
LENGTH_DEPENDENT_ROPE: Final = frozenset({"dynamic", "longrope"})
_WEIGHT_SUFFIXES: Final = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf"})
_READ_BYTES: Final = 8 * 1024 * 1024


def canonical_json(value: object) -> str:
    """Return *value* as JSON that is the same for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


def revision_of(config: Mapping[str, Any], weights: str) -> str:
    """Return what stands for a model: its configuration and the name of its weights."""
    digest = hashlib.sha256(canonical_json(_related(config)).encode()).hexdigest()
    return f"config {digest[:32]} weights {weights}"


def group_name(window_tokens: int, sides: Sequence[str], layers: Sequence[int]) -> str:
    """Return the name of the KV group of *layers*, which share one kind of attention."""
    attention = f"sliding {window_tokens}" if window_tokens else "full"
    return f"{attention}; {'+'.join(sides)}; layers {ranges(layers)}"


def ranges(numbers: Sequence[int]) -> str:
    """Return ascending *numbers* in short: `0-3,5`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def rope_types(parameters: object) -> Iterator[str]:
    """Yield every `rope_type` in *parameters*, which may hold one set per kind of layer."""
    if isinstance(parameters, Mapping):
        if "rope_type" in parameters:
            yield str(parameters["rope_type"])
        for nested in parameters.values():
            yield from rope_types(nested)


def digest_of_files(folder: Path) -> str:
    """Return what stands for the weight files in *folder*; empty when there are none.

    All of them are read. The hash guards against accidents; it is no proof against somebody
    who makes weights collide.
    """
    files = sorted(path for path in folder.glob("*") if path.suffix in _WEIGHT_SUFFIXES)
    if not files:
        return ""
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name} ".encode())
        digest.update(_content_digest(path))
    return f"files-{digest.hexdigest()[:32]}"


def _content_digest(path: Path) -> bytes:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.digest()


def _related(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return *config* without what KV does not depend on, nested configurations included."""
    return {
        key: _related(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in _UNRELATED
    }

"""`kvstore size`: bytes a token, chunks and capacity, from the geometry of a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final, NamedTuple

from kvstore.cli.tables import align
from kvstore.errors import ConfigError
from kvstore.hashing import stored_size
from kvstore.limits import EXTENT_ALIGNMENT_BYTES
from kvstore.protocol.manifest import DTYPE_SIZE_BYTES, Manifest
from kvstore.units import round_size

# The daemon's own memory for a chunk that it knows, at most.
_INDEX_BYTES: Final = 300
_CONFIG_SIZE_MAX_BYTES: Final = 1 << 20
_DTYPES: Final = {"float32": "float32", "float16": "float16", "bfloat16": "bfloat16"}


class Geometry(NamedTuple):
    """What of a model decides the size of its KV. *values* is `k` for latent attention."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str = "bfloat16"
    values: str = "k|v"


# As the models' published configurations have them.
MODELS: Final = {
    "deepseek-v3": Geometry(61, 1, 576, values="k"),
    "llama-3.1-8b": Geometry(32, 8, 128),
    "llama-3.1-70b": Geometry(80, 8, 128),
    "llama-3.1-405b": Geometry(126, 8, 128),
    "mistral-7b": Geometry(32, 8, 128),
    "mixtral-8x7b": Geometry(32, 8, 128),
    "phi-4": Geometry(40, 10, 128),
    "qwen2.5-7b": Geometry(28, 4, 128),
    "qwen2.5-72b": Geometry(80, 8, 128),
    "qwen3-0.6b": Geometry(28, 8, 128),
    "qwen3-8b": Geometry(36, 8, 128),
    "qwen3-32b": Geometry(64, 8, 128),
    "qwen3-30b-a3b": Geometry(48, 4, 128),
    "qwen3-235b-a22b": Geometry(94, 4, 128),
}


class Sizes(NamedTuple):
    """What one model takes, without a codec. *chunk_bytes* has checksums and rounding in it."""

    bytes_per_token: int
    chunk_tokens: int
    chunk_bytes: int
    capacity_bytes: int
    capacity_tokens: int
    index_bytes: int


def geometry_of(name: str) -> Geometry:
    """Return the geometry of a model in the table, or of the `config.json` at a path.

    Raises `ConfigError` for anything else.
    """
    if name.lower() in MODELS:
        return MODELS[name.lower()]
    path = Path(name)
    if path.is_dir():
        path /= "config.json"
    if not path.is_file():
        known = ", ".join(MODELS)
        raise ConfigError(f"{name} is neither a file nor one of: {known}")
    try:
        text = path.read_bytes()
        if len(text) > _CONFIG_SIZE_MAX_BYTES:
            raise ConfigError(f"{path}: more than {_CONFIG_SIZE_MAX_BYTES} bytes")
        found = json.loads(text)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON: {error}") from None
    return _from_config(found, path)


def _from_config(found: object, path: Path) -> Geometry:
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: is not the configuration of a model")
    config = found.get("text_config") or found
    named = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    dtype = _DTYPES.get(named, "bfloat16")
    try:
        layers, heads = int(config["num_hidden_layers"]), int(config["num_attention_heads"])
        if "kv_lora_rank" in config:  # latent attention: one head, no values of its own
            width = int(config["kv_lora_rank"]) + int(config["qk_rope_head_dim"])
            return Geometry(layers, 1, width, dtype, "k")
        head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
        kv_heads = int(config.get("num_key_value_heads") or heads)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: says nothing usable about {error}") from None
    return Geometry(layers, kv_heads, head_dim, dtype)


def sizes_of(geometry: Geometry, *, chunk_tokens: int, capacity_bytes: int) -> Sizes:
    """Return what KV of *geometry* takes; raises `ManifestError` for an impossible one."""
    manifest = Manifest(
        model="any", revision="any", chunk_tokens=chunk_tokens,
        **geometry._asdict(),
    )  # fmt: skip
    taken = stored_size(manifest.chunk_bytes)
    taken += -taken % EXTENT_ALIGNMENT_BYTES
    chunks = capacity_bytes // taken
    return Sizes(
        manifest.plain_bytes(manifest.all_heads) // chunk_tokens,
        chunk_tokens,
        taken,
        capacity_bytes,
        chunks * chunk_tokens,
        chunks * _INDEX_BYTES,
    )


def render(geometry: Geometry, sizes: Sizes) -> str:
    """Return *sizes* for people."""
    kinds = 1 if geometry.values == "k" else 2
    width = DTYPE_SIZE_BYTES[geometry.dtype]
    product = (
        f"{geometry.layers} layers x {kinds} x {geometry.kv_heads} heads x "
        f"{geometry.head_dim} x {width} bytes"
    )
    rows = [
        ("a token", round_size(sizes.bytes_per_token), product),
        ("a chunk", round_size(sizes.chunk_bytes), f"{sizes.chunk_tokens} tokens, as it is kept"),
        (
            "capacity",
            round_size(sizes.capacity_bytes),
            f"{sizes.capacity_tokens:,} tokens",
        ),
        ("beside it", round_size(sizes.index_bytes), "the daemon's own memory for so many chunks"),
    ]
    return "\n".join(align(rows, right={1}))

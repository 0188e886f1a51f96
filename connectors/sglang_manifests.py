"""Which model an SGLang engine serves, and what its pools hold, in the words of the manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from transformers import AutoConfig

from kvstore.compression.policy import CodecPolicy
from kvstore.connectors.codecs import needs_values, read_codec, with_tail
from kvstore.connectors.identity import (
    LENGTH_DEPENDENT_ROPE,
    canonical_json,
    group_name,
    revision_of,
    rope_types,
)
from kvstore.connectors.sglang_pools import CanonicalPages, OpaquePages, Pages
from kvstore.connectors.sglang_settings import Settings
from kvstore.connectors.vllm_shards import HeadShard
from kvstore.connectors.weights import UnsupportedError, weights_name
from kvstore.protocol.manifest import Manifest
from kvstore.types import HeadRange

_SHARED_BY_RANKS: Final = ("MHA", "Mamba")


@dataclass(frozen=True, slots=True)
class Model:
    """A model, and what of it this rank has."""

    name: str
    revision: str
    rope: str
    kv_heads: int
    layers: int
    has_one_kind_of_layer: bool
    rope_dim: int


@dataclass(frozen=True, slots=True)
class Rank:
    """Which process of an engine this is. *shares_heads* is false where all ranks have the same."""

    rank: int
    ranks: int
    stage: int
    stages: int
    context: int
    contexts: int
    is_latent: bool
    is_writer: bool

    @classmethod
    def of(cls, config: Any) -> Rank:
        """Return what SGLang's `HiCacheStorageConfig` says."""
        is_latent = bool(config.is_mla_model)
        first = not is_latent or config.tp_rank == getattr(config, "dcp_rank", 0)
        return cls(
            rank=config.tp_rank,
            ranks=config.tp_size,
            stage=getattr(config, "pp_rank", 0),
            stages=getattr(config, "pp_size", 1),
            context=getattr(config, "attn_cp_rank", 0),
            contexts=getattr(config, "attn_cp_size", 1),
            is_latent=is_latent,
            is_writer=getattr(config, "is_storage_writer", first),
        )


@dataclass(frozen=True, slots=True)
class Stored:
    """How the pages of one pool are kept: *heads* None stands for all; a reader never stores."""

    pages: Pages
    manifest: Manifest
    heads: HeadRange | None
    policy: CodecPolicy
    is_writer: bool


def model_of(settings: Settings, served_name: str | None, arguments: Any) -> Model:
    """Return the model; *arguments* are SGLang's own, or None where it does not tell them.

    Raises `UnsupportedError` for a model without a name, or whose KV depends on more than its
    prefix.
    """
    name = settings.model or getattr(arguments, "model_path", None) or served_name or ""
    commit = getattr(arguments, "revision", None)
    config = _configuration(name, commit, bool(getattr(arguments, "trust_remote_code", False)))
    if not settings.revision and getattr(arguments, "load_format", "") == "dummy":
        raise UnsupportedError(
            'dummy weights have no name; give them one with "revision" in the extra config'
        )
    text = config.get_text_config(decoder=True)
    parameters = getattr(text, "rope_parameters", None) or {}
    if LENGTH_DEPENDENT_ROPE.intersection(rope_types(parameters)):
        raise UnsupportedError("rope scaling moves old positions when texts grow")
    described = config.to_dict()
    if overrides := _overrides(arguments):
        if any(word in canonical_json(overrides) for word in LENGTH_DEPENDENT_ROPE):
            raise UnsupportedError("rope scaling moves old positions when texts grow")
        # Of what files say of the model, SGLang uses something else.
        described |= {"sglang overrides": overrides}
    revision = revision_of(described, settings.revision or weights_name(name, commit))
    if quantization := _quantization(settings, arguments, described):
        revision += f" quantization {quantization}"
    kinds = set(getattr(text, "layer_types", None) or ())
    (architecture, *_) = config.architectures or ("",)
    return Model(
        name=architecture,
        revision=revision,
        rope=canonical_json(parameters),
        kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        layers=text.num_hidden_layers,
        has_one_kind_of_layer=len(kinds) <= 1,
        rope_dim=getattr(text, "qk_rope_head_dim", None) or 0,
    )


def stored_keys_values(pool: Any, model: Model, rank: Rank, settings: Settings) -> Stored:
    """Return how the main pool is kept; raises `UnsupportedError` when it cannot be."""
    if settings.layout != "opaque":
        try:
            return _canonical(pool, model, rank, settings)
        except UnsupportedError as error:
            if settings.layout == "canonical" or needs_values(settings.policy):
                raise UnsupportedError(
                    f'{error}; set layout to "auto" and codec to "raw" in the extra config'
                ) from error
    return stored_opaque("kv", pool, model, rank, settings)


def stored_opaque(name: str, pool: Any, model: Model, rank: Rank, settings: Settings) -> Stored:
    """Return how pool *name* is kept as it is; raises `UnsupportedError` when it cannot be.

    Its manifest names the rank, unless all ranks have the same bytes; then one of them stores.
    """
    pages = OpaquePages(pool)
    is_split = not rank.is_latent or any(word in type(pool).__name__ for word in _SHARED_BY_RANKS)
    policy = read_codec("raw") if needs_values(settings.policy) else settings.policy
    words = [f"sglang {_version()} {name}", pages.words, f"from layer {_first_layer(pool)}"]
    if is_split:
        words.append(f"rank {rank.rank} of {rank.ranks}")
    if rank.stages > 1:
        words.append(f"stage {rank.stage} of {rank.stages}")
    if rank.contexts > 1:
        words.append(f"context {rank.context} of {rank.contexts}")
    manifest = Manifest(
        model=model.name,
        revision=model.revision,
        dtype="opaque",
        layers=max(1, getattr(pool, "layer_num", 1)),
        kv_heads=1,
        head_dim=1,
        chunk_tokens=pages.page_tokens,
        layout="opaque",
        codec=policy.codec,
        rope=model.rope,
        group="; ".join(words),
        opaque_bytes=pages.page_bytes,
    )
    return Stored(pages, manifest, None, policy, is_split or rank.is_writer)


def _canonical(pool: Any, model: Model, rank: Rank, settings: Settings) -> Stored:
    pages = CanonicalPages(pool)
    shape, first = pages.shape, _first_layer(pool)
    last = first + shape.layers
    is_whole = last <= model.layers if rank.stages > 1 else (first, last) == (0, model.layers)
    if not model.has_one_kind_of_layer or not is_whole or rank.contexts > 1:
        raise UnsupportedError(f"the pool has layers {first}-{last - 1} of {model.layers}")
    latent = shape.sides == ("latent",)
    shard = HeadShard(1, rank.rank, rank.ranks) if latent else _shard(model, rank, shape.heads)
    policy = with_tail(settings.policy, model.rope_dim) if latent else settings.policy
    manifest = Manifest(
        model=model.name,
        revision=model.revision,
        dtype=str(shape.dtype).removeprefix("torch."),
        layers=shape.layers,
        kv_heads=shard.total,
        head_dim=shape.head_dim,
        chunk_tokens=pages.page_tokens,
        codec=policy.codec,
        rope=model.rope,
        group=group_name(0, shape.sides, range(first, last)),
        values="k" if latent else "k|v",
    )
    is_writer = rank.is_writer if rank.is_latent else shard.is_writer
    return Stored(pages, manifest, shard.heads, policy, is_writer)


def _shard(model: Model, rank: Rank, heads: int) -> HeadShard:
    shard = HeadShard(model.kv_heads, rank.rank, rank.ranks)
    if shard.width != heads or not shard.divides:
        raise UnsupportedError(
            f"the pool has {heads} of {model.kv_heads} KV heads on each of {rank.ranks} ranks"
        )
    return shard


def _first_layer(pool: Any) -> int:
    return int(getattr(pool, "start_layer", 0) or 0)


def _configuration(name: str, commit: str | None, trusted: bool) -> Any:
    try:
        return AutoConfig.from_pretrained(name, revision=commit, trust_remote_code=trusted)
    except (OSError, ValueError) as error:
        raise UnsupportedError(
            f"no configuration is found for the model {name!r};"
            ' name its folder with "model" in the extra config'
        ) from error


def _quantization(settings: Settings, arguments: Any, config: Mapping[str, Any]) -> str:
    if settings.quantization:
        return settings.quantization
    if asked := getattr(arguments, "quantization", None):
        return str(asked)
    found = config.get("quantization_config") or {}
    return str(found.get("quant_method", "")) if isinstance(found, Mapping) else ""


def _overrides(arguments: Any) -> dict[str, str]:
    """Return what SGLang was told of the model that its files do not say."""
    said: dict[str, str] = {}
    if (text := str(getattr(arguments, "json_model_override_args", None) or "{}")) != "{}":
        said["config"] = text
    if scales := getattr(arguments, "quantization_param_path", None):
        try:
            said["scales"] = hashlib.sha256(Path(scales).read_bytes()).hexdigest()
        except OSError as error:
            raise UnsupportedError(f"the scales of KV cannot be read: {error}") from error
    return said


def _version() -> str:
    try:
        return metadata.version("sglang")
    except metadata.PackageNotFoundError:
        return "of unknown version"

"""What a vLLM engine caches: its KV groups, and the manifests that say so."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from kvstore.compression.codecs import OPAQUE_CODECS
from kvstore.connectors.chunks import window_chunks
from kvstore.connectors.codecs import needs_values
from kvstore.connectors.identity import group_name
from kvstore.connectors.vllm_backends import ROWS, backend_name
from kvstore.connectors.vllm_settings import Settings
from kvstore.connectors.vllm_shards import HeadShard
from kvstore.connectors.vllm_tilings import Tiling, find_cpu_tiling, rows
from kvstore.connectors.weights import UnsupportedError
from kvstore.errors import ConfigError
from kvstore.protocol.manifest import Manifest
from kvstore.types import HeadRange

_USE_OPAQUE: Final = 'set layout to "opaque" in kv_connector_extra_config'
_KEYS_VALUES: Final = ("keys", "values")
_LATENT: Final = ("latent",)
_PLAIN_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers that share one block table and one shape: one namespace.

    A page is `[heads, block_tokens, width]`, with the heads of one rank. *window_tokens* is 0
    for full attention. *tiling* None stands for an opaque layout: the bytes of whole pages,
    which only an equal engine understands.
    """

    layer_names: tuple[str, ...]
    layers: tuple[int, ...]
    block_tokens: int
    chunk_tokens: int
    shard: HeadShard
    head_dim: int
    width: int
    sides: tuple[str, ...]
    dtype: torch.dtype
    window_tokens: int
    tiling: Tiling | None
    kernel: str

    @property
    def heads(self) -> int:
        """Heads of one rank."""
        return self.shard.width

    @property
    def page_bytes(self) -> int:
        """Bytes of one layer of one block."""
        return self.heads * self.block_tokens * self.width * int(self.dtype.itemsize)

    @property
    def blocks_per_chunk(self) -> int:
        """Blocks that make a chunk."""
        return self.chunk_tokens // self.block_tokens

    @property
    def window(self) -> int:
        """The window in chunks; 0 for full attention."""
        return self.window_tokens and window_chunks(self.window_tokens, self.chunk_tokens)

    @property
    def stored_heads(self) -> HeadRange | None:
        """The heads of this rank among those of a stored chunk; None: all that it has."""
        return None if self.tiling is None else self.shard.heads

    def on_rank(self, rank: int) -> KVGroup:
        """Return the same group as another rank has it."""
        return replace(self, shard=self.shard._replace(rank=rank))

    @property
    def is_latent(self) -> bool:
        """Whether tokens have one latent vector in place of keys and values."""
        return self.sides == _LATENT

    def manifest(self, *, model: str, revision: str, rope: str, codec: str = "raw") -> Manifest:
        """Return what another engine's group must equal to share its KV."""
        name = group_name(self.window_tokens, self.sides, self.layers)
        dtype = str(self.dtype).removeprefix("torch.")
        if self.tiling is not None:
            return Manifest(
                model=model,
                revision=revision,
                dtype=dtype,
                layers=len(self.layers),
                kv_heads=self.shard.total,
                head_dim=self.head_dim,
                chunk_tokens=self.chunk_tokens,
                codec=codec,
                rope=rope,
                group=name,
                values="k" if self.is_latent else "k|v",
            )
        return Manifest(
            model=model,
            revision=revision,
            dtype=dtype,
            layers=len(self.layers),
            kv_heads=1,
            head_dim=self.head_dim,
            chunk_tokens=self.chunk_tokens,
            layout="opaque",
            codec=codec,
            rope=rope,
            group=f"{name}; {self.kernel}; {self._heads}; blocks of {self.block_tokens}",
            opaque_bytes=self.page_bytes * len(self.layers) * self.blocks_per_chunk,
        )

    @property
    def _heads(self) -> str:
        """Which heads an opaque chunk has: those of one rank, and of no other."""
        if self.shard.ranks == 1:
            return f"{self.heads} heads"
        first, stop = self.shard.heads
        return f"heads {first}-{stop - 1} of {self.shard.total}"


def groups_of(
    vllm_config: Any, kv_cache_config: Any, settings: Settings, rank: int = 0
) -> list[KVGroup]:
    """Return the KV groups of an engine, as tensor-parallel *rank* has them.

    Raises `UnsupportedError` when some of its KV cannot be kept, and `ConfigError` when its
    block size does not divide the chunk that was asked for.
    """
    _refuse_unsupported(vllm_config)
    specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    chunk_tokens = settings.chunk_for(math.lcm(*(spec.block_size for spec in specs)))
    layout = getattr(kv_cache_config, "kv_cache_layout", None)
    groups = []
    for group in kv_cache_config.kv_cache_groups:
        shard = _shard(group.kv_cache_spec, vllm_config, rank)
        kernel = _kernel(vllm_config, group.kv_cache_spec)
        groups.append(_group(group, shard, chunk_tokens, settings, kernel, layout))
    if needs_values(settings.policy):
        _refuse_opaque(groups, settings.policy.codec)
    return groups


def _refuse_opaque(groups: Sequence[KVGroup], codec: str) -> None:
    for group in groups:
        if group.tiling is None:
            raise ConfigError(
                f"kv_connector_extra_config.codec is {codec!r}, which must know what the bytes of"
                f" pages are; those of {group.kernel} are not understood:"
                f" {', '.join(OPAQUE_CODECS)} are for those"
            )


def _refuse_unsupported(vllm_config: Any) -> None:
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    for name in (
        "pipeline_parallel_size",
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
    ):
        if getattr(parallel, name, 1) > 1:
            raise UnsupportedError(f"{name} is {getattr(parallel, name)}; only 1 is supported")
    if str(cache.cache_dtype) not in ("auto", "bfloat16", "float16", "float32"):
        raise UnsupportedError(
            f"the KV dtype is {cache.cache_dtype!r}, whose scales are not kept with it;"
            " start vLLM with --kv-cache-dtype auto"
        )
    speculative = getattr(vllm_config, "speculative_config", None)
    if speculative is not None and speculative.use_eagle():
        raise UnsupportedError(
            "the draft layers of EAGLE and MTP look one token ahead of the prefix they are kept for"
        )
    if not cache.enable_prefix_caching:
        raise UnsupportedError("prefix caching is off; start vLLM with --enable-prefix-caching")


def _shard(spec: Any, vllm_config: Any, rank: int) -> HeadShard:
    """Return what *rank* has of the heads of a layer."""
    ranks = getattr(vllm_config.parallel_config, "tensor_parallel_size", 1)
    here = getattr(spec, "num_kv_heads", 1)
    if ranks == 1:
        return HeadShard(here)
    if _is_latent(spec):
        return HeadShard(1, rank, ranks)
    if here > 1:
        return HeadShard(here * ranks, rank, ranks)
    # One head may be a rank's own, or one that neighbours have, too.
    total = getattr(spec, "max_tp_shards", None)
    shard = HeadShard(total or vllm_config.model_config.get_total_num_kv_heads(), rank, ranks)
    if shard.width != here or not shard.divides:
        raise UnsupportedError(
            f"{shard.total} KV heads are not shared evenly by tensor_parallel_size {ranks}"
        )
    return shard


def _group(
    group: Any,
    shard: HeadShard,
    chunk_tokens: int,
    settings: Settings,
    kernel: str,
    layout: str | None,
) -> KVGroup:
    spec, names = group.kv_cache_spec, tuple(group.layer_names)
    _refuse_unknown_state(spec, names[0])
    numbered = sorted((_layer_number(name), name) for name in names)
    numbers = tuple(number for number, _ in numbered)
    if len(set(numbers)) < len(numbers):
        raise UnsupportedError(f"layers {', '.join(names)} have no order of their own")
    is_latent = _is_latent(spec)
    values = 0 if is_latent else getattr(spec, "head_size_v", spec.head_size)
    return KVGroup(
        layer_names=tuple(name for _, name in numbered),
        layers=numbers,
        block_tokens=spec.block_size,
        chunk_tokens=chunk_tokens,
        shard=shard,
        head_dim=spec.head_size,
        width=spec.head_size + values,
        sides=_LATENT if is_latent else _KEYS_VALUES,
        dtype=spec.dtype,
        window_tokens=spec.sliding_window if _kind(spec) == "SlidingWindowSpec" else 0,
        tiling=_tiling(spec, settings, kernel),
        kernel=f"vllm {_vllm_version()} {kernel} {layout}",
    )


def _kind(spec: Any) -> str:
    return type(spec).__name__


def _is_latent(spec: Any) -> bool:
    return _kind(spec) == "MLAAttentionSpec"


def _refuse_unknown_state(spec: Any, layer: str) -> None:
    """Raise `UnsupportedError` unless *layer* keeps one plain vector, or two, for every token."""
    if _kind(spec) not in ("FullAttentionSpec", "SlidingWindowSpec", "MLAAttentionSpec"):
        raise UnsupportedError(f"layer {layer} keeps its state as {_kind(spec)}, without chunks")
    packed = getattr(spec, "state_content_bytes", None) or getattr(spec, "num_head_slots", None)
    if spec.dtype not in _PLAIN_DTYPES or packed:
        raise UnsupportedError(
            f"layer {layer} keeps its state packed, as {spec.dtype};"
            " start vLLM with --kv-cache-dtype auto"
        )
    if getattr(spec, "tokens_per_state", 1) != 1:
        raise UnsupportedError(f"layer {layer} keeps one state for several tokens")


def _tiling(spec: Any, settings: Settings, kernel: str) -> Tiling | None:
    """Return how pages are converted, or None when they are kept as they are.

    Converting costs a transposition on CPUs, so their pages of 16-bit elements, which the
    engines that share KV seldom have in common, are converted on request only, or for a codec.
    """
    wanted = settings.layout == "canonical"
    if settings.layout == "opaque":
        return None
    is_latent = _is_latent(spec)
    if not is_latent and spec.head_size != getattr(spec, "head_size_v", spec.head_size):
        if wanted:
            raise UnsupportedError(f"keys and values differ in width; {_USE_OPAQUE}")
        return None
    if is_latent or kernel.endswith(f" {ROWS}"):
        return rows
    if not kernel.startswith("cpu "):
        if wanted:
            raise UnsupportedError(f"the pages of {kernel} are not understood; {_USE_OPAQUE}")
        return None
    if not wanted and not needs_values(settings.policy) and spec.dtype != torch.float32:
        return None
    isa = kernel.removeprefix("cpu ")
    # Heads do not matter to a tiling: one is as good as all.
    tiling = find_cpu_tiling(1, spec.block_size, spec.head_size, spec.dtype, isa)
    if tiling is None and wanted:
        raise UnsupportedError(
            f"the pages of CPU attention {isa!r} in {spec.dtype} are not understood;"
            ' set layout to "auto" in kv_connector_extra_config'
        )
    return tiling


def _kernel(vllm_config: Any, spec: Any) -> str:
    """Return what decides how pages are laid out: the device, and who writes them there."""
    device = str(getattr(getattr(vllm_config, "device_config", None), "device_type", "cpu"))
    if device != "cpu":
        return f"{device} {backend_name(vllm_config)}"
    return f"cpu {'latent' if _is_latent(spec) else _cpu_isa(spec)}"


def _cpu_isa(spec: Any) -> str:
    """Return the instruction set that decides how CPU attention lays out its pages."""
    try:
        from vllm.v1.attention.backends import cpu_attn  # noqa: PLC0415  # one of many backends

        isa = cpu_attn._get_attn_isa(spec.dtype, spec.block_size, spec.head_size)  # noqa: SLF001
    except (ImportError, AttributeError) as error:
        raise UnsupportedError(
            f"this vLLM does not say how its pages are laid out: {error}"
        ) from error
    return str(isa)


def _vllm_version() -> str:
    import vllm  # noqa: PLC0415  # its version only

    return str(vllm.__version__)


def _layer_number(name: str) -> int:
    """Return the number in *name*, as in `model.layers.7.self_attn.attn`."""
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", name)
    if len(numbers) != 1:
        raise UnsupportedError(f"layer {name!r} has no number of its own")
    return int(numbers[0])

"""What a vLLM engine caches: its KV groups, and the manifests that say so."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch

from kvstore.connectors.chunks import window_chunks
from kvstore.connectors.identity import group_name
from kvstore.connectors.vllm_settings import Settings
from kvstore.connectors.vllm_tilings import Tiling, find_cpu_tiling
from kvstore.errors import KVStoreError
from kvstore.protocol.manifest import Manifest


class UnsupportedError(KVStoreError):
    """This engine's KV cannot be kept. The message says why and, if possible, what to do."""


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers that share one block table and one shape: one namespace.

    *window_tokens* is 0 for full attention. *tiling* None stands for an opaque layout: the
    bytes of whole pages, which only an equal engine understands.
    """

    layer_names: tuple[str, ...]
    layers: tuple[int, ...]
    block_tokens: int
    chunk_tokens: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    window_tokens: int
    page_bytes: int
    tiling: Tiling | None
    kernel: str

    @property
    def blocks_per_chunk(self) -> int:
        """Blocks that make a chunk."""
        return self.chunk_tokens // self.block_tokens

    @property
    def window(self) -> int:
        """The window in chunks; 0 for full attention."""
        return self.window_tokens and window_chunks(self.window_tokens, self.chunk_tokens)

    def manifest(self, *, model: str, revision: str, rope: str) -> Manifest:
        """Return what another engine's group must equal to share its KV."""
        sides = ("keys", "values")
        name = group_name(self.window_tokens, sides, self.layers)
        dtype = str(self.dtype).removeprefix("torch.")
        if self.tiling is not None:
            return Manifest(
                model=model,
                revision=revision,
                dtype=dtype,
                layers=len(self.layers),
                kv_heads=self.heads,
                head_dim=self.head_dim,
                chunk_tokens=self.chunk_tokens,
                rope=rope,
                group=name,
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
            rope=rope,
            group=f"{name}; {self.kernel}; {self.heads} heads; blocks of {self.block_tokens}",
            opaque_bytes=self.page_bytes * len(self.layers) * self.blocks_per_chunk,
        )


def groups_of(vllm_config: Any, kv_cache_config: Any, settings: Settings) -> list[KVGroup]:
    """Return the KV groups of an engine.

    Raises `UnsupportedError` when some of its KV cannot be kept, and `ConfigError` when its
    block size does not divide the chunk that was asked for.
    """
    _refuse_unsupported(vllm_config)
    specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    chunk_tokens = settings.chunk_for(math.lcm(*(spec.block_size for spec in specs)))
    return [
        _group(group, chunk_tokens, settings, getattr(kv_cache_config, "kv_cache_layout", None))
        for group in kv_cache_config.kv_cache_groups
    ]


def _refuse_unsupported(vllm_config: Any) -> None:
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    for name in (
        "tensor_parallel_size",
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


def _group(group: Any, chunk_tokens: int, settings: Settings, layout: str | None) -> KVGroup:
    spec, names = group.kv_cache_spec, tuple(group.layer_names)
    kind = type(spec).__name__
    if kind not in ("FullAttentionSpec", "SlidingWindowSpec"):
        raise UnsupportedError(f"layer {names[0]} keeps its state as {kind}, which has no chunks")
    if spec.head_size != getattr(spec, "head_size_v", spec.head_size):
        raise UnsupportedError(f"keys and values of layer {names[0]} differ in width")
    numbered = sorted((_layer_number(name), name) for name in names)
    numbers = tuple(number for number, _ in numbered)
    if len(set(numbers)) < len(numbers):
        raise UnsupportedError(f"layers {', '.join(names)} have no order of their own")
    isa = _cpu_isa(spec)
    return KVGroup(
        layer_names=tuple(name for _, name in numbered),
        layers=numbers,
        block_tokens=spec.block_size,
        chunk_tokens=chunk_tokens,
        heads=spec.num_kv_heads,
        head_dim=spec.head_size,
        dtype=spec.dtype,
        window_tokens=spec.sliding_window if kind == "SlidingWindowSpec" else 0,
        page_bytes=spec.page_size_bytes,
        tiling=_tiling(spec, settings, isa),
        kernel=f"vllm {_vllm_version()} cpu {isa} {layout}",
    )


def _tiling(spec: Any, settings: Settings, isa: str) -> Tiling | None:
    """Return how pages are converted, or None when they are kept as they are.

    Converting costs a transposition, so pages of 16-bit elements, which the engines that share
    KV seldom have in common, are converted on request only.
    """
    wanted = settings.layout == "canonical"
    if not wanted and (settings.layout == "opaque" or spec.dtype != torch.float32):
        return None
    tiling = find_cpu_tiling(spec.num_kv_heads, spec.block_size, spec.head_size, spec.dtype, isa)
    if tiling is None and wanted:
        raise UnsupportedError(
            f"the pages of CPU attention {isa!r} in {spec.dtype} are not understood;"
            ' set layout to "auto" in kv_connector_extra_config'
        )
    return tiling


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

"""Host pools of SGLang's own classes, small and full of noise, and what a page of them means."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig
from sglang.srt.mem_cache.pool_host import mha, mla
from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory

from kvstore.connectors.sglang import KVStoreHiCache

LAYERS, HEADS, DIM = 4, 2, 16
PAGE = 8
KEYS_VALUES_LAYOUTS = (
    "layer_first",
    "page_first",
    "page_first_direct",
    "page_head",
    "page_unified",
)
LATENT_LAYOUTS = ("layer_first", "page_first", "page_first_direct", "page_unified")
# The weights have a name, and calls the time that a busy machine may need.
COMMON = {"revision": "tests/tiny@1", "timeout_seconds": 20.0}


def _allocate(dims: Sequence[int], *, dtype: torch.dtype, **_: object) -> torch.Tensor:
    return torch.zeros(tuple(dims), dtype=dtype)


for module in (mha, mla):
    module.ALLOC_MEMORY_FUNCS = defaultdict(lambda: _allocate)


def _filled(kind: type, pages: int, layout: str, seed: int, **fields: object) -> Any:
    """Return a pool as SGLang's constructor leaves it, without its device side."""
    pool = object.__new__(kind)
    fields = {
        "layout": layout,
        "page_size": PAGE,
        "page_num": pages,
        "size": pages * PAGE,
        "layer_num": LAYERS,
        "start_layer": 0,
        "end_layer": LAYERS,
        "dtype": torch.float32,
        "device": "cpu",
        "pin_memory": False,
        "allocator": None,
        "_transfer_device": torch.device("cpu"),
    } | fields
    pool.__dict__.update(fields)
    pool.kv_buffer = pool.init_kv_buffer()
    generator = torch.Generator().manual_seed(seed)
    pool.kv_buffer.copy_(torch.randn(pool.kv_buffer.shape, generator=generator))
    return pool


def keys_values(
    layout: str,
    *,
    pages: int = 8,
    heads: int = HEADS,
    groups: int = 1,
    seed: int = 1,
    **fields: Any,
) -> Any:
    return _filled(
        mha.MHATokenToKVPoolHost,
        pages,
        layout,
        seed,
        **(
            {"head_num": heads, "head_dim": DIM, "v_head_dim": DIM, "head_group_num": groups}
            | fields
        ),
    )


def latent(layout: str, *, pages: int = 8, seed: int = 1) -> Any:
    return _filled(mla.MLATokenToKVPoolHost, pages, layout, seed, kv_cache_dim=DIM)


def page_of(pool: Any, page: int) -> torch.Tensor:
    """Return `[layer, side, head, token, dim]` of one page, read one token at a time."""
    sides = 1 if isinstance(pool, mla.MLATokenToKVPoolHost) else 2
    heads = getattr(pool, "head_num", 1)
    found = torch.empty((LAYERS, sides, heads, PAGE, DIM), dtype=pool.dtype)
    for layer in range(LAYERS):
        for side in range(sides):
            for token in range(PAGE):
                row = _row(pool, page, layer, side, token)
                found[layer, side, :, token] = row.reshape(heads, DIM)
    return found


def _row(pool: Any, page: int, layer: int, side: int, token: int) -> torch.Tensor:
    """Return what all heads have of one token: the shapes are SGLang's, from its documentation."""
    buffer, place = pool.kv_buffer, page * PAGE + token
    if isinstance(pool, mla.MLATokenToKVPoolHost):
        return {
            "layer_first": lambda: buffer[layer, place],
            "page_first": lambda: buffer[place, layer],
            "page_first_direct": lambda: buffer[page, layer, token],
            "page_unified": lambda: buffer[page, layer, token],
        }[pool.layout]()
    return {
        "layer_first": lambda: buffer[side, layer, place],
        "page_first": lambda: buffer[side, place, layer],
        "page_first_direct": lambda: buffer[side, page, layer, token],
        "page_head": lambda: buffer[side, page, :, token, layer],
        "page_unified": lambda: buffer[page, :, layer, side, token],
    }[pool.layout]()


def indices(pages: Sequence[int]) -> torch.Tensor:
    """Return the token indices of *pages*."""
    return torch.cat([torch.arange(page * PAGE, (page + 1) * PAGE) for page in pages])


def page_hashes(tokens: Sequence[int], page: int = PAGE) -> list[str]:
    """Return the keys that SGLang gives the full pages of *tokens*."""
    keys, parent = [], b""
    for start in range(0, len(tokens) - page + 1, page):
        words = np.array(tokens[start : start + page], dtype="<u4").tobytes()
        parent = hashlib.sha256(parent + words).digest()
        keys.append(parent.hex())
    return keys


def some_keys(count: int, *, seed: int) -> list[str]:
    generator = np.random.default_rng(seed)
    return page_hashes(generator.integers(2, 30_000, count * PAGE).tolist())


def storage(
    socket: Path, model: Path, pool: Any, *, is_mla: bool = False, **ours: Any
) -> KVStoreHiCache:
    """Return what SGLang itself makes of the settings, with *pool* registered."""
    ranks = {name: ours.pop(name) for name in ("tp_rank", "tp_size") if name in ours}
    extra = {
        "backend_name": "kvstore",
        "module_path": "kvstore.connectors.sglang",
        "class_name": "KVStoreHiCache",
        "interface_v1": 1,
        "socket": str(socket),
    }
    config = HiCacheStorageConfig(
        **({"tp_rank": 0, "tp_size": 1} | ranks),
        pp_rank=0,
        pp_size=1,
        attn_cp_rank=0,
        attn_cp_size=1,
        is_mla_model=is_mla,
        enable_storage_metrics=False,
        is_page_first_layout=pool.layout == "page_first",
        model_name=str(model),
        extra_config=extra | COMMON | ours,
    )
    made = StorageBackendFactory.create_backend("dynamic", config, pool)
    made.register_mem_pool_host(pool)
    made.on_host_pools_registered()
    return made

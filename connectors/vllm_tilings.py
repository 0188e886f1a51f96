"""How attention kernels lay out the keys and values of one block, and how to tell.

A *tiling* is a permutation: it pairs views of a page with views of the same elements in
canonical order, so that one copy in either direction converts. Which tiling is the right one
is not believed but tried: the engine's own kernel writes known keys and values to scratch
pages, and they must be found in their places.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch

log = logging.getLogger("vllm.kvstore")

Pair = tuple[torch.Tensor, torch.Tensor]
Tiling = Callable[[torch.Tensor, torch.Tensor], Iterator[Pair]]
"""From a page `[heads, tokens, sides * dim]` and its canonical form `[side, heads, tokens, dim]`
to pairs of equally shaped views: of the page, and of the same elements in canonical order."""

_PROBE_BLOCKS: Final = 2
_AMX_TOKENS: Final = 16


def rows(page: torch.Tensor, sides: torch.Tensor) -> Iterator[Pair]:
    """Every token is one row: its keys, then its values; or its latent vector."""
    dim = sides.shape[-1]
    for number, side in enumerate(sides):
        yield page[..., number * dim : (number + 1) * dim], side


def transposed_keys(page: torch.Tensor, sides: torch.Tensor) -> Iterator[Pair]:
    """In the first half `[dim, tokens]` of keys, in the second `[tokens, dim]` of values."""
    keys, values = sides
    heads, tokens, dim = keys.shape
    first, second = _halves(page)
    yield first.view(heads, dim, tokens).transpose(1, 2), keys
    yield second.view(heads, tokens, dim), values


def amx_tiles(page: torch.Tensor, sides: torch.Tensor) -> Iterator[Pair]:
    """Pairs of 16-bit elements side by side, as AMX tiles want them.

    Keys in tiles `[dim / 2, 16 tokens, 2 dims]`, values in `[tokens / 2, 16 dims, 2 tokens]`.
    """
    keys, values = sides
    heads, tokens, dim = keys.shape
    wide, groups = _AMX_TOKENS, tokens // _AMX_TOKENS
    first, second = _halves(page)
    yield (
        first.view(heads, groups, dim // 2, wide, 2).permute(0, 1, 3, 2, 4),
        keys.view(heads, groups, wide, dim // 2, 2),
    )
    yield (
        second.view(heads, dim // wide, tokens // 2, wide, 2).permute(0, 2, 4, 1, 3),
        values.view(heads, tokens // 2, 2, dim // wide, wide),
    )


def find_cpu_tiling(
    heads: int, block_tokens: int, dim: int, dtype: torch.dtype, isa: str
) -> Tiling | None:
    """Return the tiling that the CPU attention kernel for *isa* uses, if it is one of ours."""
    try:
        return _find(heads, block_tokens, dim, dtype, isa)
    except Exception as error:  # noqa: BLE001  # whatever the kernel does not like: it is unknown
        log.info("kvstore: the layout of CPU attention was not recognised: %s", error)
        return None


def _find(heads: int, block_tokens: int, dim: int, dtype: torch.dtype, isa: str) -> Tiling | None:
    keys, values = (_known(heads, block_tokens, dim, dtype, seed) for seed in (1, 2))
    pages = torch.zeros((_PROBE_BLOCKS, heads, block_tokens, 2 * dim), dtype=dtype)
    _write(pages, keys, values, isa)
    for tiling in (transposed_keys, amx_tiles, rows):
        if all(
            _holds(tiling, page, torch.stack((keys[:, span], values[:, span])))
            for page, span in zip(pages, _spans(block_tokens), strict=True)
        ):
            return tiling
    return None


def _known(heads: int, block_tokens: int, dim: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((heads, _PROBE_BLOCKS * block_tokens, dim), generator=generator).to(dtype)


def _write(pages: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, isa: str) -> None:
    """Have vLLM's kernel write *keys* and *values* to *pages*, from the first slot on."""
    from vllm import _custom_ops as ops  # noqa: PLC0415  # only CPU builds have this kernel

    blocks, heads, block_tokens, width = pages.shape
    sides = pages.view(blocks, heads, 2 * block_tokens, width // 2).chunk(2, dim=2)
    slots = torch.arange(blocks * block_tokens, dtype=torch.int64)
    write: Any = ops.cpu_attn_reshape_and_cache
    write(
        keys.transpose(0, 1).contiguous(),
        values.transpose(0, 1).contiguous(),
        *sides,
        slots,
        isa,
        k_scale=1.0,
        v_scale=1.0,
        kv_cache_dtype="auto",
    )


def _holds(tiling: Tiling, page: torch.Tensor, sides: torch.Tensor) -> bool:
    found = torch.empty_like(sides)
    for source, target in tiling(page, found):
        target.copy_(source)
    return bool(torch.equal(found, sides))


def _spans(block_tokens: int) -> list[slice]:
    return [
        slice(block * block_tokens, (block + 1) * block_tokens) for block in range(_PROBE_BLOCKS)
    ]


def _halves(page: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the two halves of each head's bytes; raises when they do not lie together."""
    # A view, never a copy: what is written to it must reach the page.
    flat = page.view(page.shape[0], -1)
    half = flat.shape[1] // 2
    return flat[:, :half], flat[:, half:]

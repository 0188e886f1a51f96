"""Where the chunks of one KV group lie in an engine's memory, and how they get in and out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from kvstore.client.sync import StoreReport
from kvstore.connectors.chunks import ChunkCache
from kvstore.connectors.vllm_layouts import KVGroup, UnsupportedError
from kvstore.connectors.vllm_metadata import NOWHERE, Span
from kvstore.limits import MIB
from kvstore.transfer.copies import Runs, gather, scatter
from kvstore.types import Digest

# What is converted at a time: enough to keep the daemon busy, and no more memory than that.
_STAGING_BYTES: Final = 32 * MIB
_TESTED: Final = Digest(bytes(32))


class GroupPages:
    """The pages of one KV group. Used by one thread."""

    def __init__(self, group: KVGroup, layers: Sequence[torch.Tensor]) -> None:
        """Raise `UnsupportedError` when *layers* are not pages of *group*."""
        self.group = group
        for layer in layers:
            _check_pages(group, layer)
        self._layers = list(layers)
        self._bases = np.array([layer.data_ptr() for layer in layers], dtype=np.uint64)
        self._stride_bytes = layers[0].stride(0) * layers[0].itemsize
        # What is to be written nowhere is written here.
        self._nowhere = torch.empty(group.page_bytes, dtype=torch.uint8)
        self._staging: torch.Tensor | None = None

    def load(self, cache: ChunkCache, span: Span) -> int:
        """Fill the blocks of *span*; return how many leading chunks are whole and right."""
        if self.group.tiling is None:
            targets = [self._page_runs(blocks) for blocks in self._per_chunk(span)]
            return cache.load(span.digests, targets)
        loaded = 0
        for start, stop in self._batches(span):
            staged = self._staged(stop - start)
            good = cache.load(span.digests[start:stop], [_whole(chunk) for chunk in staged])
            for chunk, blocks in zip(staged[:good], self._per_chunk(span, start), strict=False):
                self._convert(chunk, blocks, into_pages=True)
            loaded += good
            if good < stop - start:
                break
        return loaded

    def store(self, cache: ChunkCache, span: Span) -> int:
        """Store the chunks of *span* from their blocks; return how many are new."""
        if self.group.tiling is None:
            sources = [self._page_runs(blocks) for blocks in self._per_chunk(span)]
            return cache.store(span.digests, sources, parent=span.parent).stored
        stored, parent = 0, span.parent
        for start, stop in self._batches(span):
            staged = self._staged(stop - start)
            for chunk, blocks in zip(staged, self._per_chunk(span, start), strict=False):
                self._convert(chunk, blocks, into_pages=False)
            digests = span.digests[start:stop]
            sources = [_whole(chunk) for chunk in staged]
            stored += cache.store(digests, sources, parent=parent).stored
            parent = digests[-1]
        return stored

    def _per_chunk(self, span: Span, start: int = 0) -> Iterator[list[int]]:
        for index in range(start, len(span.digests)):
            yield span.blocks_of(index, index + 1)

    def _page_runs(self, blocks: Sequence[int]) -> Runs:
        """Return the pages of *blocks* as they lie, layer by layer."""
        numbers = np.asarray(blocks, dtype=np.int64)
        offsets = np.maximum(numbers, 0).astype(np.uint64) * np.uint64(self._stride_bytes)
        addresses = self._bases[:, None] + offsets
        addresses[:, numbers == NOWHERE] = self._nowhere.data_ptr()
        return Runs(addresses.ravel(), self.group.page_bytes, owner=(self._layers, self._nowhere))

    def _batches(self, span: Span) -> Iterator[tuple[int, int]]:
        """Yield the bounds of runs of chunks that fit the staging memory."""
        most = max(1, _STAGING_BYTES // self._chunk_bytes)
        for start in range(0, len(span.digests), most):
            yield start, min(start + most, len(span.digests))

    @property
    def _chunk_bytes(self) -> int:
        return self.group.page_bytes * len(self._layers) * self.group.blocks_per_chunk

    def _staged(self, chunks: int) -> torch.Tensor:
        """Return room for canonical chunks, `[chunk, layer, k|v, head, token, dim]`."""
        if self._staging is None or len(self._staging) < chunks:
            group = self.group
            shape = (chunks, len(self._layers), 2, group.heads, group.chunk_tokens, group.head_dim)
            self._staging = torch.empty(shape, dtype=group.dtype)
        return self._staging[:chunks]

    def _convert(self, chunk: torch.Tensor, blocks: Sequence[int], *, into_pages: bool) -> None:
        """Copy one chunk between its canonical form and the engine's *blocks*."""
        assert self.group.tiling is not None, "opaque pages are not converted"
        size = self.group.block_tokens
        for layer, sides in zip(self._layers, chunk, strict=True):
            for position, block in enumerate(blocks):
                if block == NOWHERE:
                    continue
                keys, values = sides[:, :, position * size : (position + 1) * size]
                for page, plain in self.group.tiling(layer[block], keys, values):
                    if into_pages:
                        page.copy_(plain)
                    else:
                        plain.copy_(page)


def self_test(group: KVGroup, layers: Sequence[torch.Tensor]) -> None:
    """Store known bytes from scratch pages and load them into others.

    The pages are shaped like *layers*. Raises `UnsupportedError` unless the bytes come back as
    they were, all of them, and nothing else is written.
    """
    each = group.blocks_per_chunk
    first, second = ([_scratch(layer, 2 * each + 1, seed) for layer in layers] for seed in (1, 2))
    before = [layer.clone() for layer in second]
    stored = list(range(0, 2 * each, 2))
    loaded = list(range(2 * each - 1, 0, -2))
    kept = _OneChunk()
    GroupPages(group, first).store(kept, Span(0, [_TESTED], stored))
    GroupPages(group, second).load(kept, Span(0, [_TESTED], loaded))
    for source, target, old in zip(first, second, before, strict=True):
        old[loaded] = source[stored]
        if not torch.equal(target, old):
            raise UnsupportedError(
                f"pages of {group.kernel} did not come back as they were stored;"
                ' set layout to "opaque" in kv_connector_extra_config, and report this'
            )


@dataclass
class _OneChunk:
    """A cache of one chunk, in memory."""

    payload: npt.NDArray[np.uint8] | None = None

    def lookup(self, digests: Sequence[Digest], *, window: int = 0) -> int:
        return len(digests) - window

    def load(self, digests: Sequence[Digest], targets: Sequence[Runs]) -> int:
        assert self.payload is not None, "stored before it is loaded"
        scatter(targets[0], self.payload, checksums=False)
        return len(digests)

    def store(
        self, digests: Sequence[Digest], sources: Sequence[Runs], *, parent: Digest | None = None
    ) -> StoreReport:
        assert parent is None, "the chunk is the first"
        self.payload = np.empty(sources[0].size_bytes, dtype=np.uint8)
        gather(self.payload, sources[0], checksums=False)
        return StoreReport(len(digests), 0, 0, sources[0].size_bytes)

    def close(self) -> None:
        self.payload = None


def _scratch(like: torch.Tensor, blocks: int, seed: int) -> torch.Tensor:
    """Return *blocks* pages shaped like those of *like*, full of noise."""
    generator = torch.Generator().manual_seed(seed)
    shape = (blocks, *like.shape[1:])
    return torch.randn(shape, generator=generator).to(like.dtype)


def _whole(chunk: torch.Tensor) -> Runs:
    start = np.array([chunk.data_ptr()], dtype=np.uint64)
    return Runs(start, chunk.numel() * chunk.itemsize, owner=chunk)


def _check_pages(group: KVGroup, layer: torch.Tensor) -> None:
    expected = (group.heads, group.block_tokens, 2 * group.head_dim)
    if layer.device.type != "cpu":
        raise UnsupportedError(f"KV on {layer.device.type} is not yet kept, only in host memory")
    if layer.dtype != group.dtype or tuple(layer.shape[1:]) != expected:
        raise UnsupportedError(
            f"pages are {tuple(layer.shape[1:])} in {layer.dtype}, not {expected} in {group.dtype}"
        )
    if not layer[0].is_contiguous() or layer[0].numel() * layer.itemsize != group.page_bytes:
        raise UnsupportedError("the bytes of a page do not lie behind each other")

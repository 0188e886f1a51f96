"""Where the chunks of one KV group lie in an engine's memory, and how they get in and out."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from kvstore.client.gpu import DeviceCache
from kvstore.client.sync import StoreReport
from kvstore.connectors.chunks import ChunkCache
from kvstore.connectors.vllm_lanes import LaneMover
from kvstore.connectors.vllm_layouts import KVGroup
from kvstore.connectors.vllm_metadata import NOWHERE, Span
from kvstore.connectors.vllm_movers import (
    DeviceMover,
    Mover,
    choose_mover,
    chunk_shape,
    page_order,
)
from kvstore.connectors.vllm_transfers import Urgency
from kvstore.connectors.weights import UnsupportedError
from kvstore.gpu.counters import DeviceCounters
from kvstore.limits import MIB
from kvstore.transfer.copies import Runs, gather, scatter
from kvstore.types import Digest

log = logging.getLogger("vllm.kvstore")

# What is converted at a time: enough to keep the daemon busy, and no more memory than that.
_STAGING_BYTES: Final = 32 * MIB
_TESTED: Final = Digest(bytes(32))

MakeMover = Callable[[KVGroup, Sequence[torch.Tensor]], Mover]


class GroupPages:
    """The pages of one KV group. One thread loads, one stores; one may do both."""

    def __init__(
        self,
        group: KVGroup,
        layers: Sequence[torch.Tensor],
        make_mover: MakeMover = choose_mover,
    ) -> None:
        """Raise `UnsupportedError` when *layers* are not pages of *group*."""
        self.group = group
        self._layers = [_as_pages(group, layer) for layer in layers]
        self._mover = make_mover(group, self._layers)
        self._shape = chunk_shape(group, self._layers)
        first = self._layers[0]
        # Opaque pages in host memory, each in one piece, are copied from where they lie.
        self._is_direct = (
            group.tiling is None
            and first.device.type == "cpu"
            and all(_is_whole(layer) for layer in self._layers)
        )
        self._bases = np.array([layer.data_ptr() for layer in self._layers], dtype=np.uint64)
        self._stride_bytes = first.stride(0) * first.itemsize
        # What is to be written nowhere is written here.
        self._nowhere = torch.empty(group.page_bytes, dtype=torch.uint8)
        self._staging: dict[Urgency, torch.Tensor] = {}

    def close(self) -> None:
        """Give back what was taken of a device."""
        if isinstance(self._mover, LaneMover):
            self._mover.close()

    @property
    def moves_both_ways(self) -> bool:
        """Whether loads and stores get on beside each other: not where the processor moves."""
        return isinstance(self._mover, LaneMover)

    @property
    def device_counters(self) -> list[DeviceCounters]:
        """What a GPU has moved of these pages, and every fallback."""
        return self._mover.all_counters if isinstance(self._mover, LaneMover) else []

    def fence(self) -> Any:
        """Return what transfers begun now have to wait for."""
        return self._mover.fence()

    def load(self, cache: ChunkCache, span: Span, after: Any = None) -> int:
        """Fill the blocks of *span*; return how many leading chunks are whole and right."""
        if (around := self._around(cache, after)) is not None:
            return around.load(span.digests, list(self._per_chunk(span)), after=after)
        if self._is_direct:
            targets = [self._page_runs(blocks) for blocks in self._per_chunk(span)]
            return cache.load(span.digests, targets)
        loaded = 0
        for start, stop in self._batches(span):
            staged = self._staged(Urgency.LOAD, stop - start)
            good = cache.load(span.digests[start:stop], [_whole(chunk) for chunk in staged])
            blocks = list(self._per_chunk(span, start, start + good))
            self._mover.scatter(staged[:good], blocks, after)
            loaded += good
            if good < stop - start:
                break
        return loaded

    def store(self, cache: ChunkCache, span: Span, after: Any = None) -> StoreReport:
        """Store the chunks of *span* from their blocks; return what became of them."""
        if (around := self._around(cache, after)) is not None:
            blocks = list(self._per_chunk(span))
            return around.store(span.digests, blocks, parent=span.parent, after=after)
        stored = StoreReport(0, 0, 0, 0)
        parent = span.parent
        for start, stop in self._batches(span):
            if self._is_direct:
                sources = [self._page_runs(blocks) for blocks in self._per_chunk(span, start, stop)]
            else:
                staged = self._staged(Urgency.STORE, stop - start)
                self._mover.gather(staged, list(self._per_chunk(span, start, stop)), after)
                sources = [_whole(chunk) for chunk in staged]
            digests = span.digests[start:stop]
            report = cache.store(digests, sources, parent=parent)
            stored = StoreReport(
                stored.stored + report.stored,
                stored.present + report.present,
                stored.refused + report.refused,
                stored.bytes_stored + report.bytes_stored,
            )
            parent = digests[-1]
        return stored

    def _per_chunk(
        self, span: Span, start: int = 0, stop: int | None = None
    ) -> Iterator[list[int]]:
        for index in range(start, len(span.digests) if stop is None else stop):
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
        count = len(span.digests)
        most = count if self._is_direct else max(1, _STAGING_BYTES // self._chunk_bytes)
        for start in range(0, count, most):
            yield start, min(start + most, count)

    @property
    def _chunk_bytes(self) -> int:
        return self.group.page_bytes * len(self._layers) * self.group.blocks_per_chunk

    def _staged(self, urgency: Urgency, chunks: int) -> torch.Tensor:
        """Return room for chunks in host memory, as movers know them."""
        staging = self._staging.get(urgency)
        if staging is None or len(staging) < chunks:
            pin = self._layers[0].device.type == "cuda"
            staging = torch.empty((chunks, *self._shape), dtype=self.group.dtype, pin_memory=pin)
            self._staging[urgency] = staging
        return staging[:chunks]

    def _around(self, cache: ChunkCache, after: Any) -> DeviceCache | None:
        """Return what moves chunks between our pages and the daemon without us, if anything."""
        return self._mover.direct(cache, after) if isinstance(self._mover, LaneMover) else None


def checked_pages(
    group: KVGroup, layers: Sequence[torch.Tensor], make_mover: MakeMover = choose_mover
) -> GroupPages:
    """Return the pages of *group*, once a test has shown that they are understood.

    Where the device cannot move them by itself, torch does. Raises what the test raises.
    """
    pages = GroupPages(group, layers, make_mover)
    try:
        self_test(group, layers, make_mover)
    except Exception:
        pages.close()
        if not pages.moves_both_ways:
            raise
        log.exception("kvstore: the device does not move pages as it should: torch moves them")
        return checked_pages(group, layers, DeviceMover)
    return pages


def self_test(
    group: KVGroup, layers: Sequence[torch.Tensor], make_mover: MakeMover = choose_mover
) -> None:
    """Store known bytes from scratch pages and load them into others.

    The pages are shaped like *layers*, and lie like them. Raises `UnsupportedError` unless the
    bytes come back as they were, all of them, and nothing else is written.
    """
    each = group.blocks_per_chunk
    first, second = ([_scratch(layer, 2 * each + 1, seed) for layer in layers] for seed in (1, 2))
    before = [layer.clone() for layer in second]
    stored = list(range(0, 2 * each, 2))
    loaded = list(range(2 * each - 1, 0, -2))
    kept = _OneChunk()
    writer, reader = (GroupPages(group, pages, make_mover) for pages in (first, second))
    with contextlib.closing(writer), contextlib.closing(reader):
        writer.store(kept, Span(0, [_TESTED], stored), writer.fence())
        reader.load(kept, Span(0, [_TESTED], loaded), reader.fence())
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
    """Return *blocks* pages full of noise, in memory like those of *like*, gaps included."""
    order = sorted(range(like.dim()), key=lambda axis: (-like.stride(axis), axis))
    generator = torch.Generator().manual_seed(seed)
    gap = 2 if like.stride(0) > like[0].numel() and order[0] == 0 else 1
    shape = (blocks * gap, *like.shape[1:])
    noise = torch.randn([shape[axis] for axis in order], generator=generator).to(like.dtype)
    back = [order.index(axis) for axis in range(like.dim())]
    return noise.to(like.device).permute(back)[::gap]


def _whole(chunk: torch.Tensor) -> Runs:
    start = np.array([chunk.data_ptr()], dtype=np.uint64)
    return Runs(start, chunk.numel() * chunk.itemsize, owner=chunk)


def _is_whole(layer: torch.Tensor) -> bool:
    """Whether the bytes of each page lie behind each other, in whatever order."""
    return bool(layer[0].permute(page_order(layer)).is_contiguous())


def _as_pages(group: KVGroup, layer: torch.Tensor) -> torch.Tensor:
    """Return *layer* as pages `[block, head, token, width]`; raises `UnsupportedError`."""
    if group.heads == 1 and layer.dim() == 3:
        layer = layer.unsqueeze(1)
    expected = (group.heads, group.block_tokens, group.width)
    if layer.dtype != group.dtype or tuple(layer.shape[1:]) != expected:
        raise UnsupportedError(
            f"pages are {tuple(layer.shape[1:])} in {layer.dtype}, not {expected} in {group.dtype}"
        )
    if layer.stride(-1) != 1:
        raise UnsupportedError("the elements of a token do not lie behind each other")
    return layer

"""How chunks get between an engine's pages and host memory: the way in for faster movers.

A mover knows the pages of one KV group. What it fills and reads is a tensor of chunks in host
memory, whose shape `chunk_shape` gives: canonical `[layer, k|v, head, token, dim]`, or for an
opaque group the pages themselves, `[layer, block, *page as it lies in memory]`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

from kvstore.connectors.vllm_lanes import find_lane_mover
from kvstore.connectors.vllm_layouts import KVGroup
from kvstore.connectors.vllm_metadata import NOWHERE
from kvstore.connectors.vllm_tilings import Pair
from kvstore.limits import STAGING_SIZE_BYTES

Blocks = Sequence[Sequence[int]]
"""The blocks of each chunk, in the order of its tokens; `NOWHERE` is not to be written."""


class Mover(Protocol):
    """Moves whole chunks. One thread moves; `fence` is called by the one that computes."""

    def fence(self) -> Any:
        """Return what stands for all work that the device has been given so far."""
        ...

    def gather(self, chunks: torch.Tensor, blocks: Blocks, after: Any) -> None:
        """Fill chunk i from `blocks[i]` as they are behind the fence *after*.

        The bytes are there on return.
        """
        ...

    def scatter(self, chunks: torch.Tensor, blocks: Blocks, after: Any) -> None:
        """Fill `blocks[i]` from chunk i, not before the fence *after*.

        Whatever the device is given after the return sees them.
        """
        ...


def choose_mover(
    group: KVGroup, layers: Sequence[torch.Tensor], staging_bytes: int = STAGING_SIZE_BYTES
) -> Mover:
    """Return the mover for pages where *layers* are; a GPU stages *staging_bytes* a direction."""
    if layers[0].device.type == "cpu":
        return HostMover(group, layers)
    return find_lane_mover(group, layers, staging_bytes) or DeviceMover(group, layers)


class HostMover:
    """Pages in host memory: one copy, through views."""

    def __init__(self, group: KVGroup, layers: Sequence[torch.Tensor]) -> None:
        self._group = group
        self._layers = list(layers)
        self._order = page_order(layers[0])

    def fence(self) -> None:
        """Return None: what has been called has been computed."""

    def gather(self, chunks: torch.Tensor, blocks: Blocks, after: None) -> None:
        """Fill *chunks*; see `Mover`."""
        for page, plain in self._pairs(chunks, blocks):
            plain.copy_(page)

    def scatter(self, chunks: torch.Tensor, blocks: Blocks, after: None) -> None:
        """Fill *blocks*; see `Mover`."""
        for page, plain in self._pairs(chunks, blocks):
            page.copy_(plain)

    def _pairs(self, chunks: torch.Tensor, blocks: Blocks) -> Iterator[Pair]:
        for chunk, numbers in zip(chunks, blocks, strict=True):
            for layer, plain in zip(self._layers, chunk, strict=True):
                for position, block in enumerate(numbers):
                    if block != NOWHERE:
                        page = layer[block]
                        yield from _page_pairs(self._group, self._order, page, plain, position)


class DeviceMover:
    """Pages anywhere: gathered there, layer by layer, and converted in host memory.

    Right on every device that torch has, and the measure for faster ones.
    """

    def __init__(self, group: KVGroup, layers: Sequence[torch.Tensor]) -> None:
        self._group = group
        self._layers = list(layers)
        self._order = page_order(layers[0])
        self._device = layers[0].device

    def fence(self) -> Any:
        """Return an event behind what the calling thread has given the device."""
        if self._device.type == "cpu":
            return None
        event = torch.get_device_module(self._device).Event()
        event.record()
        return event

    def gather(self, chunks: torch.Tensor, blocks: Blocks, after: Any) -> None:
        """Fill *chunks*; see `Mover`."""
        self._wait(after)
        numbers = self._numbers(block for each in blocks for block in each)
        for number, layer in enumerate(self._layers):
            pages = iter(layer.index_select(0, numbers).cpu())
            for chunk, each in zip(chunks, blocks, strict=True):
                for position in range(len(each)):
                    for page, plain in self._pairs(next(pages), chunk[number], position):
                        plain.copy_(page)

    def scatter(self, chunks: torch.Tensor, blocks: Blocks, after: Any) -> None:
        """Fill *blocks*; see `Mover`."""
        self._wait(after)
        written = [block for each in blocks for block in each if block != NOWHERE]
        if not written:
            return
        numbers = self._numbers(written)
        for number, layer in enumerate(self._layers):
            pages = torch.empty((len(written), *layer.shape[1:]), dtype=layer.dtype)
            left = iter(pages)
            for chunk, each in zip(chunks, blocks, strict=True):
                for position, block in enumerate(each):
                    if block != NOWHERE:
                        for page, plain in self._pairs(next(left), chunk[number], position):
                            page.copy_(plain)
            layer.index_copy_(0, numbers, pages.to(self._device))
        if self._device.type != "cpu":
            # The engine's next kernels run in another stream, which waits for nothing of ours.
            torch.get_device_module(self._device).current_stream().synchronize()

    def _numbers(self, blocks: Any) -> torch.Tensor:
        return torch.tensor(list(blocks), dtype=torch.int64).to(self._device)

    def _wait(self, after: Any) -> None:
        if after is not None:
            after.synchronize()

    def _pairs(self, page: torch.Tensor, plain: torch.Tensor, position: int) -> Iterator[Pair]:
        return _page_pairs(self._group, self._order, page, plain, position)


def chunk_shape(group: KVGroup, layers: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """Return the shape of one chunk of pages like *layers* in host memory."""
    if group.tiling is None:
        page = layers[0][0].permute(page_order(layers[0]))
        return (len(layers), group.blocks_per_chunk, *page.shape)
    return (len(layers), len(group.sides), group.heads, group.chunk_tokens, group.head_dim)


def page_order(layer: torch.Tensor) -> tuple[int, ...]:
    """Return the axes of a page `[heads, tokens, width]`, outermost in memory first."""
    strides = layer.stride()[1:]
    return tuple(sorted(range(len(strides)), key=lambda axis: (-strides[axis], axis)))


def _page_pairs(
    group: KVGroup,
    order: tuple[int, ...],
    page: torch.Tensor,
    plain: torch.Tensor,
    position: int,
) -> Iterator[Pair]:
    """Pair *page* with its place in *plain*, one layer of a chunk."""
    if group.tiling is None:
        yield page.permute(order), plain[position]
    else:
        size = group.block_tokens
        yield from group.tiling(page, plain[:, :, position * size : (position + 1) * size])

"""Pages on a GPU: moved by the device itself, in streams of our own, behind the engine's events.

With a `PrefixCache` the chunks go straight between pages and the daemon's arena, encoded and
decoded on the way as its codec says; else between pages and host memory.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Final

import torch

from kvstore.client.cache import PrefixCache
from kvstore.client.gpu import DeviceCache
from kvstore.connectors.vllm_layouts import KVGroup
from kvstore.connectors.weights import UnsupportedError
from kvstore.errors import KVStoreError, RequestError
from kvstore.gpu.counters import DeviceCounters
from kvstore.gpu.cupy_device import open_device
from kvstore.gpu.device import Device, DeviceError, DeviceLostError, Fence, StuckError
from kvstore.gpu.lanes import Lane, LaneSettings, LoadLane, StoreLane
from kvstore.gpu.pages import PageLayout
from kvstore.gpu.transfers import Moved, Transfer
from kvstore.gpu.windows import Run
from kvstore.limits import STAGING_SIZE_BYTES

if TYPE_CHECKING:
    from kvstore.connectors.chunks import ChunkCache

log = logging.getLogger("vllm.kvstore")

_ROW_BYTES: Final = (1024, 512, 256, 128, 64, 32, 16)
"""In what an opaque page is cut: the largest that fits is moved with the fewest steps."""
_SLOTS: Final = 2

After = Fence | DeviceError | None
"""What a transfer comes behind; or why that is not known, and it must not be made."""


class LaneMover:
    """A mover whose bytes the host does not touch. See `vllm_movers.Mover`.

    Raises `UnsupportedError` for pages that kernels cannot move.
    """

    def __init__(
        self,
        group: KVGroup,
        layers: Sequence[torch.Tensor],
        device: Device,
        current_stream: Callable[[], int],
        staging_bytes: int = STAGING_SIZE_BYTES,
    ) -> None:
        self.counters = DeviceCounters()
        self._device = device
        self._current_stream = current_stream
        self._staging_bytes = staging_bytes
        self._layout = page_layout(group, layers)
        self._host = _Staged()
        self._lanes: dict[type[Lane], Lane] = {}
        # A transfer that is stuck may still write to them, whatever has become of its caller.
        self._in_use: dict[type[Lane], torch.Tensor] = {}
        self._direct: dict[PrefixCache, DeviceCache | None] = {}
        self._making = threading.Lock()

    def fence(self) -> Fence | DeviceError:
        """Return what stands for all work that the engine's stream has been given so far.

        The engine's thread is never failed: an error is returned, and ends what comes behind it.
        """
        try:
            return Fence.of(self._device.engine_stream(self._current_stream()))
        except DeviceError as error:
            return error

    def direct(self, chunks: ChunkCache, after: After) -> DeviceCache | None:
        """Return the way between pages and the daemon that goes around us, if there is one.

        Raises the `DeviceError` that stands for the fence.
        """
        _check_fence(after)
        if not isinstance(chunks, PrefixCache):
            return None
        with self._making:  # the first load and the first store may ask at once
            if chunks not in self._direct:
                self._direct[chunks] = self._make_direct(chunks)
        found = self._direct[chunks]
        return None if found is None or found.off else found

    def gather(self, chunks: torch.Tensor, blocks: Sequence[Sequence[int]], after: After) -> None:
        """Fill *chunks*; see `Mover`."""
        self._move(StoreLane, chunks, blocks, after)

    def scatter(self, chunks: torch.Tensor, blocks: Sequence[Sequence[int]], after: After) -> None:
        """Fill *blocks*; see `Mover`."""
        self._move(LoadLane, chunks, blocks, after)

    @property
    def all_counters(self) -> list[DeviceCounters]:
        """What was moved through host memory, and by each way around us."""
        return [self.counters, *(each.counters for each in [*self._direct.values()] if each)]

    def close(self) -> None:
        """Free what was taken of the device. Not left to the collector of garbage.

        That could come while the engine captures a graph, when memory must not be freed.
        """
        for lane in self._lanes.values():
            lane.close()
        for each in self._direct.values():
            if each is not None:
                each.close()

    def _make_direct(self, chunks: PrefixCache) -> DeviceCache | None:
        try:
            settings = LaneSettings(staging_bytes=self._staging_bytes)
            return DeviceCache(chunks, self._device, self._layout, settings=settings)
        except KVStoreError as error:
            log.warning("kvstore: chunks go through host memory: %s", error)
            return None

    def _move(
        self,
        kind: type[Lane],
        chunks: torch.Tensor,
        blocks: Sequence[Sequence[int]],
        after: After,
    ) -> None:
        fence = _check_fence(after)
        if not len(blocks):
            return
        lane = self._lane(kind)
        if lane.off:
            raise DeviceLostError(lane.off)
        if lane.stuck:  # it may still write to what we would move now
            raise StuckError("an earlier transfer has not ended")
        self._in_use[kind] = chunks
        self._host.is_pinned = chunks.is_pinned()
        moved = [
            Moved(pages, chunk.data_ptr()) for chunk, pages in zip(chunks, blocks, strict=True)
        ]
        begun: deque[Transfer] = deque()
        try:
            for start in range(0, len(moved), lane.chunks_per_transfer):
                if not lane.can_begin:
                    begun.popleft().finish()
                some = moved[start : start + lane.chunks_per_transfer]
                begun.append(lane.begin(some, fence, checksums=False))
        finally:
            # All have to end, also when one has failed.
            with contextlib.ExitStack() as ends:
                for transfer in reversed(begun):
                    ends.callback(transfer.finish)

    def _lane(self, kind: type[Lane]) -> Lane:
        if kind not in self._lanes:
            settings = LaneSettings(
                staging_bytes=max(_SLOTS * self._layout.chunk_bytes, self._staging_bytes),
                slots=_SLOTS,
                direct_page_min_bytes=None,
            )
            self._lanes[kind] = kind(
                self._device, self._layout, self._host, self.counters, settings
            )
        return self._lanes[kind]


class _Staged:
    """Host memory of torch, which is pinned or not as a whole."""

    def __init__(self) -> None:
        self.is_pinned = False

    def pinned_runs(self, address: int, size_bytes: int) -> list[Run]:
        """Return the run as it is, if it is pinned."""
        return [Run(address, size_bytes)] if self.is_pinned else []


def _check_fence(after: After) -> Fence | None:
    if isinstance(after, DeviceError):
        raise after
    return after


def find_lane_mover(
    group: KVGroup, layers: Sequence[torch.Tensor], staging_bytes: int = STAGING_SIZE_BYTES
) -> LaneMover | None:
    """Return a mover for pages on a CUDA device; None when it, or CuPy, is not to be had."""
    place = layers[0].device
    if place.type != "cuda":
        return None
    device = _opened(place.index or 0)
    if device is None:
        log.info("kvstore: no CuPy or no kernels: pages are moved by torch")
        return None
    try:
        return LaneMover(
            group,
            layers,
            device,
            lambda: int(torch.cuda.current_stream(place).cuda_stream),
            staging_bytes,
        )
    except UnsupportedError as error:
        log.info("kvstore: pages are moved by torch: %s", error)
        return None


@cache
def _opened(index: int) -> Device | None:
    return open_device(index)


def page_layout(group: KVGroup, layers: Sequence[torch.Tensor]) -> PageLayout:
    """Return where the pages in *layers* lie, as kernels are told.

    Raises `UnsupportedError` when they do not lie regularly enough.
    """
    found = [
        _opaque(group, layer) if group.tiling is None else _tiled(group, layer) for layer in layers
    ]
    strides = {strides for _, strides in found}
    if len(strides) != 1:
        raise UnsupportedError("the layers' pages do not lie alike")
    heads, page_tokens, row, page_stride, token_stride, head_stride = strides.pop()
    try:
        return PageLayout(
            planes=tuple(plane for planes, _ in found for plane in planes),
            heads=heads,
            page_tokens=page_tokens,
            pages_per_chunk=group.blocks_per_chunk,
            row_bytes=row,
            page_stride=page_stride,
            token_stride=token_stride,
            head_stride=head_stride,
        )
    except RequestError as error:
        raise UnsupportedError(str(error)) from error


_Strides = tuple[int, int, int, int, int, int]
"""Heads, tokens of a page, bytes of a row; strides of pages, tokens and heads."""


def _opaque(group: KVGroup, layer: torch.Tensor) -> tuple[list[int], _Strides]:
    """Take a page for one head of rows that lie behind each other."""
    page, size = layer[0], group.page_bytes
    order = sorted(range(page.dim()), key=lambda axis: (-page.stride(axis), axis))
    if not page.permute(order).is_contiguous():
        raise UnsupportedError("pages have gaps")
    row = next((row for row in _ROW_BYTES if size % row == 0), 0)
    if not row:
        raise UnsupportedError(f"pages of {size} bytes are not made of vectors")
    stride = layer.stride(0) * layer.itemsize
    return [layer.data_ptr()], (1, size // row, row, stride, row, size)


def _tiled(group: KVGroup, layer: torch.Tensor) -> tuple[list[int], _Strides]:
    """Ask the tiling which parts of a page are keys and values, and how they lie."""
    assert group.tiling is not None, "an opaque group has no tiling"
    shape = (len(group.sides), group.heads, group.block_tokens, group.head_dim)
    canonical = torch.empty(shape, dtype=layer.dtype, device="meta")
    planes, forms = [], set[tuple[int, int]]()
    for (part, plain), side in zip(_pairs(group, layer, canonical), canonical, strict=True):
        if part.shape != plain.shape or plain.shape != side.shape or part.stride(-1) != 1:
            raise UnsupportedError("keys and values are tiled")
        planes.append(part.data_ptr())
        forms.add((part.stride(0) * part.itemsize, part.stride(1) * part.itemsize))
    if len(forms) != 1:
        raise UnsupportedError("keys and values do not lie alike")
    head_stride, token_stride = forms.pop()
    row = group.head_dim * layer.itemsize
    stride = layer.stride(0) * layer.itemsize
    return planes, (group.heads, group.block_tokens, row, stride, token_stride, head_stride)


def _pairs(
    group: KVGroup, layer: torch.Tensor, canonical: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    assert group.tiling is not None, "an opaque group has no tiling"
    try:
        yield from group.tiling(layer[0], canonical)
    except RuntimeError as error:
        raise UnsupportedError(f"keys and values are tiled: {error}") from error

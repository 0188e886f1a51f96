"""Cache tensors of a model on a GPU: moved between the model's memory and the daemon by the device.

A tensor of a cache layer is one plane of pages, a chunk of tokens a page. Where the device cannot
be used, chunks go through host memory, moved by torch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch

from kvstore.client.cache import PrefixCache
from kvstore.client.gpu import DeviceCache
from kvstore.client.sync import StoreReport
from kvstore.connectors.chunks import ChunkCache
from kvstore.connectors.huggingface_model import Geometry
from kvstore.errors import KVStoreError, RequestError
from kvstore.gpu.counters import DeviceCounters
from kvstore.gpu.cupy_device import open_device
from kvstore.gpu.device import Device, DeviceError, Fence
from kvstore.gpu.lanes import LaneSettings
from kvstore.gpu.pages import PageLayout
from kvstore.limits import STAGING_SIZE_BYTES
from kvstore.types import Digest

log = logging.getLogger(__name__)


class Opened(NamedTuple):
    """A device, and what gives the handle of the stream that the model computes in."""

    device: Device
    current_stream: Callable[[], int]


OpenDevice = Callable[[torch.device], Opened | None]


def open_cuda(place: torch.device) -> Opened | None:
    """Return the GPU that torch calls *place*; None where there is none, or no CuPy."""
    if place.type != "cuda":
        return None
    index = torch.cuda.current_device() if place.index is None else place.index
    device = _opened(index)
    if device is None:
        log.info("kvstore: no CuPy or no kernels: chunks are moved by torch")
        return None
    return Opened(device, lambda: int(torch.cuda.current_stream(index).cuda_stream))


@cache
def _opened(index: int) -> Device | None:
    return open_device(index)


class DeviceGroup:
    """The tensors of one KV group. Staging is taken from the device at once."""

    def __init__(
        self, opened: Opened, chunks: DeviceCache, geometry: Geometry, chunk_tokens: int
    ) -> None:
        self._opened = opened
        self._chunks = chunks
        self._geometry = geometry
        self._chunk_tokens = chunk_tokens

    @property
    def counters(self) -> DeviceCounters:
        """What was transferred, and every fallback."""
        return self._chunks.counters

    def load(self, digests: Sequence[Digest], rooms: Sequence[torch.Tensor]) -> int | None:
        """Fill the first tokens of *rooms*; return how many leading chunks are right.

        None when the device cannot, and torch has to.
        """
        begun = self._begin(rooms, 0)
        if begun is None:
            return None
        layout, fence = begun
        return self._chunks.load(digests, _pages(digests), after=fence, layout=layout)

    def store(
        self,
        digests: Sequence[Digest],
        tensors: Sequence[tuple[torch.Tensor, int]],
        *,
        first: int,
        parent: Digest | None,
    ) -> StoreReport | None:
        """Store the chunks from *first* on of *tensors*, each with the position of its first token.

        None when the device cannot, and torch has to.
        """
        parts = [tensor[:, :, first * self._chunk_tokens - start :] for tensor, start in tensors]
        begun = self._begin(parts, len(digests))
        if begun is None:
            return None
        layout, fence = begun
        pages = _pages(digests)
        return self._chunks.store(digests, pages, parent=parent, after=fence, layout=layout)

    def close(self) -> None:
        """Free what was taken of the device."""
        self._chunks.close()

    def _begin(
        self, tensors: Sequence[torch.Tensor], chunks: int
    ) -> tuple[PageLayout, Fence] | None:
        """Return where *tensors* lie, and what is behind all that the model has asked for so far.

        None when the device cannot move them.
        """
        layout = self._layout(tensors, chunks)
        if layout is None or self._chunks.off:
            return None
        try:
            return layout, self._chunks.fence(self._opened.current_stream())
        except DeviceError:
            return None

    def _layout(self, tensors: Sequence[torch.Tensor], chunks: int) -> PageLayout | None:
        """Return where *tensors* lie; None when they do not lie alike."""
        row = self._geometry.token_bytes
        strides = {tensor.stride(1) * tensor.itemsize for tensor in tensors}
        regular = all(
            tensor.stride(-1) == 1
            and tensor.stride(-2) * tensor.itemsize == row
            and tensor.shape[-2] >= chunks * self._chunk_tokens
            for tensor in tensors
        )
        if len(strides) != 1 or not regular:
            return None
        planes = [tensor.data_ptr() for tensor in tensors]
        try:
            return _page_layout(self._geometry, self._chunk_tokens, planes, strides.pop())
        except RequestError:
            return None


def device_group(
    chunks: ChunkCache,
    geometry: Geometry,
    chunk_tokens: int,
    open_in: OpenDevice = open_cuda,
    *,
    staging_bytes: int = STAGING_SIZE_BYTES,
) -> DeviceGroup | None:
    """Return the way between the tensors of a group and the daemon; None when torch is to move.

    It takes *staging_bytes* of the device for each direction.
    """
    places = {plane.device for plane in geometry.planes}
    if len(places) != 1 or not isinstance(chunks, PrefixCache):
        return None
    opened = open_in(places.pop())
    if opened is None:
        return None
    try:
        planes = [0] * len(geometry.planes)
        layout = _page_layout(geometry, chunk_tokens, planes, chunk_tokens * geometry.token_bytes)
        settings = LaneSettings(staging_bytes=staging_bytes)
        moving = DeviceCache(chunks, opened.device, layout, settings=settings)
        return DeviceGroup(opened, moving, geometry, chunk_tokens)
    except KVStoreError as error:
        log.warning("kvstore: chunks are moved by torch: %s", error)
        return None


def _page_layout(
    geometry: Geometry, chunk_tokens: int, planes: Sequence[int], head_stride: int
) -> PageLayout:
    row = geometry.token_bytes
    return PageLayout(
        planes=tuple(planes),
        heads=geometry.heads,
        page_tokens=chunk_tokens,
        pages_per_chunk=1,
        row_bytes=row,
        page_stride=chunk_tokens * row,
        token_stride=row,
        head_stride=head_stride,
    )


def _pages(digests: Sequence[Digest]) -> list[list[int]]:
    return [[number] for number in range(len(digests))]

"""Where a page lies in SGLang's host pools, in the order in which its bytes are stored.

A pool of keys and values, or of latent vectors, in one of the documented layouts is *canonical*:
its page is the same chunk that every other engine makes of these tokens. Every other pool is
*opaque*: the bytes of its page as SGLang itself hands them to storage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import torch

from kvstore.connectors.weights import UnsupportedError
from kvstore.errors import RequestError
from kvstore.transfer.copies import Runs

# The axes of `kv_buffer`, outermost first. Latent vectors have no side, and one head.
_AXES: Final = {
    "layer_first": ("side", "layer", "token", "head", "dim"),
    "page_first": ("side", "token", "layer", "head", "dim"),
    "page_first_direct": ("side", "page", "layer", "token", "head", "dim"),
    "page_head": ("side", "page", "head", "token", "layer", "dim"),
    "page_unified": ("page", "group", "layer", "side", "token", "head", "dim"),
}
_LATENT_AXES: Final = {
    "layer_first": ("layer", "token", "head", "dim"),
    "page_first": ("token", "layer", "head", "dim"),
    "page_first_direct": ("page", "layer", "token", "head", "dim"),
    "page_unified": ("page", "layer", "token", "dim"),
}
# How a canonical chunk counts its bytes; groups hold consecutive heads.
_CANONICAL: Final = ("layer", "side", "group", "head", "token", "dim")
_PLAIN_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
_KEYS_VALUES_POOL: Final = "MHATokenToKVPoolHost"
_LATENT_POOL: Final = "MLATokenToKVPoolHost"


class Pages(Protocol):
    """The pages of one host pool."""

    page_tokens: int

    def runs(self, host_indices: torch.Tensor) -> list[Runs]:
        """Return where the pages that begin at every `page_tokens`-th of *host_indices* lie."""
        ...


@dataclass(frozen=True, slots=True)
class Shape:
    """What a canonical page has of everything; *heads* are those of this rank."""

    layers: int
    sides: tuple[str, ...]
    heads: int
    head_dim: int
    dtype: torch.dtype


class _Spread(NamedTuple):
    """Where the bytes of a page lie behind its beginning; see `Runs`."""

    offsets: np.ndarray[Any, np.dtype[np.uint64]]
    piece_bytes: int
    inner_count: int
    inner_stride: int

    def at(self, base: int | np.uint64, owner: object) -> Runs:
        """Return the runs of a page that begins at *base*."""
        addresses = self.offsets + np.uint64(base)
        return Runs(addresses, self.piece_bytes, self.inner_count, self.inner_stride, owner)


class CanonicalPages:
    """Pages that are stored as canonical chunks. Raises `UnsupportedError` when they are not."""

    def __init__(self, pool: Any) -> None:
        self.page_tokens = int(pool.page_size)
        buffer = pool.kv_buffer
        axes = _axes_of(pool, buffer)
        self._sizes = dict(zip(axes, buffer.shape, strict=True))
        self._pool_axes = axes
        self._buffer = buffer
        self.shape = Shape(
            layers=self._sizes["layer"],
            sides=("keys", "values") if "side" in axes else ("latent",),
            heads=self._sizes.get("head", 1) * self._sizes.get("group", 1),
            head_dim=self._sizes["dim"],
            dtype=buffer.dtype,
        )
        self._itemsize = int(buffer.itemsize)
        self._lying = self._spread(dict(zip(axes, buffer.stride(), strict=True)))
        self._refuse_other_geometry(pool)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self._lying.offsets.size * self._lying.inner_count * self._lying.piece_bytes

    def runs(self, host_indices: torch.Tensor) -> list[Runs]:
        """Return where pages lie; see `Pages`. Raises `RequestError` for half pages."""
        starts = _page_starts(host_indices, self.page_tokens)
        axis = "page" if "page" in self._sizes else "token"
        each = self.page_tokens if axis == "page" else 1
        room = self._sizes[axis] * each
        if starts.size and not 0 <= starts.min() <= starts.max() <= room - self.page_tokens:
            raise RequestError(f"pages at {starts.tolist()} of a pool of {room} tokens")
        stride = self._buffer.stride(self._pool_axes.index(axis)) * self._itemsize
        bases = starts.astype(np.uint64) // np.uint64(each) * np.uint64(stride)
        bases += np.uint64(self._buffer.data_ptr())
        return [self._lying.at(base, self._buffer) for base in bases]

    def flat_runs(self, page: torch.Tensor) -> Runs:
        """Return where one page lies in *page*, as the pool's `get_data_page` gives it.

        Raises `RequestError` unless it is one page, in one piece.
        """
        size = page.numel() * page.itemsize
        if not page.is_contiguous() or size != self.page_bytes or page.device.type != "cpu":
            raise RequestError(f"a page has {self.page_bytes} bytes in one piece, this has {size}")
        alone = self._sizes | {"token": self.page_tokens}
        if "page" in alone:
            alone["page"] = 1
        strides, stride = {}, 1
        for axis in reversed(self._pool_axes):
            strides[axis], stride = stride, stride * alone[axis]
        return self._spread(strides).at(page.data_ptr(), page)

    def _spread(self, strides: dict[str, int]) -> _Spread:
        """Return how the bytes of a page lie, in canonical order.

        Axes that lie in the same order in memory are taken together.
        """
        counts = self._sizes | {"token": self.page_tokens}
        axes = [axis for axis in _CANONICAL if counts.get(axis, 1) > 1 or axis == "dim"]
        if strides["dim"] != 1:
            raise UnsupportedError("the elements of a token do not lie behind each other")
        piece = counts[axes.pop()]
        while axes and strides[axes[-1]] == piece:
            piece *= counts[axes.pop()]
        inner = axes.pop() if axes else ""
        offsets = np.zeros(1, dtype=np.uint64)
        for axis in axes:
            steps = np.arange(counts[axis], dtype=np.uint64) * np.uint64(strides[axis])
            offsets = (offsets[:, None] + steps).ravel()
        size = self._itemsize
        return _Spread(
            offsets * np.uint64(size),
            piece * size,
            counts.get(inner, 1),
            strides.get(inner, 0) * size,
        )

    def _refuse_other_geometry(self, pool: Any) -> None:
        """Raise `UnsupportedError` unless the buffer is what the pool says of itself."""
        latent = self.shape.sides == ("latent",)
        heads = 1 if latent else pool.head_num
        width = pool.kv_cache_dim if latent else pool.head_dim
        said = (pool.layer_num, heads, width)
        found = (self.shape.layers, self.shape.heads, self.shape.head_dim)
        if said != found:
            raise UnsupportedError(f"(layers, heads, width) are {found}, not {said}")
        if getattr(pool, "target_layer_num", pool.layer_num) != pool.layer_num:
            raise UnsupportedError("the pool has layers of a draft model, too")
        in_pages = self._sizes["token"] == self.page_tokens
        if "page" in self._sizes and not in_pages:
            raise UnsupportedError(f"pages hold {self._sizes['token']} tokens")


class OpaquePages:
    """Pages as SGLang hands them to storage. Raises `UnsupportedError` when it does not."""

    def __init__(self, pool: Any) -> None:
        self.page_tokens = int(getattr(pool, "page_size", 1) or 1)
        self._pool = pool
        try:
            _, sizes = pool.get_page_buffer_meta(torch.arange(self._logical_tokens))
        except (
            AttributeError,
            AssertionError,
            NotImplementedError,
            TypeError,
            ValueError,
        ) as error:
            raise UnsupportedError(f"{type(pool).__name__} shows no pages: {error}") from error
        self._sizes = tuple(int(size) for size in sizes)
        self.page_bytes = sum(self._sizes)
        if not self.page_bytes:
            raise UnsupportedError(f"the pages of {type(pool).__name__} are empty")

    @property
    def words(self) -> str:
        """What says how the bytes of a page lie."""
        pool = self._pool
        parts = "+".join(str(size) for size in self._sizes)
        layout = getattr(pool, "layout", "")
        return f"{type(pool).__name__} {layout} {pool.dtype} {parts}"

    def runs(self, host_indices: torch.Tensor) -> list[Runs]:
        """Return where pages lie; see `Pages`. Raises `RequestError` for half pages."""
        starts = _page_starts(host_indices, self._logical_tokens)
        addresses, sizes = self._pool.get_page_buffer_meta(host_indices)
        each = len(self._sizes)
        if len(addresses) != each * starts.size or tuple(sizes[:each]) != self._sizes:
            raise RequestError(f"pages of {type(self._pool).__name__} have changed their shape")
        return [
            self._page_at(addresses[index * each : (index + 1) * each])
            for index in range(starts.size)
        ]

    def _page_at(self, addresses: Sequence[int]) -> Runs:
        """Return parts of any sizes as pieces of one size: the largest that divides them all."""
        piece = math.gcd(*self._sizes)
        pieces = [
            np.uint64(address) + np.arange(size // piece, dtype=np.uint64) * np.uint64(piece)
            for address, size in zip(addresses, self._sizes, strict=True)
        ]
        return Runs(np.concatenate(pieces), piece, owner=self._pool)

    @property
    def _logical_tokens(self) -> int:
        return int(getattr(self._pool, "logical_page_size", self.page_tokens))


def _axes_of(pool: Any, buffer: Any) -> tuple[str, ...]:
    """Return the axes of *buffer*; raises `UnsupportedError` unless they are known."""
    kind = type(pool).__name__
    known = {_KEYS_VALUES_POOL: _AXES, _LATENT_POOL: _LATENT_AXES}.get(kind)
    if known is None:
        raise UnsupportedError(f"pages of {kind} are not understood")
    axes = known.get(pool.layout)
    if axes is None or not isinstance(buffer, torch.Tensor) or buffer.dim() != len(axes):
        raise UnsupportedError(f"pages of {kind} in layout {pool.layout!r} are not understood")
    if buffer.dtype not in _PLAIN_DTYPES:
        raise UnsupportedError(f"pages hold {buffer.dtype}, whose scales are not kept with it")
    if buffer.device.type != "cpu" or getattr(pool, "dcp_size", 1) > 1:
        raise UnsupportedError("only whole pages in host memory are understood")
    if getattr(pool, "storage_format_tag", None):
        raise UnsupportedError(f"pages are in the format {pool.storage_format_tag}")
    return axes


def _page_starts(
    host_indices: torch.Tensor, page_tokens: int
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the first index of each page; raises `RequestError` unless all are whole."""
    found = host_indices.detach().cpu().numpy().astype(np.int64)
    if found.ndim != 1 or found.size % page_tokens:
        raise RequestError(f"{found.size} indices where pages have {page_tokens} tokens")
    pages = found.reshape(-1, page_tokens)
    starts: np.ndarray[Any, np.dtype[np.int64]] = pages[:, 0]
    is_whole = (pages == starts[:, None] + np.arange(page_tokens)).all()
    if not is_whole or (starts % page_tokens).any():
        raise RequestError(f"indices are not whole pages of {page_tokens} tokens")
    return starts

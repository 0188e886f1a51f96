"""Moves the chunks of one KV group between the tensors of a model and the store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kvstore.connectors.chunks import Addresses, Group, StoreCounts, chunk_runs
from kvstore.connectors.huggingface_device import DeviceGroup
from kvstore.connectors.huggingface_layers import make_room
from kvstore.connectors.huggingface_model import Geometry, Side
from kvstore.types import Digest

_HOST = torch.device("cpu")

Planes = dict[tuple[int, Side], torch.Tensor]
"""Tensors `[1, heads, tokens, head_dim]` by layer and side."""


@dataclass(frozen=True, slots=True)
class ModelGroup:
    """One KV group of a model: its geometry, where its chunks are kept, and their length."""

    geometry: Geometry
    group: Group
    chunk_tokens: int
    device: DeviceGroup | None = None
    """What moves chunks where the host cannot write; None: torch does."""

    def load(self, digests: Sequence[Digest], room_tokens: int) -> tuple[Planes, int]:
        """Load the chunks that a hit on all of *digests* needs.

        Returns the planes, and up to which chunk they are good: `len(digests)` when all is
        well. A full-attention plane begins at token 0 and has room for *room_tokens*; a sliding
        one has just the tokens of its last chunks.
        """
        first = self.group.first_needed(len(digests))
        wanted = digests[first:]
        tokens = len(wanted) * self.chunk_tokens
        room_tokens = tokens if self.geometry.window_tokens else room_tokens
        rooms = [self._room(room_tokens, plane.device) for plane in self.geometry.planes]
        good = None if self.device is None else self.device.load(wanted, rooms)
        if good is None:
            good = self._load_from_host(wanted, rooms)
        names = [(plane.layer, plane.side) for plane in self.geometry.planes]
        return dict(zip(names, rooms, strict=True)), first + good

    def _load_from_host(self, wanted: Sequence[Digest], rooms: Sequence[torch.Tensor]) -> int:
        """Fill the first tokens of *rooms*; return how many leading chunks are right."""
        tokens = len(wanted) * self.chunk_tokens
        # Where the host cannot write, chunks land in its memory first.
        landings = [room if room.device == _HOST else self._landing(tokens) for room in rooms]
        runs = chunk_runs(
            _head_addresses(landings),
            self.geometry.token_bytes,
            self.chunk_tokens,
            range(len(wanted)),
            owner=landings,
        )
        good = self.group.cache.load(wanted, runs)
        for room, landing in zip(rooms, landings, strict=True):
            if room is not landing:
                room[:, :, :tokens].copy_(landing)
        return good

    def store(
        self, layers: Sequence[Any], digests: Sequence[Digest], first: int
    ) -> StoreCounts | None:
        """Store the chunks from *first* on that *layers* hold whole; None when there are none."""
        states = [layers[plane.layer].states(plane.side) for plane in self.geometry.planes]
        held = [state for state in states if state is not None]
        if len(held) < len(states) or not all(self._fits(tensor) for tensor, _ in held):
            return None
        tokens = min(start + tensor.shape[-2] for tensor, start in held)
        end = min(len(digests), tokens // self.chunk_tokens)
        if end <= first:
            return None
        parent = digests[first - 1] if first else None
        if self.device is not None:
            new = digests[first:end]
            counts = self.device.store(new, held, first=first, parent=parent)
            if counts is not None:
                return counts
        span = slice(first * self.chunk_tokens, end * self.chunk_tokens)
        tensors = [_host_rows(tensor, start, span) for tensor, start in held]
        runs = chunk_runs(
            _head_addresses(tensors),
            self.geometry.token_bytes,
            self.chunk_tokens,
            range(end - first),
            owner=tensors,
        )
        return self.group.cache.store(digests[first:end], runs, parent=parent)

    def close(self) -> None:
        """Free what was taken of a device, and end the connection."""
        if self.device is not None:
            self.device.close()
        self.group.cache.close()

    def bytes_needed(self, hit: int) -> int:
        """Return how many bytes a hit of *hit* chunks loads."""
        tokens = (hit - self.group.first_needed(hit)) * self.chunk_tokens
        shape = self.geometry
        return len(shape.planes) * shape.heads * tokens * shape.token_bytes

    def _room(self, tokens: int, device: torch.device) -> torch.Tensor:
        shape = self.geometry
        return make_room(shape.heads, tokens, shape.head_dim, shape.dtype, device)

    def _landing(self, tokens: int) -> torch.Tensor:
        return self._room(tokens, _HOST)

    def _fits(self, tensor: torch.Tensor) -> bool:
        """Whether *tensor* is what this group stores, and of one prompt (beams are not)."""
        shape = self.geometry
        batch, heads, _, head_dim = tensor.shape
        return (batch, heads, head_dim, tensor.dtype) == (
            1,
            shape.heads,
            shape.head_dim,
            shape.dtype,
        )


def _host_rows(tensor: torch.Tensor, start: int, span: slice) -> torch.Tensor:
    """Return tokens *span* of a tensor that begins at token *start*: on the host, rows adjacent."""
    part = tensor.detach()[:, :, span.start - start : span.stop - start].cpu()
    rows_adjacent = part.stride(-1) == 1 and part.stride(-2) == part.shape[-1]
    return part if rows_adjacent else part.contiguous()


def _head_addresses(tensors: Sequence[torch.Tensor]) -> Addresses:
    """Return the address of token 0 of every head of every tensor."""
    per_tensor = [
        tensor.data_ptr()
        + np.arange(tensor.shape[1], dtype=np.uint64)
        * np.uint64(tensor.stride(1) * tensor.itemsize)
        for tensor in tensors
    ]
    return np.concatenate(per_tensor)

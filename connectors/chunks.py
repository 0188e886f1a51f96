"""Engine-neutral chunk arithmetic: where chunks lie in KV tensors, and how far a hit reaches.

A model's layers fall into *groups* of one geometry and one kind of attention; each group is a
namespace of its own. Full attention needs every chunk of a prefix; sliding attention needs
only the chunks that cover the window before the end of the hit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvstore.transfer.copies import Runs
from kvstore.types import Digest

Addresses = npt.NDArray[np.uint64]


class StoreCounts(Protocol):
    """What became of the chunks of one store call."""

    @property
    def stored(self) -> int:
        """How many are new."""
        ...

    @property
    def present(self) -> int:
        """How many were there already."""
        ...

    @property
    def refused(self) -> int:
        """How many found no room."""
        ...

    @property
    def bytes_stored(self) -> int:
        """Bytes of the new ones."""
        ...


class Finder(Protocol):
    """What a look-up asks of one namespace."""

    def lookup(self, digests: Sequence[Digest], *, window: int = 0) -> int:
        """Return how many leading chunks can be served; with *window*, see `Group.window`."""
        ...


class ChunkCache(Finder, Protocol):
    """What a connector asks of one namespace. A store that is away answers as an empty one."""

    def load(self, digests: Sequence[Digest], targets: Sequence[Runs]) -> int:
        """Fill *targets* and return how many leading ones are whole and right."""
        ...

    def store(
        self, digests: Sequence[Digest], sources: Sequence[Runs], *, parent: Digest | None = None
    ) -> StoreCounts:
        """Keep the chunks in *sources*; *parent* is the digest before the first, if any."""
        ...

    def close(self) -> None:
        """End the connection."""
        ...


class Searched(Protocol):
    """A group as a look-up sees it; see `Group`."""

    @property
    def cache(self) -> Finder:
        """Where it is looked for."""
        ...

    @property
    def window(self) -> int:
        """What of it a hit needs."""
        ...


@dataclass(frozen=True, slots=True)
class Group:
    """Where the chunks of one KV group are kept, and which of them a hit needs.

    *window* counts chunks: a hit that ends at chunk n needs the chunks [n - window, n).
    0 stands for full attention, which needs all of them.
    """

    cache: ChunkCache
    window: int = 0

    def first_needed(self, end: int) -> int:
        """Return the first chunk that a hit of *end* chunks needs."""
        return first_needed(end, self.window)


def first_needed(end: int, window: int) -> int:
    """Return the first chunk that a hit of *end* chunks needs of a group; see `Group.window`."""
    return max(0, end - window) if window else 0


def window_chunks(window_tokens: int, chunk_tokens: int) -> int:
    """Return how many chunks cover the *window_tokens* - 1 tokens that a next token still sees."""
    return max(1, -(-(window_tokens - 1) // chunk_tokens))


def joint_hit(groups: Sequence[Searched], digests: Sequence[Digest]) -> int:
    """Return the largest number of leading chunks at which every group can be served.

    A full-attention group that serves n chunks serves any fewer; a sliding one may not, so
    those are asked again until all of them agree.
    """
    end = len(digests)
    for group in groups:
        if not group.window and end:
            end = min(end, group.cache.lookup(digests[:end]))
    sliding = [group for group in groups if group.window]
    agreed = 0
    while end and agreed < len(sliding):
        group = sliding[agreed]
        found = group.cache.lookup(digests[:end], window=group.window)
        if found == end:
            agreed += 1
        else:
            # This group is asked again with the others: it must hold at the new end too.
            end, agreed = found, 0
    return end


def chunk_runs(
    heads: Addresses, token_bytes: int, chunk_tokens: int, chunks: range, *, owner: object
) -> list[Runs]:
    """Return where each chunk of *chunks* lies, in canonical byte order.

    *heads* has the address of token 0 of every (layer, k|v, head), in that order; the tokens
    of one head lie behind each other, *token_bytes* apart. *owner* keeps the memory alive.
    """
    size = token_bytes * chunk_tokens
    return [
        Runs(heads + np.uint64(index * size), piece_bytes=size, owner=owner) for index in chunks
    ]

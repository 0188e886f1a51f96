"""What each rank of a tensor-parallel engine has of the KV heads."""

from __future__ import annotations

from typing import NamedTuple

from kvstore.types import HeadRange


class HeadShard(NamedTuple):
    """The share that *rank*, one of *ranks*, has of *total* heads.

    With more ranks than heads, neighbours hold the same head; one of them stores it.
    """

    total: int
    rank: int = 0
    ranks: int = 1

    @property
    def width(self) -> int:
        """Heads of one rank."""
        return max(1, self.total // self.ranks)

    @property
    def heads(self) -> HeadRange:
        """Which heads this rank has."""
        start = self.rank * self.total // self.ranks
        return HeadRange(start, start + self.width)

    @property
    def is_writer(self) -> bool:
        """Whether this rank stores its heads, or a neighbour does."""
        return self.rank % max(1, self.ranks // self.total) == 0

    @property
    def divides(self) -> bool:
        """Whether heads, or ranks, can be shared out evenly."""
        return self.total % self.ranks == 0 or self.ranks % self.total == 0

"""Blocks that must not be reused while they are being stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvstore.connectors.vllm_metadata import Span


@dataclass(slots=True, eq=False)
class _Holding:
    blocks: list[Any]
    ranks_left: int


class Holdings:
    """References to the engine's blocks, one set for every store job that is under way.

    A job's references are given back when all *ranks* have finished it, whatever became of the
    request meanwhile. Without a pool nothing can be held, and stores must end with their step.
    """

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._pool: Any = None
        self._jobs: dict[int, _Holding] = {}

    def __len__(self) -> int:
        """Return the number of jobs that hold blocks."""
        return len(self._jobs)

    @property
    def can_hold(self) -> bool:
        """Whether there is a pool."""
        return self._pool is not None

    def bind(self, pool: Any) -> None:
        """Take the pool that the blocks are from."""
        self._pool = pool

    def hold(self, job_id: int, spans: Sequence[Span]) -> bool:
        """Take references to the blocks of *spans*; False, and none, when too many are held."""
        assert job_id not in self._jobs, "a job has one set of references"
        blocks = [self._pool.blocks[block] for span in spans for block in span.blocks]
        held = sum(len(holding.blocks) for holding in self._jobs.values())
        if held and held + len(blocks) > len(self._pool.blocks) // 2:
            return False
        self._pool.touch(blocks)
        self._jobs[job_id] = _Holding(blocks, self._ranks)
        return True

    def let_go(self, finished: Mapping[int, int]) -> list[int]:
        """Count the ranks that have *finished* jobs; give back, and return, what all have."""
        done = []
        for job_id, ranks in finished.items():
            holding = self._jobs[job_id]
            holding.ranks_left -= ranks
            if not holding.ranks_left:
                # The end of a prefix is of less use than its beginning: it goes first.
                self._pool.free_blocks(list(reversed(self._jobs.pop(job_id).blocks)))
                done.append(job_id)
        return done

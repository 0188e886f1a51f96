"""What the two halves of the vLLM connector tell each other, once a step.

vLLM carries these objects between its own processes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from kvstore.types import Digest

NOWHERE = -1
"""Stands for a block that is not to be written: it holds something else, or does not exist."""


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive chunks of one KV group, and the engine's blocks that hold them.

    *blocks* are in the order of the tokens, the same number for every chunk. *parent* is the
    digest before the first.
    """

    group: int
    digests: list[Digest]
    blocks: list[int]
    parent: Digest | None = None

    @property
    def real_blocks(self) -> set[int]:
        """The blocks that exist."""
        return {block for block in self.blocks if block != NOWHERE}

    def blocks_of(self, start: int, stop: int) -> list[int]:
        """Return the blocks of chunks [start, stop)."""
        each = len(self.blocks) // len(self.digests)
        return self.blocks[start * each : stop * each]


@dataclass(frozen=True, slots=True)
class HandedOver:
    """A hand-off that a request is fed from.

    *tokens* have been announced, if any were. *early* says that it may not be open yet. After
    *seconds* without a chunk the rest is computed. *firsts* are the numbers, in the hand-off of
    its group, of the chunk that each span of the load begins with.
    """

    name: str
    peer: str
    tokens: int | None
    early: bool
    seconds: float
    firsts: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class LoadJob:
    """Chunks that a request waits for. *lost* are blocks that nothing will be loaded into.

    With *source*, its spans are loaded as that delivers them. *trace* is what the request belongs
    to (`traceparent`), if anything.
    """

    request_id: str
    spans: tuple[Span, ...]
    lost: tuple[int, ...] = ()
    source: HandedOver | None = None
    trace: str = ""


@dataclass(frozen=True, slots=True)
class StoreJob:
    """Chunks that this step completes.

    With *held*, the scheduler keeps their blocks until every rank has reported the job;
    otherwise they may be reused from the next step on. *trace* as of a load.
    """

    job_id: int
    spans: tuple[Span, ...]
    held: bool
    trace: str = ""


@dataclass(slots=True)
class StepMetadata(KVConnectorMetadata):
    """What the workers are to do in one step.

    *is_idle* says that no token is computed, so that waiting costs nobody anything. The requests
    *given_up* have ended: nobody waits for their loads.
    """

    loads: list[LoadJob] = field(default_factory=list)
    stores: list[StoreJob] = field(default_factory=list)
    is_idle: bool = False
    given_up: list[str] = field(default_factory=list)


@dataclass(slots=True)
class WorkerReport(KVConnectorWorkerMetadata):
    """What has become of jobs: for each store job, how many ranks have finished it.

    *incomplete* are those of them whose chunks were not all kept. *off* says why a rank does
    not cache, if one does not.
    """

    finished_stores: dict[int, int] = field(default_factory=dict)
    off: str = ""
    incomplete: set[int] = field(default_factory=set)

    def aggregate(self, other: WorkerReport) -> WorkerReport:
        """Return both reports in one."""
        counts = dict(self.finished_stores)
        for job_id, ranks in other.finished_stores.items():
            counts[job_id] = counts.get(job_id, 0) + ranks
        return WorkerReport(counts, self.off or other.off, self.incomplete | other.incomplete)

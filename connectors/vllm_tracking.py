"""What the scheduler's half of the vLLM connector remembers: requests, counts, and its role."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kvstore.connectors.vllm_keys import RequestKeys
from kvstore.connectors.vllm_lookups import Lookup
from kvstore.connectors.vllm_metadata import HandedOver, LoadJob
from kvstore.types import TierKind


@dataclass(slots=True, eq=False)
class Tracked:
    """What is known of one request, in chunks.

    *hit* is what was promised to be loaded, *stored* what needs no storing. *sources* says how
    many tokens of the last load came from which tier. *source* is a hand-off not yet used.
    """

    request: Any
    keys: RequestKeys
    lookup: Lookup | None = None
    blocks: tuple[list[int], ...] = ()
    hit: int = 0
    stored: int = 0
    loads: int = 0
    loading: LoadJob | None = None
    has_failed: bool = False
    first_loaded: int = 0
    sources: dict[TierKind, int] = field(default_factory=dict)
    may_store: bool = True
    source: HandedOver | None = None

    @property
    def trace(self) -> str:
        """The trace that the engine's client wants the request in (`traceparent`), if any."""
        headers = getattr(self.request, "trace_headers", None) or {}
        return str(headers.get("traceparent", ""))


@dataclass(slots=True)
class Counts:
    """What the scheduler's half has decided."""

    lookups: int = 0
    lookups_late: int = 0
    tokens_asked: int = 0
    tokens_hit: int = 0
    tokens_hit_device: int = 0
    tokens_hit_host: int = 0
    tokens_hit_disk: int = 0
    tokens_hit_redis: int = 0
    tokens_hit_peer: int = 0
    stores_skipped: int = 0
    load_failures: int = 0
    handoffs_opened: int = 0
    handoffs_taken: int = 0
    tokens_handed: int = 0


@dataclass(frozen=True, slots=True)
class Role:
    """What an engine does for others: *produces* and *consumes* hand-offs, *stores* chunks."""

    produces: bool = True
    consumes: bool = True
    stores: bool = True

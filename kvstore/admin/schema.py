"""What the admin API says and takes: the OpenAPI document is made from these structs.

Shapes are stable: fields are added, never renamed or removed. Digests and namespaces are hex.
Times are seconds since 1970 (`*_at`), durations seconds, sizes bytes.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from kvstore.events import Event
from kvstore.limits import (
    ADMIN_DIGESTS_MAX,
    ADMIN_PROMPT_TOKENS_MAX,
    ARENA_SIZE_MAX_BYTES,
    RECOMPUTE_MAX_US,
    TOKEN_ID_MAX,
)
from kvstore.protocol.manifest import Manifest
from kvstore.protocol.stats import ArenaStats, EngineStats, NamespaceStats, TenantStats
from kvstore.store.explanation import Cause, Verdict

DigestHex = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of a prefix")]
NamespaceHex = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}$", description="id of a namespace")]
DigestsHex = Annotated[list[DigestHex], Meta(min_length=1, max_length=ADMIN_DIGESTS_MAX)]
TokenId = Annotated[int, Meta(ge=0, le=TOKEN_ID_MAX)]
Bytes = Annotated[int, Meta(ge=0, le=ARENA_SIZE_MAX_BYTES)]
ShownTier = Literal["device", "host", "disk", "redis", "peer"]


class Shown(msgspec.Struct, kw_only=True, frozen=True):
    """Something that is only shown."""


class Asked(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Something that is asked for; an unknown field is a mistake."""


class Problem(Shown, frozen=True):
    """What went wrong (RFC 9457). *type* is stable and made for programs."""

    type: str
    title: str
    status: int
    detail: str


# --- health ------------------------------------------------------------------------------


class Health(Shown, frozen=True):
    """The loop turns: it has answered."""

    status: Literal["alive"] = "alive"


class Check(Shown, frozen=True):
    """One thing that readiness depends on."""

    name: str
    ok: bool
    detail: str = ""


class Readiness(Shown, frozen=True):
    """Whether engines can be served; a slower tier that fails does not change that."""

    status: Literal["ready", "not ready"]
    checks: list[Check]


# --- status ------------------------------------------------------------------------------


class Tier(Shown, frozen=True):
    """One tier; a capacity of 0 is not known here.

    *stored_bytes* are those of chunks as kept, *raw_bytes* as they would be without codec;
    *used_bytes* counts padding and checksums, too.
    """

    tier: ShownTier
    state: Literal["ready", "failing"]
    breaker: Literal["closed", "open"]
    capacity_bytes: int
    used_bytes: int
    stored_bytes: int
    raw_bytes: int
    largest_free_bytes: int
    chunks: int
    hit_chunks: int
    write: str
    queued_chunks: int
    queued_bytes: int
    read_bytes_per_second: int
    write_bytes_per_second: int
    read_seconds: float
    counters: dict[str, int]


class Lookups(Shown, frozen=True):
    """Chunks asked for in look-ups since the start; all outcomes add up to *asked*."""

    asked: int
    ready: int
    arriving: int
    declined: int
    unavailable: int
    miss: int


class Flow(Shown, frozen=True):
    """What has gone from one place to another since the start. *target* "none" is: gone."""

    source: str
    target: str
    chunks: int
    bytes: int


class Latency(Shown, frozen=True):
    """How long requests of one kind took: all since the start, and quantiles of the last minute.

    *buckets* are [upper bound, count], the last without a bound (null).
    """

    op: str
    count: int
    total_seconds: float
    recent_count: int
    p50_seconds: float
    p90_seconds: float
    p99_seconds: float
    buckets: list[tuple[float | None, int]]


class LeaseSummary(Shown, frozen=True):
    """What is held for whom."""

    count: int
    chunks: int
    next_expiry_seconds: float | None
    """When the oldest ends, if nobody lets go of it first."""
    expired: int


class Status(Shown, frozen=True):
    """One look at the whole daemon. *events* are the latest, oldest first.

    *engine_gpu* are the counters of all engines with a GPU since the start, *engines* the open
    sessions of such that have told last.
    """

    version: str
    pid: int
    state: Literal["ready", "draining"]
    now_at: float
    started_at: float
    uptime_seconds: float
    socket: str
    resident_bytes: int
    sessions: int
    reservations: int
    handoffs: int
    handoff_chunks: int
    leases: LeaseSummary
    arena: ArenaStats
    tiers: list[Tier]
    lookups: Lookups
    flows: list[Flow]
    latencies: list[Latency]
    tenants: list[TenantStats]
    namespaces: list[NamespaceStats]
    namespaces_count: int
    counters: dict[str, int]
    engine_gpu: dict[str, int]
    engines: list[EngineStats]
    events: list[Event]


class Sample(Shown, frozen=True):
    """Totals since the start as they were at one time: differences of two give rates."""

    at: float
    asked: int
    ready: int
    hits: dict[str, int]
    used_bytes: dict[str, int]
    load_bytes: int
    commit_bytes: int
    evict_chunks: int
    load_p50_seconds: float
    load_p99_seconds: float


class History(Shown, frozen=True):
    """The last hour, one sample every *interval_seconds*, oldest first."""

    interval_seconds: float
    samples: list[Sample]


# --- lists -------------------------------------------------------------------------------


class Tiers(Shown, frozen=True):
    """All tiers, fastest first, and what has gone between them."""

    tiers: list[Tier]
    flows: list[Flow]


class NamespaceShown(Shown, frozen=True):
    """One namespace: who has it, how much is in it, and all that must match to be in it."""

    namespace: str
    tenant: str
    chunks: int
    partial_chunks: int
    chunk_bytes: int
    sessions: int
    manifest: Manifest


class Namespaces(Shown, frozen=True):
    """A page of namespaces; *next* is the cursor of the page behind it, null on the last."""

    namespaces: list[NamespaceShown]
    next: int | None


class Tenants(Shown, frozen=True):
    """What each tenant has in each tier, and may have."""

    tenants: list[TenantStats]


class QuotaChange(Asked, frozen=True):
    """What one tenant may have in one tier; what is left out stays. 0 bytes of quota: no quota."""

    tier: Literal["host", "disk"]
    quota_bytes: Bytes | None = None
    floor_bytes: Bytes | None = None


class ShardShown(Shown, frozen=True):
    """A run of heads of one chunk, and the tiers that hold it."""

    head_start: int
    head_stop: int
    size_bytes: int
    tiers: list[str]


class Chunk(Shown, frozen=True):
    """One chunk that is kept."""

    digest: str
    namespace: str
    parent: str | None
    tenant: str
    is_whole: bool
    tiers: list[str]
    leases: int
    pin: Literal["none", "soft", "hard"]
    shards: list[ShardShown]


class Chunks(Shown, frozen=True):
    """A page of chunks, which may be empty though others follow; see *next*."""

    chunks: list[Chunk]
    next: int | None


class ChunksAsked(Asked, frozen=True):
    """Chunks of one namespace."""

    namespace: NamespaceHex
    digests: DigestsHex


class PinAsked(ChunksAsked, frozen=True):
    """Chunks to be pinned: hard ones never leave, soft ones leave last."""

    hard: bool = False


class Done(Shown, frozen=True):
    """How many chunks it was done to; *busy* ones, leased or pinned, were left as they are."""

    chunks: int
    busy: int = 0


class Verified(Shown, frozen=True):
    """What became of each chunk: *ok*, *damaged* (and removed), *busy*, or not in host memory."""

    digest: str
    verdict: Literal["ok", "damaged", "busy", "elsewhere", "absent", "unchecked"]


class Verification(Shown, frozen=True):
    """The bytes of chunks in host memory, compared with their checksums."""

    chunks: list[Verified]


class PrefetchAsked(ChunksAsked, frozen=True):
    """The leading chunks of one prefix, in order."""


class EventPage(Shown, frozen=True):
    """Events, oldest first; *next* goes into `after` for those that follow."""

    events: list[Event]
    next: int


class SettingShown(Shown, frozen=True):
    """One setting. Secrets are in files of their own and never shown."""

    path: str
    value: str | int | bool | list[int | str]
    reloadable: bool


class ConfigShown(Shown, frozen=True):
    """The configuration that holds."""

    settings: list[SettingShown]


class ReloadDone(Shown, frozen=True):
    """Which settings differ: those that hold now, and those that wait for a restart."""

    applied: list[str]
    waiting: list[str]


class CurvePoint(Shown, frozen=True):
    """The hit rate that a tier of another size would have, as *times* today's."""

    times: float
    capacity_bytes: int
    hit_rate: float


class Curve(Shown, frozen=True):
    """What one tenant's traffic would hit in one tier, and all above it, of another size.

    By sampling: *references* uses of *sampled_chunks*, one chunk in 1 / *sampling_rate*, stand
    for *asked* chunks. For an LRU; *measured_hit_rate* is what really was hit (null where
    tenants share a tier).
    """

    tenant: str
    tier: ShownTier
    capacity_bytes: int
    asked: int
    references: int
    sampled_chunks: int
    sampling_rate: float
    measured_hit_rate: float | None
    points: list[CurvePoint]


class Curves(Shown, frozen=True):
    """All curves for which enough has been seen."""

    curves: list[Curve]


# --- explanations ------------------------------------------------------------------------


class ExplainAsked(Asked, frozen=True):
    """A prefix: token ids, or digests, or the name that an engine gave to a look-up.

    Without *namespace* it is the one that knows most of them. *scope* is the parent of the first
    chunk (LoRA, salt). *recompute_us* is what one chunk costs the engine.
    """

    namespace: NamespaceHex | None = None
    token_ids: Annotated[list[TokenId], Meta(max_length=ADMIN_PROMPT_TOKENS_MAX)] | None = None
    digests: Annotated[list[DigestHex], Meta(max_length=ADMIN_PROMPT_TOKENS_MAX)] | None = None
    request: Annotated[str, Meta(min_length=1, max_length=128)] | None = None
    scope: DigestHex | None = None
    recompute_us: Annotated[int, Meta(ge=0, le=RECOMPUTE_MAX_US)] = 0


class Difference(Shown, frozen=True):
    """A field in which the namespace that has a chunk differs from the one that was asked."""

    field: str
    here: str
    there: str


class ChunkExplained(Shown, frozen=True):
    """Where one chunk is, or what became of it; *text* says it in a sentence.

    *tiers* have it now; *tier* and *at* belong to what became of it.
    """

    number: int
    digest: str
    verdict: Verdict
    cause: Cause
    text: str
    tiers: list[str]
    tier: str | None
    at: float | None
    differences: list[Difference]


class HistoryShown(Shown, frozen=True):
    """How far the memory of what became of chunks reaches."""

    entries: int
    overwritten: int
    since_at: float


class Explained(Shown, frozen=True):
    """Why a prefix was a hit so far and no further.

    *chunks* are the first that are not counted, and a few before them; *looked_up_hits* is what
    the look-up counted that was asked about by name.
    """

    namespace: str | None
    chunks_asked: int
    hits: int
    looked_up_hits: int | None
    cause: Cause | None
    text: str
    chunks: list[ChunkExplained]
    history: HistoryShown

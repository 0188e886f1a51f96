"""What fields of messages may hold. Checked while a message is decoded."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from kvstore.limits import (
    CHUNK_SIZE_MAX_BYTES,
    DEADLINE_MAX_MS,
    DIGEST_SIZE_BYTES,
    ENGINE_COUNT_MAX,
    ENGINE_COUNTER_NAME_MAX_CHARS,
    ENGINE_COUNTERS_MAX,
    HANDOFF_CHUNKS_MAX,
    HANDOFF_NAME_MAX_CHARS,
    HOST_NAME_MAX_CHARS,
    KEYS_PER_REQUEST_MAX,
    KV_HEADS_MAX,
    LEASES_PER_SESSION_MAX,
    RECOMPUTE_MAX_US,
    REQUEST_ID_MAX,
    TRACE_PARENT_MAX_CHARS,
)

RequestId = Annotated[int, Meta(ge=0, le=REQUEST_ID_MAX)]
DeadlineMs = Annotated[int, Meta(ge=1, le=DEADLINE_MAX_MS)]
DigestField = Annotated[bytes, Meta(min_length=DIGEST_SIZE_BYTES, max_length=DIGEST_SIZE_BYTES)]
DigestList = Annotated[list[DigestField], Meta(min_length=1, max_length=KEYS_PER_REQUEST_MAX)]
Handle = Annotated[int, Meta(ge=0, le=REQUEST_ID_MAX)]
HandleList = Annotated[list[Handle], Meta(min_length=1, max_length=LEASES_PER_SESSION_MAX)]
Head = Annotated[int, Meta(ge=0, le=KV_HEADS_MAX)]
Size = Annotated[int, Meta(ge=1, le=CHUNK_SIZE_MAX_BYTES)]
U64 = Annotated[int, Meta(ge=0)]
RecomputeUs = Annotated[int, Meta(ge=0, le=RECOMPUTE_MAX_US)]
HandoffName = Annotated[str, Meta(min_length=1, max_length=HANDOFF_NAME_MAX_CHARS)]
ChunkNumber = Annotated[int, Meta(ge=0, le=HANDOFF_CHUNKS_MAX)]
PeerName = Annotated[str, Meta(max_length=HOST_NAME_MAX_CHARS)]
TraceParent = Annotated[str, Meta(max_length=TRACE_PARENT_MAX_CHARS)]
CounterName = Annotated[str, Meta(min_length=1, max_length=ENGINE_COUNTER_NAME_MAX_CHARS)]
Count = Annotated[int, Meta(ge=0, le=ENGINE_COUNT_MAX)]
# By the names of `ENGINE_GPU_COUNTERS`; others say nothing. Since the session began.
CounterMap = Annotated[dict[CounterName, Count], Meta(max_length=ENGINE_COUNTERS_MAX)]

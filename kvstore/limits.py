"""Every bound of the system, in one place. Units are the last word of the name."""

from __future__ import annotations

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB
TIB: Final = 1024 * GIB

# --- keys ------------------------------------------------------------------------------
DIGEST_SIZE_BYTES: Final = 32
NAMESPACE_ID_SIZE_BYTES: Final = 16
TOKEN_ID_MAX: Final = 2**32 - 1
EXTRA_SIZE_MAX_BYTES: Final = 64 * KIB

# --- wire ------------------------------------------------------------------------------
FRAME_SIZE_MAX_BYTES: Final = MIB
KEYS_PER_REQUEST_MAX: Final = 4096
# A load or a reserve answers with an extent per key and shard, which is larger than a key.
EXTENTS_PER_REPLY_MAX: Final = 8192
SESSIONS_MAX: Final = 256
IN_FLIGHT_PER_SESSION_MAX: Final = 64
ATTACHMENTS_PER_SESSION_MAX: Final = 64
LEASES_PER_SESSION_MAX: Final = 4096
RESERVATIONS_PER_SESSION_MAX: Final = 16384
CLIENT_NAME_SIZE_MAX_BYTES: Final = 128
PING_PAYLOAD_MAX_BYTES: Final = 256 * KIB
REQUEST_ID_MAX: Final = 2**63 - 1
HELLO_DEADLINE_SECONDS: Final = 5.0
DEADLINE_MAX_MS: Final = 600_000
WRITE_BUFFER_MAX_BYTES: Final = 8 * MIB
# What names the trace of a request: all that W3C has defined so far is 55 characters long.
TRACE_PARENT_MAX_CHARS: Final = 64
# What an engine tells of its transfers: names, more of them than there are, and counts that are
# exact in a float, too. It tells no more often than this.
ENGINE_COUNTERS_MAX: Final = 64
ENGINE_COUNTER_NAME_MAX_CHARS: Final = 64
ENGINE_COUNT_MAX: Final = 2**53
ENGINE_COUNTERS_SECONDS: Final = 1.0

# --- manifests and geometry --------------------------------------------------------------
MANIFEST_SIZE_MAX_BYTES: Final = 16 * KIB
NAMESPACES_MAX: Final = 4096
# Stats list the namespaces with most chunks, and cut long names.
STATS_NAMESPACES_MAX: Final = 256
STATS_NAME_MAX_CHARS: Final = 128
# Stats list so many sessions whose engines tell of their GPU.
STATS_ENGINES_MAX: Final = 64
CHUNK_TOKENS_MAX: Final = 65_536
LAYERS_MAX: Final = 1024
KV_HEADS_MAX: Final = 1024
HEAD_DIM_MAX: Final = 65_536
CHUNK_SIZE_MAX_BYTES: Final = GIB
# Tokens at the start of a sequence that lossy codecs leave as they are.
SINKS_MAX: Final = 64

# --- arena -----------------------------------------------------------------------------
EXTENT_ALIGNMENT_BYTES: Final = 4 * KIB
CHECKSUM_BLOCK_BYTES: Final = 64 * KIB
CHECKSUM_SIZE_BYTES: Final = 8
ARENA_SIZE_MIN_BYTES: Final = MIB
ARENA_SIZE_MAX_BYTES: Final = 16 * TIB
PREFAULT_STEP_BYTES: Final = 64 * MIB
MAP_STEP_BYTES: Final = 4 * MIB
# Records of 160 bytes beside an arena that outlives the daemon: one for so much of it. They
# are backed by memory from the start, so their number has an end: 640 MiB.
RECORD_SPAN_BYTES: Final = 64 * KIB
RECORDS_MIN: Final = 4096
RECORDS_MAX: Final = 4 * MIB
RECORD_BANK_SIZE_BYTES: Final = 4 * MIB

# --- tenants and admission ---------------------------------------------------------------
TENANTS_MAX: Final = 255
# What an admission remembers of a tier: at most 5 MiB, whatever the tier's capacity.
ADMISSION_ENTRIES_MAX: Final = MIB
# Chunks that have left and that an eviction policy recognises, 8 bytes each.
GHOSTS_MAX: Final = MIB

# --- slower tiers ------------------------------------------------------------------------
TIER_READS_MAX: Final = 8
"""Reads under way at once, a tier. Writes are half as many, so that a read finds room."""
TIER_READS_BYTES: Final = 32 * MIB
"""While so many bytes are under way, no more reads than those, whatever a tier takes at once."""
TIER_WRITES_MAX: Final = 4
TIER_FINDS_MAX: Final = 8
# Chunks that are made smaller for a tier at once; each takes memory for itself as it is, plain
# and encoded.
TIER_TRANSCODES_MAX: Final = 2
# Namespaces whose encoders a tier remembers.
TRANSCODERS_MAX: Final = 256
WRITE_QUEUE_CHUNKS_MAX: Final = 4096
# The share of the host tier whose chunks may wait to be written to one slower tier.
WRITE_QUEUE_SHARE: Final = 4
PREFETCH_QUEUE_CHUNKS_MAX: Final = 4096
REMOVE_QUEUE_CHUNKS_MAX: Final = 65_536
# The share of the host tier that is kept free by demoting ahead of need.
FREE_WATERMARK_SHARE: Final = 16
DEMOTIONS_AHEAD_MAX: Final = 8
# Chunks of tiers that forget by themselves (a server's), as far as they are remembered here.
REMEMBERED_CHUNKS_MAX: Final = 1_000_000
FIND_DIGESTS_MAX: Final = 256
FIND_WAIT_MAX_SECONDS: Final = 0.02
TIER_TIMEOUT_SECONDS: Final = 1.0
# The slowest medium that is waited for: what it takes for its bytes comes on top.
TIER_BANDWIDTH_FLOOR_BYTES: Final = 32 * MIB
BREAKER_FAILURES_MAX: Final = 3
BREAKER_TROUBLE_MAX_SECONDS: Final = 1.0
BREAKER_PAUSE_MIN_SECONDS: Final = 0.5
BREAKER_PAUSE_MAX_SECONDS: Final = 30.0
METER_STALE_SECONDS: Final = 30.0
HINTS_MAX: Final = 4096
HINT_CHUNKS_MAX: Final = 262_144
HINT_SECONDS_MAX: Final = 86_400
# A conversation that is expected back within this time keeps its chunks in the host tier.
HINT_KEEP_SECONDS: Final = 60.0
RECOMPUTE_MAX_US: Final = 3_600_000_000
TENANT_NAME_MAX_CHARS: Final = 64
HOST_NAME_MAX_CHARS: Final = 255

# --- disk tier ---------------------------------------------------------------------------
DISK_SIZE_MIN_BYTES: Final = MIB
DISK_SIZE_MAX_BYTES: Final = 16 * TIB
# The smallest chunk takes a page of header and one of payload, and a record of 128 bytes: with
# this share of the capacity the index has room for as many as fit.
DISK_INDEX_SHARE: Final = 64
# What one thread reads or writes at once: large enough for any disk, small enough that the
# checksums of one part are taken while others move.
DISK_PART_SIZE_BYTES: Final = 2 * MIB
DISK_READ_THREADS: Final = 4
DISK_WRITE_THREADS: Final = 4
DISK_CLOSE_TIMEOUT_SECONDS: Final = 5.0
DISK_MARKER_MAX_BYTES: Final = 4 * KIB

# --- redis tier ------------------------------------------------------------------------
# A value and its 128-byte label stay within 4 MiB: larger ones are slower on every path, and
# one byte above a power of two costs the server a quarter more memory.
REDIS_STRIPE_BYTES: Final = 4 * MIB - CHECKSUM_BLOCK_BYTES
REDIS_CONNECTIONS_MAX: Final = 32
REDIS_TIMEOUT_MIN_SECONDS: Final = 0.01
REDIS_TIMEOUT_MAX_SECONDS: Final = 60.0
REDIS_PREFIX_MAX_CHARS: Final = 64
REDIS_SEEDS_MAX: Final = 64
REDIS_SECRET_MAX_BYTES: Final = 4 * KIB
# Bytes that come slower than this count as not coming at all.
REDIS_SPEED_MIN_BYTES_PER_SECOND: Final = 16 * MIB
REDIS_REDIRECTS_MAX: Final = 5
REDIS_SHARDS_PER_CHUNK_MAX: Final = 256
REDIS_REPLY_MAX_BYTES: Final = 16 * MIB

# --- GPU -------------------------------------------------------------------------------
# Work on a device that takes longer counts as stuck: its transfer is given up.
DEVICE_PATIENCE_SECONDS: Final = 10.0
DEVICE_POLL_SECONDS: Final = 50e-6
# Staging of one direction, on the device; as much pinned memory where the arena is not registered.
STAGING_SIZE_BYTES: Final = 128 * MIB
STAGING_SIZE_MAX_BYTES: Final = 8 * GIB
STAGING_SLOTS: Final = 4
# How many encoded chunks share the staging of one that is plain, at most.
STAGED_PER_PLAIN_MAX: Final = 8
# Chunks that do not leave the device need no staging: so many go in one transfer, for a GPU is done
# with one of them sooner than a host is with giving it a transfer.
POOLED_PER_TRANSFER_MAX: Final = 64
# What kernels of codecs of variable rate note of the chunks of one transfer, on the device.
DEVICE_SCRATCH_BYTES: Final = 16 * MIB
# The arena is registered in windows: one call for all of it would hold up the engine's own calls.
REGISTER_STEP_BYTES: Final = 256 * MIB
# Pages of so many bytes, each in one piece, are moved by the copy engine one by one, unless it was
# measured which way is faster: of pages and transfers of at least so much, so often each way.
DIRECT_PAGE_MIN_BYTES: Final = 256 * KIB
TRIED_PAGE_MIN_BYTES: Final = 16 * KIB
TRIED_TRANSFER_MIN_BYTES: Final = 1 * MIB
TRIED_TRANSFERS: Final = 6
# Copies given to the device in one call. Below the first number a call for each is as good; one
# call for tens of thousands has been seen to crash in the driver.
BATCHED_COPIES_MIN: Final = 4
BATCHED_COPIES_MAX: Final = 1024
DEVICE_FAILURES_MAX: Final = 8
# The device tier: its pool, and the pieces in which the daemon copies chunks out of it, and in.
POOL_SIZE_MAX_BYTES: Final = 16 * TIB
DEVICE_PIECE_BYTES: Final = 4 * MIB
# Heads of encoded chunks on their way to a pool, or from there, at a time: on each side of the bus.
HEADS_ROOM_BYTES: Final = 2 * MIB
# Chunks that wait to be copied into the pool, one at a time.
PROMOTE_QUEUE_CHUNKS_MAX: Final = 4096
DEVICE_CLOSE_TIMEOUT_SECONDS: Final = 5.0
STUCK_TRANSFERS_MAX: Final = 64

# --- admin API -------------------------------------------------------------------------
ADMIN_BODY_MAX_BYTES: Final = 64 * KIB
ADMIN_BODY_SECONDS: Final = 10.0
# What may hold the token ids of a whole prompt.
ADMIN_PROMPT_BODY_MAX_BYTES: Final = 2 * MIB
ADMIN_PROMPT_TOKENS_MAX: Final = 131_072
ADMIN_DIGESTS_MAX: Final = 256
ADMIN_PAGE_MAX: Final = 500
# How many places of the index one page of chunks looks at.
ADMIN_SCAN_MAX: Final = 4096
ADMIN_CONNECTIONS_MAX: Final = 64
ADMIN_CONNECTION_IDLE_SECONDS: Final = 30.0
ADMIN_FIRST_REQUEST_SECONDS: Final = 10.0
# Connections whose TLS has not begun yet.
ADMIN_HANDSHAKES_MAX: Final = 32
# Connections of so long ago at most on which nothing was asked, closed ones included.
ADMIN_SILENT_MAX: Final = 256
ADMIN_REQUESTS_PER_SECOND: Final = 100
ADMIN_REQUESTS_BURST: Final = 200
# Wrong tokens, from one address.
ADMIN_FAILURES_PER_SECOND: Final = 1
ADMIN_FAILURES_BURST: Final = 10
# An address that is taken is tried again.
ADMIN_RETRY_SECONDS: Final = 5.0
ADMIN_ADDRESSES_MAX: Final = 1024
ADMIN_TOKENS_MAX: Final = 16
ADMIN_TOKEN_MIN_CHARS: Final = 32
ADMIN_TOKEN_MAX_CHARS: Final = 256
ADMIN_TOKEN_FILE_MAX_BYTES: Final = 16 * KIB
# What is noted for `kvstore trace record`, and for how long after it has asked last.
TRACE_LOOKUPS_MAX: Final = 16_384
TRACE_DIGESTS_MAX: Final = 262_144
TRACE_IDLE_SECONDS: Final = 10.0
TRACE_PAGE_MAX: Final = 256
TRACE_PAGE_DIGESTS_MAX: Final = 16_384
ADMIN_SNAPSHOT_SECONDS: Final = 0.2
ADMIN_STATUS_EVENTS_MAX: Final = 20
ADMIN_HISTORY_SAMPLES_MAX: Final = 720
ADMIN_HISTORY_SECONDS: Final = 5.0
# Fates of chunks that have left, 14 bytes each.
HISTORY_ENTRIES_MIN: Final = 16_384
HISTORY_ENTRIES_MAX: Final = 524_288
# Look-ups that are remembered with their digests, and how many of these in all.
RECENT_LOOKUPS_MAX: Final = 1024
LOOKUP_NAME_MAX_CHARS: Final = 128
RECENT_LOOKUP_DIGESTS_MAX: Final = 65_536
# Chunks that are sampled for miss-ratio curves: of a tenant, and of all together.
REUSE_SAMPLES_MIN: Final = 256
REUSE_SAMPLES_MAX: Final = 8192
REUSE_SAMPLES_TOTAL_MAX: Final = 65_536
REUSE_PENDING_MAX: Final = 2048
# Chunks of look-ups that nobody has looked at yet, some 110 bytes each.
REUSE_NOTED_MAX: Final = 16_384
# How many of them are worked on at once, which takes about a millisecond, and how often.
REUSE_BATCH: Final = 128
# A curve from fewer uses says nothing.
REUSE_REFERENCES_MIN: Final = 200
REUSE_PAUSE_SECONDS: Final = 0.1
EXPLAINED_CHUNKS_MAX: Final = 256
EXPLAINED_GEOMETRIES_MAX: Final = 8
EXPLAINED_ELSEWHERE_MAX: Final = 4
READINESS_SECONDS: Final = 2.0
READINESS_TIMEOUT_SECONDS: Final = 2.0
EVENTS_MAX: Final = 2048
# Spans that wait to be exported, and how many of them one request to the receiver carries.
SPANS_WAITING_MAX: Final = 2048
SPANS_PER_EXPORT_MAX: Final = 128
SPANS_TIMEOUT_SECONDS: Final = 2.0
EVENT_FIELDS_MAX: Final = 16
EVENT_TEXT_MAX_CHARS: Final = 512

# --- leases ----------------------------------------------------------------------------
LEASE_TTL_MIN_SECONDS: Final = 1.0
LEASE_TTL_MAX_SECONDS: Final = 3600.0

# --- hand-offs -------------------------------------------------------------------------
HANDOFF_NAME_MAX_CHARS: Final = 128
HANDOFF_PAYLOAD_MAX_BYTES: Final = 64 * KIB
HANDOFF_CHUNKS_MAX: Final = 65_536
HANDOFF_CONSUMERS_MAX: Final = 64
HANDOFF_TTL_MIN_SECONDS: Final = 0.1
HANDOFF_TTL_MAX_SECONDS: Final = 600.0
# All that a daemon remembers, those that are over included: a name is used once.
HANDOFFS_MAX: Final = 4096
HANDOFFS_PER_SESSION_MAX: Final = 1024
# The share of the host tier that open hand-offs may hold; chunks beyond it can be evicted.
HANDOFF_HOLD_SHARE: Final = 2

# --- peers -----------------------------------------------------------------------------
PEERS_MAX: Final = 64
PEER_NONCE_SIZE_BYTES: Final = 32
PEER_PROOF_SIZE_BYTES: Final = 32
PEER_TOKEN_MIN_BYTES: Final = 16
PEER_TOKEN_MAX_BYTES: Final = 4 * KIB
# Connections that other daemons may have here; each has a thread.
PEER_SESSIONS_MAX: Final = 256
# Connections to one other daemon: for bytes, and for hand-offs that are followed.
PEER_LANES: Final = 4
PEER_FOLLOWS_MAX: Final = 32
PEER_FOLLOW_SECONDS: Final = 1.0
PEER_TIMEOUT_SECONDS: Final = 2.0
# Bytes that come slower than this count as not coming at all.
PEER_SPEED_MIN_BYTES_PER_SECOND: Final = 4 * MIB
PEER_IDLE_SECONDS: Final = 120.0
PEER_OFFERS_MAX: Final = 256
PEER_SHARDS_PER_CHUNK_MAX: Final = 64
# Reads from peers at once, as far as `TIER_READS_BYTES` lets them: small ones go in batches.
PEER_READS_MAX: Final = 32
# Questions to one other daemon about what it holds, at once.
PEER_ASKS_MAX: Final = 4
# A daemon that has not said by then what it holds counts as failing.
PEER_ASK_SECONDS: Final = 0.5
# Turns of other daemons' tiers at once, and what is sent in one; one chunk while loads of this host
# wait for slower tiers.
PEER_SPARE_SENDS_MAX: Final = 8
PEER_TURN_BYTES: Final = 4 * MIB
# Who waits longer for a turn is told that there is none now.
PEER_TURN_SECONDS: Final = 0.1
# Chunks of which it is remembered which other daemon holds them, some 200 bytes each.
PEER_HOLDERS_MAX: Final = 65_536
# What this host holds stands in the directory for so long, unless it says so again.
DIRECTORY_TTL_SECONDS: Final = 30.0
DIRECTORY_BEAT_SECONDS: Final = 10.0
# News are gathered for so long, and told so many at a time.
DIRECTORY_GATHER_SECONDS: Final = 0.1
DIRECTORY_BATCH_CHUNKS: Final = 512
# Beyond so many that could not be told, all is told anew.
DIRECTORY_NEWS_MAX: Final = 16_384
# The part of a digest that stands in the directory: what it says is looked into, never believed.
DIRECTORY_MEMBER_BYTES: Final = 16
# Bytes that are digested together. Fewer calls are worth more than what is still in a cache.
PEER_PART_BYTES: Final = 8 * MIB
PEER_SOCKET_BUFFER_BYTES: Final = 4 * MIB
# Shards are asked for in batches: of one hand-off so many at once, of a tier one on each lane.
PULL_BATCHES_AHEAD: Final = 6
PULL_BATCH_CHUNKS_MAX: Final = 16
PULL_BATCH_BYTES: Final = 16 * MIB
PULLS_MAX: Final = 1024
# A hand-off that comes no further for so long is given up, and the rest computed.
PULL_TROUBLE_SECONDS: Final = 10.0
PULL_PAUSE_MIN_SECONDS: Final = 0.02
PULL_PAUSE_MAX_SECONDS: Final = 1.0

# --- NIXL between peers ----------------------------------------------------------------
# What describes an agent: some hundred bytes, and more with many network adapters.
NIXL_METADATA_MAX_BYTES: Final = 16 * KIB
NIXL_NAME_MAX_CHARS: Final = 128
NIXL_RUNS_MAX: Final = 1024
# One datagram between the daemon and the process that has its agent.
NIXL_MESSAGE_MAX_BYTES: Final = 128 * KIB
NIXL_LOG_LINE_MAX_BYTES: Final = 16 * KIB
# How often that process lets the library work while nobody reads, and while others may read here.
NIXL_IDLE_SECONDS: Final = 0.05
NIXL_WATCH_SECONDS: Final = 0.0005
NIXL_MEET_SECONDS: Final = 2.0
# A process that keeps its orders longer than their time is ended from outside.
NIXL_GRACE_SECONDS: Final = 1.0
NIXL_RESTART_SECONDS: Final = 1.0
# After a failure, a peer is asked for bytes over its connection for so long.
NIXL_PAUSE_SECONDS: Final = 30.0

# --- client ----------------------------------------------------------------------------
# Reserving and committing take the daemon some 10 us a chunk, during which it serves nobody
# else; a client asks for no more than this at once.
CHUNKS_PER_TRANSFER_MAX: Final = 256
# What loads from slower tiers, and stores that slower tiers are to have first, may take where
# nobody says what computing costs.
PATIENCE_SECONDS: Final = 10.0
# What is encoded before it is known how large it becomes, a thread; one chunk fits at least.
ENCODE_SCRATCH_BYTES: Final = 32 * MIB
# A load is asked for in parts of so many bytes, the next while the last is being copied.
LOAD_PART_BYTES: Final = 64 * MIB
# Chunks of which a connector has told routers that they are stored; told of more, it takes back
# the oldest.
KV_EVENT_CHUNKS_MAX: Final = 64 * 1024
PROBE_INTERVAL_MIN_SECONDS: Final = 0.05
PROBE_INTERVAL_MAX_SECONDS: Final = 2.0

# --- proxy between prefill and decode engines ------------------------------------------
PROXY_BODY_MAX_BYTES: Final = 64 * MIB
PROXY_CONNECT_SECONDS: Final = 5.0
PROXY_EVENT_MAX_BYTES: Final = 4 * MIB
# Below the 120 s that decode waits for a chunk, so that the proxy hears first of a silent engine.
PROXY_PREFILL_SECONDS: Final = 100.0
PROXY_PROBE_SECONDS: Final = 2.0
# An engine that says nothing for so long, in the middle of an answer or before it, is gone.
PROXY_QUIET_MAX_SECONDS: Final = 600.0
PROXY_REQUESTS_MAX: Final = 1024
PROXY_REST_SECONDS: Final = 5.0
PROXY_SILENT_REST_SECONDS: Final = 60.0

# A full request of keys, and a full reply of extents (at most 45 bytes each), fit one frame.
assert KEYS_PER_REQUEST_MAX * (DIGEST_SIZE_BYTES + 2) < FRAME_SIZE_MAX_BYTES
assert EXTENTS_PER_REPLY_MAX * 45 < FRAME_SIZE_MAX_BYTES
assert CHUNK_SIZE_MAX_BYTES < 2**32
assert ARENA_SIZE_MAX_BYTES // EXTENT_ALIGNMENT_BYTES <= 2**32
assert DISK_SIZE_MAX_BYTES // EXTENT_ALIGNMENT_BYTES <= 2**32
assert DISK_PART_SIZE_BYTES % CHECKSUM_BLOCK_BYTES == 0
# A full list of offers, of at most 25 bytes a shard and 36 a chunk, fits one frame.
assert PEER_OFFERS_MAX * (36 + PEER_SHARDS_PER_CHUNK_MAX * 25) < FRAME_SIZE_MAX_BYTES
assert PEER_PART_BYTES % CHECKSUM_BLOCK_BYTES == 0
assert FIND_DIGESTS_MAX <= PEER_OFFERS_MAX
assert DIRECTORY_BEAT_SECONDS < DIRECTORY_TTL_SECONDS
assert DEVICE_PIECE_BYTES % CHECKSUM_BLOCK_BYTES == 0
assert PULL_BATCH_CHUNKS_MAX * PEER_SHARDS_PER_CHUNK_MAX <= NIXL_RUNS_MAX
# A full list of wants, of at most 80 bytes each, fits one frame; one of runs, one datagram.
assert NIXL_RUNS_MAX * 80 < FRAME_SIZE_MAX_BYTES
assert NIXL_METADATA_MAX_BYTES + NIXL_RUNS_MAX * 29 < NIXL_MESSAGE_MAX_BYTES

"""Every message of the data socket: MessagePack arrays whose first item is the tag.

Requests carry an id chosen by the client and a deadline in milliseconds from receipt; the
reply carries the same id. Lengths and ranges are checked while decoding, before any of it is
used. Fields are only ever appended (protocol/VERSION.md), tags never reused. A *traceparent* is
the trace that a request belongs to, as W3C writes it; empty where nobody records it.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta

from kvstore.errors import FrameError
from kvstore.limits import (
    CLIENT_NAME_SIZE_MAX_BYTES,
    DIGEST_SIZE_BYTES,
    HANDOFF_CONSUMERS_MAX,
    HANDOFF_PAYLOAD_MAX_BYTES,
    HANDOFF_TTL_MAX_SECONDS,
    HANDOFF_TTL_MIN_SECONDS,
    HINT_SECONDS_MAX,
    HOST_NAME_MAX_CHARS,
    KEYS_PER_REQUEST_MAX,
    LOOKUP_NAME_MAX_CHARS,
    MANIFEST_SIZE_MAX_BYTES,
    PING_PAYLOAD_MAX_BYTES,
    TENANT_NAME_MAX_CHARS,
)
from kvstore.protocol import fields as f, stats
from kvstore.types import HandoffState, HintKind

PROTOCOL_VERSION: Final = 3
VERSIONS_SPOKEN: Final = (1, 2, 3)


class Message(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What all messages share: the id that pairs a reply with its request."""

    request_id: f.RequestId


class Request(Message, frozen=True, gc=False):
    """A message from client to daemon; unanswered after *deadline_ms*, it gets an error."""

    deadline_ms: f.DeadlineMs


# --- requests --------------------------------------------------------------------------


class Hello(Request, tag=1, frozen=True, gc=False):
    """First message of a session. The daemon refuses versions that it does not speak.

    A named *tenant*, whom the peer must be allowed to be, has namespaces of its own.
    """

    version: int
    client: Annotated[str, Meta(max_length=CLIENT_NAME_SIZE_MAX_BYTES)] = ""
    tenant: Annotated[str, Meta(max_length=TENANT_NAME_MAX_CHARS)] = ""


class Attach(Request, tag=2, frozen=True, gc=False):
    """Enter the namespace of *manifest*; *chunk_bytes* is the client's own idea of its size.

    The reply to the first attach of a session carries the arena's file descriptor, the first with
    *pool* that of the pool of device memory, if there is one: loads and stores in a space that
    was entered so may use it.
    """

    manifest: Annotated[bytes, Meta(max_length=MANIFEST_SIZE_MAX_BYTES)]
    chunk_bytes: f.Size
    pool: bool = False


class Lookup(Request, tag=3, frozen=True, gc=False):
    """Count the leading chunks that are present.

    With *window* w > 0: the largest n such that chunks [n - w, n) are present, the rule of
    sliding-window groups. With *wait*, chunks that others are writing are waited for until
    the deadline. With *lease*, the chunks counted are leased to this session. *recompute_us*
    is what computing one chunk costs: those that take longer to load are not counted. By its
    *name*, such as the engine's id of the request, a look-up can be explained later.
    """

    space: f.Handle
    digests: f.DigestList
    window: Annotated[int, Meta(ge=0, le=KEYS_PER_REQUEST_MAX)] = 0
    wait: bool = False
    lease: bool = False
    recompute_us: f.RecomputeUs = 0
    name: Annotated[str, Meta(max_length=LOOKUP_NAME_MAX_CHARS)] = ""
    traceparent: f.TraceParent = ""


class Load(Request, tag=4, frozen=True, gc=False):
    """Lease the leading chunks present and say where the shards covering the heads lie.

    *head_stop* 0 stands for all heads. Chunks in slower tiers are brought up first; what has
    not come by the deadline is left out. *recompute_us* as in a look-up.
    """

    space: f.Handle
    digests: f.DigestList
    head_start: f.Head = 0
    head_stop: f.Head = 0
    recompute_us: f.RecomputeUs = 0
    traceparent: f.TraceParent = ""


class Reserve(Request, tag=5, frozen=True, gc=False):
    """Ask for room for consecutive chunks of one prefix; *parent* precedes the first.

    *sizes* gives bytes per chunk when a codec makes them differ; empty means the shard size
    of the namespace.
    """

    space: f.Handle
    digests: f.DigestList
    parent: Annotated[bytes, Meta(max_length=DIGEST_SIZE_BYTES)] = b""
    head_start: f.Head = 0
    head_stop: f.Head = 0
    sizes: Annotated[list[f.Size], Meta(max_length=KEYS_PER_REQUEST_MAX)] = []
    traceparent: f.TraceParent = ""


class Filled(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One reservation whose bytes are in place, with the root of their checksum tree."""

    reservation: f.Handle
    root: f.U64


class Commit(Request, tag=6, frozen=True, gc=False):
    """Publish filled reservations. Each succeeds or fails alone."""

    filled: Annotated[list[Filled], Meta(min_length=1, max_length=KEYS_PER_REQUEST_MAX)]
    traceparent: f.TraceParent = ""


class Abort(Request, tag=7, frozen=True, gc=False):
    """Give reservations back unpublished. All of them must be this session's."""

    reservations: f.HandleList


class Release(Request, tag=8, frozen=True, gc=False):
    """End leases. All of them must be this session's."""

    leases: f.HandleList


class Pin(Request, tag=9, frozen=True, gc=False):
    """Hold chunks beyond this session: hard never leaves, soft leaves last."""

    space: f.Handle
    digests: f.DigestList
    hard: bool = False


class Unpin(Request, tag=10, frozen=True, gc=False):
    """End both kinds of pin."""

    space: f.Handle
    digests: f.DigestList


class Delete(Request, tag=11, frozen=True, gc=False):
    """Remove chunks now; those leased, hard-pinned or arriving stay and are counted as busy.

    *damaged* says why: whoever loaded them found that their bytes are not what they should be.
    """

    space: f.Handle
    digests: f.DigestList
    damaged: bool = False


class Stats(Request, tag=12, frozen=True, gc=False):
    """Ask what the daemon holds and has done."""


class Ping(Request, tag=13, frozen=True, gc=False):
    """Ask for *payload* back, as any request is answered; tell *counters* of GPU transfers."""

    payload: Annotated[bytes, Meta(max_length=PING_PAYLOAD_MAX_BYTES)] = b""
    counters: f.CounterMap = {}


class Prefetch(Request, tag=14, frozen=True, gc=False):
    """Bring the leading chunks present into the host tier, when nothing else is to be done."""

    space: f.Handle
    digests: f.DigestList


class Hint(Request, tag=15, frozen=True, gc=False):
    """Say what is expected of the conversation that ends with the last of *digests*.

    It returns in about *seconds*, goes on at the host called *host*, or is finished. Advice:
    the daemon may keep, bring up, pass on or let go of its chunks, and owes nothing.
    """

    space: f.Handle
    digests: f.DigestList
    kind: HintKind
    seconds: Annotated[int, Meta(ge=0, le=HINT_SECONDS_MAX)] = 0
    host: Annotated[str, Meta(max_length=HOST_NAME_MAX_CHARS)] = ""


class HandoffOpen(Request, tag=16, frozen=True, gc=False):
    """Open a hand-off: chunks of one prompt, from this session to *consumers* others.

    *name* is used once. Without news of either side for *ttl_ms* the hand-off expires.
    """

    space: f.Handle
    name: f.HandoffName
    consumers: Annotated[int, Meta(ge=1, le=HANDOFF_CONSUMERS_MAX)] = 1
    ttl_ms: Annotated[
        int,
        Meta(ge=int(HANDOFF_TTL_MIN_SECONDS * 1000), le=int(HANDOFF_TTL_MAX_SECONDS * 1000)),
    ] = 60_000


class HandoffPublish(Request, tag=17, frozen=True, gc=False):
    """Announce chunks of an open hand-off of this session, number *first* and those behind it.

    Each is ready as soon as all its heads are committed, be that before or after.
    """

    space: f.Handle
    name: f.HandoffName
    first: f.ChunkNumber
    digests: f.DigestList


class HandoffClose(Request, tag=18, frozen=True, gc=False):
    """Say that nothing more will be published or stored; *payload* goes to the consumers."""

    space: f.Handle
    name: f.HandoffName
    payload: Annotated[bytes, Meta(max_length=HANDOFF_PAYLOAD_MAX_BYTES)] = b""


class HandoffAbort(Request, tag=19, frozen=True, gc=False):
    """Give a hand-off of this session up; consumers compute what is not ready."""

    space: f.Handle
    name: f.HandoffName


class HandoffAwait(Request, tag=20, frozen=True, gc=False):
    """Wait until chunks from number *first* on are ready, the hand-off is over, or the deadline.

    *peer* names the daemon where it was opened, empty for this one. With *early*, a name that
    nobody has opened yet is waited for, too.
    """

    space: f.Handle
    name: f.HandoffName
    first: f.ChunkNumber = 0
    peer: f.PeerName = ""
    early: bool = False
    traceparent: f.TraceParent = ""


class HandoffLeave(Request, tag=21, frozen=True, gc=False):
    """Say that this consumer needs no more of the hand-off."""

    space: f.Handle
    name: f.HandoffName
    peer: f.PeerName = ""


AnyHandoff = (
    HandoffOpen | HandoffPublish | HandoffClose | HandoffAbort | HandoffAwait | HandoffLeave
)

AnyRequest = (
    Hello
    | Attach
    | Lookup
    | Load
    | Reserve
    | Commit
    | Abort
    | Release
    | Pin
    | Unpin
    | Delete
    | Stats
    | Ping
    | Prefetch
    | Hint
    | AnyHandoff
)


# --- replies ---------------------------------------------------------------------------


class Welcome(Message, tag=65, frozen=True, gc=False):
    """The session may go on."""

    version: int
    server: str


class Attached(Message, tag=66, frozen=True, gc=False):
    """The namespace is entered; *space* stands for it in this session's requests.

    *prefaulted* says that the arena is, or is being, backed by memory as a whole, *through*
    that a commit is answered only once slower tiers have what they are to have. *traced* says
    that the daemon records requests that name their trace (`traceparent`). A pool of
    *pool_bytes* lies on the GPU *pool_device*; where it has a *pool_handle*, that opens it
    instead of a descriptor.
    """

    space: f.Handle
    namespace: bytes
    arena_bytes: int
    lease_ttl_ms: int
    checksums: bool
    verify_loads: bool
    prefaulted: bool = False
    through: bool = False
    traced: bool = False
    pool_bytes: int = 0
    pool_device: str = ""
    pool_handle: bytes = b""


class Found(Message, tag=67, frozen=True, gc=False):
    """*hits* chunks count; *tiers* is run-length: [tier, chunks] in prefix order.

    *arriving* chunks directly behind the hits are being written. *lease* is 0 when none was
    asked for or nothing was found. *expected_us* is what their load takes, by all that is
    known; 0 when they are in the host tier.
    """

    hits: int
    arriving: int
    tiers: list[tuple[int, int]]
    lease: f.Handle = 0
    expected_us: int = 0


class Shard(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Where one shard of a chunk lies, and the root of its checksum tree.

    Offsets are those in the arena; from its end on they go on through the pool.
    """

    head_start: int
    head_stop: int
    offset: int
    size_bytes: int
    root: int


class Loaded(Message, tag=68, frozen=True, gc=False):
    """The leading chunks present, shard by shard, held by *lease* (0 when there are none)."""

    lease: f.Handle
    chunks: list[list[Shard]]


class Slot(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What became of one key of a reserve; *offset* and *reservation* only when reserved."""

    outcome: int
    reservation: f.Handle = 0
    offset: int = 0


class Reserved(Message, tag=69, frozen=True, gc=False):
    """One slot per key, in order."""

    slots: list[Slot]


class Failure(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Why the commit of one reservation published nothing."""

    reservation: f.Handle
    code: int
    message: str


class Committed(Message, tag=70, frozen=True, gc=False):
    """All filled reservations are published, but for those in *failures*.

    Those in *volatile* are in the host tier alone, though a slower tier was to have a copy
    before this reply.
    """

    failures: list[Failure]
    volatile: list[f.Handle] = []


class Done(Message, tag=71, frozen=True, gc=False):
    """The request was carried out on *count* things; *busy* ones were left as they are."""

    count: int
    busy: int = 0


class Pong(Message, tag=72, frozen=True, gc=False):
    """The payload of the ping."""

    payload: bytes


ArenaStats = stats.ArenaStats
DaemonStats = stats.DaemonStats
NamespaceStats = stats.NamespaceStats
TenantStats = stats.TenantStats
TierStats = stats.TierStats


class StatsReply(Message, tag=73, frozen=True, gc=False):
    """The answer to stats."""

    stats: DaemonStats


class HandoffOpened(Message, tag=74, frozen=True, gc=False):
    """The hand-off is open. *host* is what other daemons call this one; empty: none can ask it."""

    host: str


class HandoffReady(Message, tag=75, frozen=True, gc=False):
    """How a hand-off stands: *digests* are ready, from the number asked for on.

    With *is_last* nothing comes behind them, and *payload* is what a closed one has to say.
    *published* counts all that was announced so far.
    """

    state: HandoffState
    digests: list[f.DigestField]
    is_last: bool
    published: int
    payload: bytes = b""


class Error(Message, tag=127, frozen=True, gc=False):
    """The request failed. Id 0 means the session as a whole, which then closes."""

    code: int
    message: str
    retryable: bool


AnyReply = (
    Welcome
    | Attached
    | Found
    | Loaded
    | Reserved
    | Committed
    | Done
    | Pong
    | StatsReply
    | HandoffOpened
    | HandoffReady
    | Error
)

_encoder = msgspec.msgpack.Encoder()
_request_decoder = msgspec.msgpack.Decoder(AnyRequest)
_reply_decoder = msgspec.msgpack.Decoder(AnyReply)


def encode(message: Message) -> bytes:
    """Return the MessagePack form of *message*, without the frame's length."""
    return _encoder.encode(message)


def decode_request(frame: bytes | memoryview) -> AnyRequest:
    """Return the request in *frame*; raises `FrameError` on anything else."""
    try:
        request: AnyRequest = _request_decoder.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FrameError(f"frame is not a request: {error}") from error
    return request


def decode_reply(frame: bytes | memoryview) -> AnyReply:
    """Return the reply in *frame*; raises `FrameError` on anything else."""
    try:
        reply: AnyReply = _reply_decoder.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FrameError(f"frame is not a reply: {error}") from error
    return reply

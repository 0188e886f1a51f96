"""What daemons say to each other: frames of MessagePack arrays, and bytes behind some of them.

The daemon that is called speaks first: a nonce. Both then show that they know the token, which
never travels: each sends an HMAC over both nonces. Fields are only appended, tags never reused.

    caller             called
           <---------- PeerNonce
    PeerHello -------->
           <---------- PeerWelcome
    Follow, Want, PeerLeave, one at a time -->  Following, Sending + bytes or Gone, Left
    Have, spare Wants (version 2)           -->  Holding, Sending + bytes or Gone or Busy
    Grant (version 2)                       -->  Granted or NotGranted
    Returned, when it was granted           -->

Both speak the newest version that both know. Version 1 is that of hand-offs alone. Wants
may be sent while others are yet to be answered; answers come in their order.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from kvstore.errors import FrameError, RequestError, VersionError
from kvstore.limits import (
    ARENA_SIZE_MAX_BYTES,
    CHUNK_SIZE_MAX_BYTES,
    DEADLINE_MAX_MS,
    DIGEST_SIZE_BYTES,
    HANDOFF_CONSUMERS_MAX,
    HANDOFF_PAYLOAD_MAX_BYTES,
    HOST_NAME_MAX_CHARS,
    KV_HEADS_MAX,
    NAMESPACE_ID_SIZE_BYTES,
    NIXL_METADATA_MAX_BYTES,
    NIXL_NAME_MAX_CHARS,
    NIXL_RUNS_MAX,
    PEER_NONCE_SIZE_BYTES,
    PEER_OFFERS_MAX,
    PEER_PROOF_SIZE_BYTES,
    PEER_SHARDS_PER_CHUNK_MAX,
    TENANT_NAME_MAX_CHARS,
)
from kvstore.protocol.fields import U64, ChunkNumber, DigestField, HandoffName, Size
from kvstore.protocol.manifest import Manifest
from kvstore.types import HandoffState, HeadRange

PEER_VERSION: Final = 2
PEER_VERSION_MIN: Final = 1
PEER_VERSION_HAVE: Final = 2
"""The first version that can be asked for what a host tier holds."""
PEER_VERSION_NIXL: Final = 2
"""The first version that can be asked for a grant."""

_CALLER: Final = b"kvstore peer 1, caller"
_CALLED: Final = b"kvstore peer 1, called"

Nonce = Annotated[bytes, Meta(min_length=PEER_NONCE_SIZE_BYTES, max_length=PEER_NONCE_SIZE_BYTES)]
Proof = Annotated[bytes, Meta(min_length=PEER_PROOF_SIZE_BYTES, max_length=PEER_PROOF_SIZE_BYTES)]
NamespaceField = Annotated[
    bytes, Meta(min_length=NAMESPACE_ID_SIZE_BYTES, max_length=NAMESPACE_ID_SIZE_BYTES)
]
TenantName = Annotated[str, Meta(max_length=TENANT_NAME_MAX_CHARS)]
HostName = Annotated[str, Meta(max_length=HOST_NAME_MAX_CHARS)]
AgentName = Annotated[str, Meta(max_length=NIXL_NAME_MAX_CHARS)]
HeadNumber = Annotated[int, Meta(ge=0, le=KV_HEADS_MAX)]


class PeerMessage(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Anything that daemons say to each other."""


class PeerNonce(PeerMessage, tag=1, frozen=True, gc=False):
    """First message of the daemon that is called: the oldest version it speaks, and the newest."""

    version: int
    nonce: Nonce
    newest: int = 1


class PeerHello(PeerMessage, tag=2, frozen=True, gc=False):
    """The caller's answer: the version to speak, who it is, and that it knows the token."""

    version: int
    name: HostName
    nonce: Nonce
    proof: Proof


class PeerWelcome(PeerMessage, tag=3, frozen=True, gc=False):
    """The called daemon knows the token, too; the caller may go on."""

    name: HostName
    proof: Proof


class Follow(PeerMessage, tag=4, frozen=True, gc=False):
    """Ask for the chunks of a hand-off from number *first* on, as soon as one is ready.

    Answered within *wait_ms*. With *early* the hand-off may still have to be opened.
    """

    namespace: NamespaceField
    tenant: TenantName
    name: HandoffName
    first: ChunkNumber
    wait_ms: Annotated[int, Meta(ge=1, le=DEADLINE_MAX_MS)]
    early: bool


class OfferedShard(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One shard that can be fetched."""

    head_start: HeadNumber
    head_stop: HeadNumber
    size_bytes: Size
    root: U64


class Offer(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One chunk; without shards it has gone since it was ready."""

    digest: DigestField
    shards: Annotated[list[OfferedShard], Meta(max_length=PEER_SHARDS_PER_CHUNK_MAX)]


class Following(PeerMessage, tag=5, frozen=True, gc=False):
    """How a hand-off stands, as in `messages.HandoffReady`, with what is needed to fetch it.

    *consumers* are expected, at all hosts together. Older daemons do not say how many.
    """

    state: HandoffState
    offers: Annotated[list[Offer], Meta(max_length=PEER_OFFERS_MAX)]
    is_last: bool
    payload: Annotated[bytes, Meta(max_length=HANDOFF_PAYLOAD_MAX_BYTES)] = b""
    consumers: Annotated[int, Meta(ge=1, le=HANDOFF_CONSUMERS_MAX)] = 1


class Want(PeerMessage, tag=6, frozen=True, gc=False):
    """Ask for the bytes of one shard.

    A *spare* one is for a tier, not for a hand-off: it is answered from the host tier alone,
    and only while there is time for it.
    """

    namespace: NamespaceField
    digest: DigestField
    shard: OfferedShard
    spare: bool = False


class Sending(PeerMessage, tag=7, frozen=True, gc=False):
    """The bytes of the shard asked for follow, *size_bytes* of them."""

    size_bytes: Size


class Gone(PeerMessage, tag=8, frozen=True, gc=False):
    """That shard is not here, or is another by now."""


class PeerLeave(PeerMessage, tag=9, frozen=True, gc=False):
    """Say that a consumer needs no more of a hand-off."""

    namespace: NamespaceField
    tenant: TenantName
    name: HandoffName


class Left(PeerMessage, tag=10, frozen=True, gc=False):
    """Understood."""


class Have(PeerMessage, tag=11, frozen=True, gc=False):
    """Ask which of *digests* the host tier holds whole."""

    namespace: NamespaceField
    digests: Annotated[list[DigestField], Meta(min_length=1, max_length=PEER_OFFERS_MAX)]


class HeldChunk(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What a chunk consists of, and the digest before it, if any; without shards it is not held."""

    parent: Annotated[bytes, Meta(max_length=DIGEST_SIZE_BYTES)]
    shards: Annotated[list[OfferedShard], Meta(max_length=PEER_SHARDS_PER_CHUNK_MAX)]


class Holding(PeerMessage, tag=12, frozen=True, gc=False):
    """What is held of the digests asked for, one by one and in their order."""

    chunks: Annotated[list[HeldChunk], Meta(max_length=PEER_OFFERS_MAX)]


class Busy(PeerMessage, tag=13, frozen=True, gc=False):
    """There is no time now for what is wanted; another time there may be."""


class Grant(PeerMessage, tag=20, frozen=True, gc=False):
    """Ask where the shards lie that are wanted, to read them by NIXL.

    *agent* is that of the called daemon as the caller knows it; empty for none.
    """

    agent: AgentName
    wants: Annotated[list[Want], Meta(min_length=1, max_length=NIXL_RUNS_MAX)]


class GrantedRun(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Where one shard lies in the arena; of no size when it is not here, or another by now."""

    offset: Annotated[int, Meta(ge=0, le=ARENA_SIZE_MAX_BYTES)]
    size_bytes: Annotated[int, Meta(ge=0, le=CHUNK_SIZE_MAX_BYTES)]


class Granted(PeerMessage, tag=21, frozen=True, gc=False):
    """The shards may be read, and stay, until `Returned`, or the end of time or connection.

    *address* is where the arena lies for *agent*; its *metadata* are left out where it is the
    one that the caller knows.
    """

    agent: AgentName
    metadata: Annotated[bytes, Meta(max_length=NIXL_METADATA_MAX_BYTES)]
    address: U64
    runs: Annotated[list[GrantedRun], Meta(max_length=NIXL_RUNS_MAX)]


class NotGranted(PeerMessage, tag=22, frozen=True, gc=False):
    """There is no NIXL here: ask for the bytes."""

    reason: Annotated[str, Meta(max_length=512)]


class Returned(PeerMessage, tag=23, frozen=True, gc=False):
    """Nothing that was granted is read any more; whether it has been read. Not answered."""

    is_read: bool


class PeerFault(PeerMessage, tag=127, frozen=True, gc=False):
    """What was asked cannot be answered. The connection ends behind it."""

    code: int
    message: Annotated[str, Meta(max_length=512)]


AnyPeerRequest = Follow | Want | PeerLeave | Have | Grant
AnyPeerMessage = (
    PeerNonce
    | PeerHello
    | PeerWelcome
    | Follow
    | Following
    | Want
    | Sending
    | Gone
    | PeerLeave
    | Left
    | Have
    | Holding
    | Busy
    | Grant
    | Granted
    | NotGranted
    | Returned
    | PeerFault
)

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(AnyPeerMessage)


def encode(message: PeerMessage) -> bytes:
    """Return the MessagePack form of *message*."""
    return _encoder.encode(message)


def decode(body: bytes) -> AnyPeerMessage:
    """Return the message in *body*; raises `FrameError`."""
    try:
        message: AnyPeerMessage = _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FrameError(f"frame is no message of a peer: {error}") from error
    return message


def agree(oldest: int, newest: int) -> int:
    """Return the version to speak with a daemon that speaks these; raises `VersionError`."""
    version = min(newest, PEER_VERSION)
    if version < max(oldest, PEER_VERSION_MIN):
        raise VersionError(
            f"it speaks peer protocol {oldest} to {newest}, this daemon {PEER_VERSION_MIN} to "
            f"{PEER_VERSION}"
        )
    return version


def check_shards(shards: Sequence[OfferedShard], manifest: Manifest) -> None:
    """Raise `RequestError` unless *shards*, if any, can be a whole chunk of *manifest*."""
    reached = 0
    for shard in shards:
        if shard.head_start > reached or shard.head_stop <= reached:
            raise RequestError("the shards of an offered chunk do not follow one another")
        reached = shard.head_stop
        manifest.check_stored_bytes(HeadRange(shard.head_start, reached), shard.size_bytes)
    if shards and reached != manifest.kv_heads:
        raise RequestError(
            f"an offered chunk has {reached} heads, by its manifest {manifest.kv_heads}"
        )


def caller_proof(token: bytes, called_nonce: bytes, caller_nonce: bytes, name: str) -> bytes:
    """Return what shows that the caller, who gives *name*, knows *token*."""
    return _proof(token, _CALLER, called_nonce, caller_nonce, name)


def called_proof(token: bytes, called_nonce: bytes, caller_nonce: bytes, name: str) -> bytes:
    """Return what shows that the called daemon, which gives *name*, knows *token*."""
    return _proof(token, _CALLED, called_nonce, caller_nonce, name)


def is_proof(expected: bytes, given: bytes) -> bool:
    """Return whether both are equal, in a time that tells nothing."""
    return hmac.compare_digest(expected, given)


def _proof(token: bytes, side: bytes, called: bytes, caller: bytes, name: str) -> bytes:
    # All parts but the last have a fixed length.
    return hmac.digest(token, side + called + caller + name.encode(), "sha256")

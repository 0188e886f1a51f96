"""What daemons say to each other: frames of MessagePack arrays, and bytes behind some of them.

The daemon that is called speaks first: a nonce. Both then show that they know the token, which
never travels: each sends an HMAC over both nonces. Fields are only appended, tags never reused.

    caller             called
           <---------- PeerNonce
    PeerHello -------->
           <---------- PeerWelcome
    Follow, Want, PeerLeave, one at a time -->  Following, Sending + bytes or Gone, Left
"""

from __future__ import annotations

import hmac
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from kvstore.errors import FrameError
from kvstore.limits import (
    DEADLINE_MAX_MS,
    HANDOFF_PAYLOAD_MAX_BYTES,
    HOST_NAME_MAX_CHARS,
    KV_HEADS_MAX,
    NAMESPACE_ID_SIZE_BYTES,
    PEER_NONCE_SIZE_BYTES,
    PEER_OFFERS_MAX,
    PEER_PROOF_SIZE_BYTES,
    PEER_SHARDS_PER_CHUNK_MAX,
    TENANT_NAME_MAX_CHARS,
)
from kvstore.protocol.fields import U64, ChunkNumber, DigestField, HandoffName, Size
from kvstore.types import HandoffState

PEER_VERSION: Final = 1

_CALLER: Final = b"kvstore peer 1, caller"
_CALLED: Final = b"kvstore peer 1, called"

Nonce = Annotated[bytes, Meta(min_length=PEER_NONCE_SIZE_BYTES, max_length=PEER_NONCE_SIZE_BYTES)]
Proof = Annotated[bytes, Meta(min_length=PEER_PROOF_SIZE_BYTES, max_length=PEER_PROOF_SIZE_BYTES)]
NamespaceField = Annotated[
    bytes, Meta(min_length=NAMESPACE_ID_SIZE_BYTES, max_length=NAMESPACE_ID_SIZE_BYTES)
]
TenantName = Annotated[str, Meta(max_length=TENANT_NAME_MAX_CHARS)]
HostName = Annotated[str, Meta(max_length=HOST_NAME_MAX_CHARS)]
HeadNumber = Annotated[int, Meta(ge=0, le=KV_HEADS_MAX)]


class PeerMessage(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Anything that daemons say to each other."""


class PeerNonce(PeerMessage, tag=1, frozen=True, gc=False):
    """First message of the daemon that is called."""

    version: int
    nonce: Nonce


class PeerHello(PeerMessage, tag=2, frozen=True, gc=False):
    """The caller's answer: who it is, and that it knows the token."""

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
    """How a hand-off stands, as in `messages.HandoffReady`, with what is needed to fetch it."""

    state: HandoffState
    offers: Annotated[list[Offer], Meta(max_length=PEER_OFFERS_MAX)]
    is_last: bool
    payload: Annotated[bytes, Meta(max_length=HANDOFF_PAYLOAD_MAX_BYTES)] = b""


class Want(PeerMessage, tag=6, frozen=True, gc=False):
    """Ask for the bytes of one shard."""

    namespace: NamespaceField
    digest: DigestField
    shard: OfferedShard


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


class PeerFault(PeerMessage, tag=127, frozen=True, gc=False):
    """What was asked cannot be answered. The connection ends behind it."""

    code: int
    message: Annotated[str, Meta(max_length=512)]


AnyPeerRequest = Follow | Want | PeerLeave
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

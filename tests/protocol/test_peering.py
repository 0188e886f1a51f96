"""What daemons say to each other, to the byte, and how they show that they know the token."""

from __future__ import annotations

from typing import get_args

import msgpack
import pytest

from kvstore.errors import FrameError, VersionError
from kvstore.limits import (
    FRAME_SIZE_MAX_BYTES,
    NIXL_METADATA_MAX_BYTES,
    NIXL_NAME_MAX_CHARS,
    NIXL_RUNS_MAX,
    PEER_OFFERS_MAX,
    PEER_SHARDS_PER_CHUNK_MAX,
)
from kvstore.protocol import peering as p
from kvstore.types import HandoffState

N, D, S = bytes(32), bytes(range(32)), bytes(range(16))
SHARD = p.OfferedShard(0, 4, 32_768, 2**64 - 1)
PLAIN = [0, 4, 32_768, 2**64 - 1]

# By hand: tag, then the fields in order.
GOLDEN = {
    "nonce": (p.PeerNonce(1, N), [1, 1, N, 1]),
    "hello": (p.PeerHello(1, "decode", N, D), [2, 1, "decode", N, D]),
    "welcome": (p.PeerWelcome("prefill", D), [3, "prefill", D]),
    "follow": (
        p.Follow(S, "blue", "r-1", 7, 1000, early=True),
        [4, S, "blue", "r-1", 7, 1000, True],
    ),
    "following": (
        p.Following(HandoffState.CLOSED, [p.Offer(D, [SHARD])], True, b"7", 2),
        [5, 2, [[D, [PLAIN]]], True, b"7", 2],
    ),
    "want": (p.Want(S, D, SHARD), [6, S, D, PLAIN, False]),
    "sending": (p.Sending(32_768), [7, 32_768]),
    "gone": (p.Gone(), [8]),
    "leave": (p.PeerLeave(S, "", "r-1"), [9, S, "", "r-1"]),
    "left": (p.Left(), [10]),
    "fault": (p.PeerFault(5, "no"), [127, 5, "no"]),
    "nonce of version 2": (p.PeerNonce(1, N, 2), [1, 1, N, 2]),
    "spare want": (p.Want(S, D, SHARD, spare=True), [6, S, D, PLAIN, True]),
    "have": (p.Have(S, [D]), [11, S, [D]]),
    "holding": (
        p.Holding([p.HeldChunk(D, [SHARD]), p.HeldChunk(b"", [])]),
        [12, [[D, [PLAIN]], [b"", []]]],
    ),
    "busy": (p.Busy(), [13]),
    "grant": (
        p.Grant("prefill-7f", [p.Want(S, D, SHARD)]),
        [20, "prefill-7f", [[6, S, D, PLAIN, False]]],
    ),
    "granted": (
        p.Granted("prefill-7f", b"m", 2**47, [p.GrantedRun(65_536, 32_768), p.GrantedRun(0, 0)]),
        [21, "prefill-7f", b"m", 2**47, [[65_536, 32_768], [0, 0]]],
    ),
    "not granted": (p.NotGranted("no"), [22, "no"]),
    "returned": (p.Returned(is_read=True), [23, True]),
}

# What version 1 wrote, and still means: the fields since have defaults.
VERSION_1 = {
    "nonce": ([1, 1, N], p.PeerNonce(1, N, 1)),
    "want": ([6, S, D, PLAIN], p.Want(S, D, SHARD, spare=False)),
}

OUT_OF_RANGE = {
    "no message": [99],
    "a request of the data socket": [14, 1, 50, b""],
    "a question about nothing": [11, S, []],
    "a question about too much": [11, S, [D] * (PEER_OFFERS_MAX + 1)],
    "a digest of 31 bytes": [11, S, [bytes(31)]],
    "too long a parent": [12, [[bytes(33), [PLAIN]]]],
    "more held than can be asked for": [12, [[D, []]] * (PEER_OFFERS_MAX + 1)],
    "a short nonce": [1, 1, bytes(31)],
    "a long proof": [3, "x", bytes(33)],
    "a namespace of 15 bytes": [4, bytes(15), "", "x", 0, 1, False],
    "a wait of an hour": [4, S, "", "x", 0, 3_600_000, False],
    "a chunk beyond the limit": [7, 2**30 + 1],
    "a chunk of nothing": [7, 0],
    "a state that there is not": [5, 9, [], True],
    "too many offers": [5, 1, [[D, []]] * (PEER_OFFERS_MAX + 1), False],
    "too many shards": [5, 1, [[D, [PLAIN] * (PEER_SHARDS_PER_CHUNK_MAX + 1)]], False],
    "a head beyond the limit": [6, S, D, [0, 1025, 1, 0]],
    "a grant of nothing": [20, "", []],
    "a grant of too much": [20, "", [[6, S, D, PLAIN]] * (NIXL_RUNS_MAX + 1)],
    "an agent that says too much": [21, "a", bytes(NIXL_METADATA_MAX_BYTES + 1), 0, []],
    "an agent with too long a name": [21, "a" * (NIXL_NAME_MAX_CHARS + 1), b"", 0, []],
    "a run outside of any arena": [21, "a", b"", 0, [[2**62, 1]]],
    "a payload beyond its limit": [5, 2, [], True, bytes(65_537)],
}


def test_every_message_is_here():
    assert {type(message) for message, _ in GOLDEN.values()} == set(get_args(p.AnyPeerMessage))


@pytest.mark.parametrize("name", GOLDEN)
def test_a_message_is_the_plain_list_both_ways(name):
    message, plain = GOLDEN[name]
    assert msgpack.unpackb(p.encode(message)) == plain
    assert p.decode(msgpack.packb(plain)) == message


@pytest.mark.parametrize("name", VERSION_1)
def test_what_version_1_wrote_means_what_it_meant(name):
    plain, message = VERSION_1[name]
    assert p.decode(msgpack.packb(plain)) == message


def test_fields_of_the_future_are_ignored():
    for message, _ in GOLDEN.values():
        full = msgpack.unpackb(p.encode(message))
        assert p.decode(msgpack.packb([*full, "from the future"])) == message


def test_both_speak_the_newest_version_that_both_know():
    assert p.agree(1, 1) == 1
    assert p.agree(1, p.PEER_VERSION + 5) == p.agree(p.PEER_VERSION, 9) == p.PEER_VERSION
    for oldest, newest in ((p.PEER_VERSION + 1, p.PEER_VERSION + 1), (0, 0), (3, 1)):
        with pytest.raises(VersionError, match=f"it speaks peer protocol {oldest} to {newest}"):
            p.agree(oldest, newest)


@pytest.mark.parametrize("what", OUT_OF_RANGE)
def test_what_is_out_of_range_is_refused_while_decoding(what):
    with pytest.raises(FrameError, match="no message of a peer"):
        p.decode(msgpack.packb(OUT_OF_RANGE[what]))


def test_a_full_list_of_what_is_held_fits_one_frame():
    shards = [p.OfferedShard(1023, 1024, 2**30, 2**64 - 1)] * PEER_SHARDS_PER_CHUNK_MAX
    full = p.Holding([p.HeldChunk(D, shards)] * PEER_OFFERS_MAX)
    assert len(p.encode(full)) <= FRAME_SIZE_MAX_BYTES


def test_a_full_list_of_offers_fits_one_frame():
    offer = p.Offer(D, [p.OfferedShard(1023, 1024, 2**30, 2**64 - 1)] * PEER_SHARDS_PER_CHUNK_MAX)
    full = p.Following(HandoffState.OPEN, [offer] * PEER_OFFERS_MAX, False)
    assert len(p.encode(full)) <= FRAME_SIZE_MAX_BYTES


def test_a_proof_is_worth_nothing_for_another_token_nonce_name_or_side():
    proof = p.caller_proof(b"token", N, D, "decode")
    assert p.is_proof(proof, p.caller_proof(b"token", N, D, "decode"))
    others = [
        p.caller_proof(b"other", N, D, "decode"),
        p.caller_proof(b"token", D, D, "decode"),
        p.caller_proof(b"token", N, N, "decode"),
        p.caller_proof(b"token", N, D, "prefill"),
        p.called_proof(b"token", N, D, "decode"),
    ]
    assert not any(p.is_proof(proof, other) for other in others)

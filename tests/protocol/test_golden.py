"""The wire of version 3, to the byte: every message against its golden file, both ways.

The oracle is the `msgpack` package, which knows nothing of our structs. To add a message, add
it to `tests/support/goldens.py`, write its file by hand or from the oracle, and list it in
`kvstore/protocol/VERSION.md`. A golden file never changes.
"""

from __future__ import annotations

from typing import get_args

import msgpack
import msgspec
import pytest

from kvstore.errors import FrameError
from kvstore.protocol import messages as m
from kvstore.protocol.messages import decode_reply, decode_request, encode
from tests.support.goldens import ALL, GOLDEN_DIRECTORY, OLDER, REPLIES, REQUESTS, golden_bytes


def decode(name: str, body: bytes) -> m.Message:
    return decode_request(body) if name in REQUESTS else decode_reply(body)


def required(message: m.Message) -> int:
    """Return how many items the shortest array of this message has, its tag included."""
    fields = msgspec.structs.fields(message)
    return 1 + sum(field.required for field in fields)


def test_every_message_has_a_golden_file_and_every_file_a_message():
    files = {path.stem for path in GOLDEN_DIRECTORY.glob("*.hex")}
    assert files == set(ALL) | set(OLDER)
    assert {type(golden.message) for golden in REQUESTS.values()} == set(get_args(m.AnyRequest))
    assert {type(golden.message) for golden in REPLIES.values()} == set(get_args(m.AnyReply))


@pytest.mark.parametrize("name", ALL)
def test_encoding_gives_the_golden_bytes(name):
    assert encode(ALL[name].message).hex(" ") == golden_bytes(name).hex(" ")


@pytest.mark.parametrize("name", ALL)
def test_the_golden_bytes_decode_to_the_message(name):
    assert decode(name, golden_bytes(name)) == ALL[name].message


@pytest.mark.parametrize("name", OLDER)
def test_what_older_versions_wrote_still_decodes(name):
    body = golden_bytes(name)
    is_request = isinstance(OLDER[name], m.Request)
    assert (decode_request if is_request else decode_reply)(body) == OLDER[name]


@pytest.mark.parametrize("name", ALL)
def test_msgpack_reads_our_bytes_as_the_plain_list(name):
    assert msgpack.unpackb(encode(ALL[name].message)) == ALL[name].plain


@pytest.mark.parametrize("name", ALL)
def test_what_msgpack_writes_decodes_to_our_message(name):
    assert decode(name, msgpack.packb(ALL[name].plain)) == ALL[name].message


@pytest.mark.parametrize("name", ALL)
def test_a_field_appended_by_a_newer_peer_is_ignored(name):
    newer = msgpack.packb([*ALL[name].plain, {"from": ["the", "future"]}])
    assert decode(name, newer) == ALL[name].message


@pytest.mark.parametrize("name", ALL)
def test_a_message_without_its_optional_fields_has_their_defaults(name):
    message = ALL[name].message
    shortest = ALL[name].plain[: required(message)]
    assert msgspec.structs.astuple(decode(name, msgpack.packb(shortest)))


@pytest.mark.parametrize("name", ALL)
def test_a_message_without_a_required_field_is_refused(name):
    shorter = ALL[name].plain[: required(ALL[name].message) - 1]
    with pytest.raises(FrameError):
        decode(name, msgpack.packb(shorter))


@pytest.mark.parametrize("name", ALL)
def test_no_prefix_of_a_message_is_a_message(name):
    body = golden_bytes(name)
    for length in range(len(body)):
        with pytest.raises(FrameError):
            decode(name, body[:length])


@pytest.mark.parametrize("name", ALL)
def test_bytes_behind_a_message_are_refused(name):
    with pytest.raises(FrameError):
        decode(name, golden_bytes(name) + b"\x00")


@pytest.mark.parametrize("name", ALL)
def test_requests_are_no_replies_and_the_other_way_round(name):
    other = decode_reply if name in REQUESTS else decode_request
    with pytest.raises(FrameError):
        other(golden_bytes(name))


OUT_OF_RANGE = {
    "a negative id": [12, -1, 50],
    "an id beyond 63 bits": [12, 2**63, 50],
    "no deadline": [12, 1, 0],
    "a deadline beyond ten minutes": [12, 1, 600_001],
    "an unknown tag": [22, 1, 50],
    "a tag that is text": ["hello", 1, 50],
    "no tag": [],
    "a map": {"0": 1},
    "a client name beyond its limit": [1, 1, 50, 1, "x" * 129],
    "a manifest beyond its limit": [2, 1, 50, bytes(16_385), 1],
    "a chunk of no bytes": [2, 1, 50, b"{}", 0],
    "a chunk beyond its limit": [2, 1, 50, b"{}", 2**30 + 1],
    "no digests": [3, 1, 50, 0, []],
    "a digest of 31 bytes": [3, 1, 50, 0, [bytes(31)]],
    "a digest of 33 bytes": [3, 1, 50, 0, [bytes(33)]],
    "a digest that is text": [3, 1, 50, 0, ["x" * 32]],
    "too many digests": [3, 1, 50, 0, [bytes(32)] * 4097],
    "a negative space": [3, 1, 50, -1, [bytes(32)]],
    "a window beyond its limit": [3, 1, 50, 0, [bytes(32)], 4097],
    "a wait that is a number": [3, 1, 50, 0, [bytes(32)], 0, 1],
    "a head beyond the limit": [4, 1, 50, 0, [bytes(32)], 0, 1025],
    "a parent of 33 bytes": [5, 1, 50, 0, [bytes(32)], bytes(33)],
    "a size of nothing": [5, 1, 50, 0, [bytes(32)], b"", 0, 0, [0]],
    "too many sizes": [5, 1, 50, 0, [bytes(32)], b"", 0, 0, [1] * 4097],
    "nothing filled": [6, 1, 50, []],
    "a root below zero": [6, 1, 50, [[1, -1]]],
    "a root that is a fraction": [6, 1, 50, [[1, 0.5]]],
    "too much filled": [6, 1, 50, [[1, 1]] * 4097],
    "nothing to abort": [7, 1, 50, []],
    "too much to abort": [7, 1, 50, [1] * 4097],
    "nothing to release": [8, 1, 50, []],
    "a payload beyond its limit": [13, 1, 50, bytes(256 * 1024 + 1)],
    "a count below zero": [13, 1, 50, b"", {"chunks_loaded": -1}],
    "a count beyond its limit": [13, 1, 50, b"", {"chunks_loaded": 2**53 + 1}],
    "a count that is a fraction": [13, 1, 50, b"", {"chunks_loaded": 0.5}],
    "a counter without a name": [13, 1, 50, b"", {"": 1}],
    "a counter's name beyond its limit": [13, 1, 50, b"", {"x" * 65: 1}],
    "too many counters": [13, 1, 50, b"", {f"x{n}": 1 for n in range(65)}],
    "a tenant's name beyond its limit": [1, 1, 50, 2, "", "x" * 65],
    "a cost below zero": [3, 1, 50, 0, [bytes(32)], 0, False, False, -1],
    "a hint of no known kind": [15, 1, 50, 0, [bytes(32)], 3],
    "a hint for the year after next": [15, 1, 50, 0, [bytes(32)], 0, 86_401],
    "a hand-off without a name": [16, 1, 50, 0, ""],
    "a hand-off's name beyond its limit": [16, 1, 50, 0, "x" * 129],
    "a hand-off for nobody": [16, 1, 50, 0, "x", 0],
    "a hand-off for ever": [16, 1, 50, 0, "x", 1, 600_001],
    "a hand-off of too many chunks": [17, 1, 50, 0, "x", 65_537, [bytes(32)]],
    "a hand-off's payload beyond its limit": [18, 1, 50, 0, "x", bytes(65_537)],
    "a peer's name beyond its limit": [20, 1, 50, 0, "x", 0, "p" * 256],
    "a trace beyond its limit": [6, 1, 50, [[1, 1]], "0" * 65],
    "null for a field": [13, 1, 50, None],
}


@pytest.mark.parametrize("what", OUT_OF_RANGE)
def test_what_is_out_of_range_is_refused_while_decoding(what):
    with pytest.raises(FrameError, match="frame is not a request"):
        decode_request(msgpack.packb(OUT_OF_RANGE[what]))

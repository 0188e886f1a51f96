"""Keys and checksums: equal to an independent spelling, and never equal by accident."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import pytest
import xxhash
from hypothesis import given, strategies as st

from kvstore.errors import RequestError
from kvstore.hashing import (
    block_count,
    block_digests,
    chunk_digests,
    root_of,
    scope_digest,
    stored_size,
    table_offset,
)
from kvstore.limits import CHECKSUM_BLOCK_BYTES, EXTRA_SIZE_MAX_BYTES, TOKEN_ID_MAX

token_lists = st.lists(st.integers(0, TOKEN_ID_MAX), max_size=40)


def spelled_out(tokens, chunk_tokens, parent=b"", extras=()):
    """The definition of the chain, written without numpy."""
    digests = []
    for index in range(len(tokens) // chunk_tokens):
        chunk = tokens[index * chunk_tokens : (index + 1) * chunk_tokens]
        text = parent + b"".join(struct.pack("<I", token) for token in chunk)
        for extra in extras[index] if index < len(extras) else ():
            text += struct.pack("<I", len(extra)) + extra
        parent = hashlib.sha256(text).digest()
        digests.append(parent)
    return digests


@given(token_lists, st.integers(1, 9), st.lists(st.lists(st.binary(max_size=9), max_size=3)))
def test_the_chain_equals_its_definition(tokens, chunk_tokens, extras):
    found = chunk_digests(tokens, chunk_tokens, extras=extras)
    assert found == spelled_out(tokens, chunk_tokens, extras=extras)


@given(token_lists, st.integers(1, 9))
def test_plain_text_gives_the_chain_that_sglang_computes(tokens, page_size):
    parent: str | None = None
    pages = []
    for start in range(0, len(tokens) - page_size + 1, page_size):
        hasher = hashlib.sha256()
        if parent is not None:
            hasher.update(bytes.fromhex(parent))
        for token in tokens[start : start + page_size]:
            hasher.update(token.to_bytes(4, byteorder="little", signed=False))
        parent = hasher.hexdigest()
        pages.append(parent)
    assert [digest.hex() for digest in chunk_digests(tokens, page_size)] == pages


@given(token_lists, st.integers(1, 9), st.integers(0, 40))
def test_a_prefix_has_the_digests_of_the_whole_up_to_its_length(tokens, chunk_tokens, length):
    head = chunk_digests(tokens[:length], chunk_tokens)
    assert chunk_digests(tokens, chunk_tokens)[: len(head)] == head


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint32, np.uint64, ">i8"])
def test_an_array_of_any_integer_type_gives_the_digests_of_its_numbers(kind):
    tokens = [5, 70_000, 3, 1]
    assert chunk_digests(np.array(tokens, dtype=kind), 2) == chunk_digests(tokens, 2)


def test_a_partial_tail_has_no_digest():
    assert chunk_digests([], 4) == chunk_digests([1, 2, 3], 4) == []
    assert len(chunk_digests(range(11), 4)) == 2


@pytest.mark.parametrize(
    "tokens",
    [[-1], [TOKEN_ID_MAX + 1], [2**80], [0.5], ["1"], [[1, 2], [3, 4]]],
    ids=str,
)
def test_token_ids_that_are_no_32_bit_numbers_are_refused(tokens):
    with pytest.raises(RequestError, match="token ids"):
        chunk_digests(tokens, 1)


def test_scopes_of_different_adapters_revisions_and_salts_never_meet():
    scopes = [
        scope_digest(),
        scope_digest(adapter="a"),
        scope_digest(adapter_revision="a"),
        scope_digest(salt=b"a"),
        scope_digest(adapter="a", salt=b"a"),
        scope_digest(adapter="aa"),
        scope_digest(adapter="a", adapter_revision="a"),
    ]
    firsts = [chunk_digests([1, 2], 2, scope=scope)[0] for scope in scopes]
    assert len(set(firsts)) == len(scopes)


def test_the_scope_is_the_parent_of_the_first_chunk():
    scope = scope_digest(adapter="a", adapter_revision="1", salt=b"s")
    fields = b"".join(struct.pack("<I", len(f)) + f for f in (b"a", b"1", b"s"))
    assert scope == hashlib.sha256(b"kvstore-scope-1" + fields).digest()
    assert chunk_digests([1, 2, 3, 4], 2, scope=scope) == spelled_out([1, 2, 3, 4], 2, parent=scope)


def test_no_scope_stands_for_plain_text():
    assert scope_digest() is None
    assert chunk_digests([1], 1, scope=None) == chunk_digests([1], 1)


def test_extras_that_join_to_the_same_bytes_stay_apart():
    ways = [[], [b""], [b"", b""], [b"ab"], [b"a", b"b"], [b"ab", b""], [b"", b"ab"]]
    firsts = [chunk_digests([1], 1, extras=[way])[0] for way in ways]
    assert len(set(firsts)) == len(ways)


def test_an_extra_changes_its_chunk_and_all_behind_it_but_none_before():
    plain = chunk_digests([1, 2, 3], 1)
    pictured = chunk_digests([1, 2, 3], 1, extras=[[], [b"image"]])
    assert plain[0] == pictured[0]
    assert plain[1] != pictured[1]
    assert plain[2] != pictured[2]


def test_an_extra_beyond_the_limit_is_refused_with_both_numbers():
    with pytest.raises(RequestError, match=f"{EXTRA_SIZE_MAX_BYTES + 1} .* {EXTRA_SIZE_MAX_BYTES}"):
        chunk_digests([1], 1, extras=[[bytes(EXTRA_SIZE_MAX_BYTES + 1)]])


@pytest.mark.parametrize("size", [1, CHECKSUM_BLOCK_BYTES, CHECKSUM_BLOCK_BYTES + 1, 200_001])
def test_checksums_equal_those_of_python_xxhash(size):
    payload = np.random.default_rng(size).bytes(size)
    starts = range(0, size, CHECKSUM_BLOCK_BYTES)
    blocks = [xxhash.xxh3_64_intdigest(payload[at : at + CHECKSUM_BLOCK_BYTES]) for at in starts]
    assert block_digests(payload).tolist() == blocks
    assert len(blocks) == block_count(size)
    table = b"".join(struct.pack("<Q", block) for block in blocks)
    assert root_of(block_digests(payload)) == xxhash.xxh3_64_intdigest(table)


@given(st.integers(1, 2**30))
def test_the_table_lies_aligned_behind_the_bytes_and_inside_the_stored_size(size):
    assert size <= table_offset(size) < size + 64
    assert table_offset(size) % 64 == 0
    assert stored_size(size) == table_offset(size) + 8 * block_count(size)

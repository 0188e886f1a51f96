"""What the Redis tier stores, byte by byte: other versions and other programs rely on it."""

from __future__ import annotations

import pytest

from kvstore.limits import REDIS_STRIPE_BYTES
from kvstore.tiers.base import Shard, ShardKey
from kvstore.tiers.redis_records import (
    FORMAT_VERSION,
    LABEL_BYTES,
    Label,
    Names,
    Unreadable,
    field_of,
    heads_of,
    pack_label,
    read_label,
)
from kvstore.tiers.redis_steps import shards_in
from kvstore.types import Digest, HeadRange, NamespaceId, Root

KEY = ShardKey(NamespaceId(b"n" * 16), Digest(b"d" * 32), HeadRange(4, 8))
SHARD = Shard(KEY, Digest(b"p" * 32), 5_000_000, Root(0x0123456789ABCDEF))

# The meta record of SHARD: a change here is a change of the format, and of its version.
GOLDEN = (
    "4b565354010000006e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e"
    + "64" * 32
    + "0400000008000000404b4c0000000000efcdab896745230100003f00ffffffff"
    + "70" * 32
)


def test_the_format_is_what_it_was() -> None:
    label = pack_label(SHARD, None)
    assert label[:-8].hex() == GOLDEN
    assert label[-8:].hex() == "b09cd692efceaeed"
    assert (len(label), FORMAT_VERSION) == (LABEL_BYTES, 1)


def test_the_names_are_what_they_were() -> None:
    names = Names("kvstore")
    meta = b"kvstore:" + b"6e" * 16 + b":{" + b"64" * 32 + b"}"
    assert names.meta(KEY.namespace, KEY.digest) == meta
    assert names.manifest(KEY.namespace) == b"kvstore:" + b"6e" * 16 + b":manifest"
    assert [stripe.name for stripe in names.stripes(SHARD)] == [
        meta + b":4-8:0123456789abcdef:0",
        meta + b":4-8:0123456789abcdef:1",
    ]


@pytest.mark.parametrize(
    "size_bytes", [1, REDIS_STRIPE_BYTES - 1, REDIS_STRIPE_BYTES, REDIS_STRIPE_BYTES + 1, 2**25]
)
def test_stripes_tile_the_shard_and_stay_within_4_mib(size_bytes: int) -> None:
    stripes = Names("p").stripes(SHARD._replace(size_bytes=size_bytes))
    assert [stripe.start for stripe in stripes[1:]] == [stripe.stop for stripe in stripes[:-1]]
    assert (stripes[0].start, stripes[-1].stop) == (0, size_bytes)
    assert all(stripe.value_bytes <= 4 * 2**20 for stripe in stripes)


@pytest.mark.parametrize("shard", [SHARD, SHARD._replace(parent=None)])
def test_a_label_is_read_as_it_was_written(shard: Shard) -> None:
    assert read_label(pack_label(shard, None)) == Label(shard, None)
    assert read_label(pack_label(shard, 3) + b"bytes") == Label(shard._replace(parent=None), 3)


def test_no_bit_of_a_label_can_change_unnoticed() -> None:
    label = pack_label(SHARD, None)
    for bit in range(len(label) * 8):
        changed = bytearray(label)
        changed[bit // 8] ^= 1 << bit % 8
        assert isinstance(read_label(bytes(changed)), Unreadable)


@pytest.mark.parametrize("size", range(LABEL_BYTES))
def test_a_label_that_was_cut_is_damaged(size: int) -> None:
    assert read_label(pack_label(SHARD, None)[:size]) is Unreadable.DAMAGED


def test_a_newer_version_is_told_from_damage() -> None:
    assert read_label(b"KVST\x02\x00\x00\x00") is Unreadable.NEWER
    assert read_label(b"KVSU\x02\x00\x00\x00") is Unreadable.DAMAGED


@pytest.mark.parametrize("heads", [HeadRange(0, 1), HeadRange(10, 1024)])
def test_fields_stand_for_heads(heads: HeadRange) -> None:
    assert heads_of(field_of(heads)) == heads


@pytest.mark.parametrize(
    "field", [b"", b"a", b"1", b"01-2", b"1-2-3", b"-1-2", b"1-20000", b"1-2\n"]
)
def test_other_fields_are_not_ours(field: bytes) -> None:
    assert heads_of(field) is None


def test_a_record_in_the_wrong_place_is_damaged() -> None:
    record = pack_label(SHARD, None)
    found = shards_in([b"4-8", record, b"0-4", record, b"x", b"y"], KEY.namespace, KEY.digest)
    assert (found.shards, found.damaged, found.is_foreign) == ([SHARD], [b"0-4"], True)
    other = shards_in([b"4-8", record], KEY.namespace, Digest(b"e" * 32))
    assert (other.shards, other.damaged) == ([], [b"4-8"])
    assert shards_in(None, KEY.namespace, KEY.digest).shards == []
    assert shards_in([b"4-8"], KEY.namespace, KEY.digest).shards == []
    assert shards_in([1, 2], KEY.namespace, KEY.digest).is_foreign

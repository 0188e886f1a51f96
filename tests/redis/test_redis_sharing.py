"""What one host writes, every host finds: records, times to live, foreign and altered values."""

from __future__ import annotations

import asyncio
import logging

import pytest

from kvstore.limits import CHECKSUM_BLOCK_BYTES
from kvstore.tiers.base import Recovered
from kvstore.tiers.redis_records import LABEL_BYTES, Names, pack_label
from kvstore.types import HeadRange, NamespaceId
from tests.support.making import loose_digest, make_payload, make_root
from tests.support.redis_shards import (
    LARGE_BYTES,
    NAMESPACE,
    PLACE,
    SIZE_BYTES,
    found,
    payload_of,
    read,
    shard_of,
    write,
)

NAMES = Names("kvstore")
META = NAMES.meta(NAMESPACE, loose_digest(1))
STRIPE = NAMES.stripes(shard_of(1))[0].name


def keys_of(server) -> set[bytes]:
    return set(server.do("KEYS", "*"))


@pytest.mark.parametrize("size_bytes", [1, CHECKSUM_BLOCK_BYTES + 1, SIZE_BYTES, LARGE_BYTES])
async def test_another_host_finds_and_reads_what_one_has_written(server, open_tier, size_bytes):
    one, other = await open_tier(server.url), await open_tier(server.unix_url)
    assert await write(one, 1, size_bytes)
    assert await found(other, [1, 2], size_bytes) == [1]
    assert await read(other, 1, size_bytes)
    assert not await read(other, 2, size_bytes)


async def test_many_calls_at_once_are_each_answered_with_their_own(server, open_tier):
    tier = await open_tier(server.url)
    assert all(await asyncio.gather(*(write(tier, n) for n in range(24))))
    assert await found(tier, range(30)) == list(range(24))
    assert await asyncio.gather(*(read(tier, n) for n in range(30))) == [n < 24 for n in range(30)]


async def test_all_shards_of_a_chunk_are_found_with_parent_size_and_root(server, open_tier):
    tier = await open_tier(server.url)
    whole = shard_of(1)._replace(parent=loose_digest(99))
    halves = [
        whole._replace(key=whole.key._replace(heads=heads))
        for heads in (HeadRange(0, 4), HeadRange(4, 8))
    ]
    for half in halves:
        assert await tier.write(half, memoryview(payload_of(1))) is not None
    ((*shards,),) = await tier.find(NAMESPACE, [whole.key.digest])
    assert sorted(shards) == [Recovered(half, PLACE) for half in halves]
    # Nothing of another namespace.
    assert await tier.find(NamespaceId(b"m" * 16), [whole.key.digest]) == [[]]


async def test_what_is_there_already_is_not_sent_again(server, open_tier):
    one, other = await open_tier(server.url), await open_tier(server.url)
    assert await write(one, 1)
    before = server.do("INFO", "stats")["total_net_input_bytes"]
    assert await write(other, 1)
    assert other.counters.already_there == 1
    assert server.do("INFO", "stats")["total_net_input_bytes"] - before < SIZE_BYTES


async def test_a_shard_whose_stripe_was_evicted_is_written_again_as_a_whole(server, open_tier):
    tier = await open_tier(server.url)
    assert await write(tier, 1, LARGE_BYTES)
    server.do("DEL", NAMES.stripes(shard_of(1, LARGE_BYTES))[1].name)
    assert await write(tier, 1, LARGE_BYTES)
    assert tier.counters.already_there == 0
    assert await read(tier, 1, LARGE_BYTES)


async def test_other_bytes_under_the_same_key_replace_the_former_and_leave_nothing_behind(
    server, open_tier
):
    tier = await open_tier(server.url)
    assert await write(tier, 1)
    other = make_payload(loose_digest(2), 2 * SIZE_BYTES)
    shard = shard_of(1)._replace(size_bytes=len(other), root=make_root(other))
    assert await tier.write(shard, memoryview(other)) is not None
    assert await tier.find(NAMESPACE, [shard.key.digest]) == [[Recovered(shard, PLACE)]]
    assert keys_of(server) == {META, *(stripe.name for stripe in NAMES.stripes(shard))}
    assert not await read(tier, 1)
    # To look for the former has not harmed the present one.
    target = bytearray(len(other))
    assert await tier.read(shard, PLACE, memoryview(target))
    assert target == other


@pytest.mark.parametrize("size_bytes", [SIZE_BYTES, LARGE_BYTES])
async def test_everything_ends_with_its_time_and_a_write_begins_it_anew(
    server, open_tier, size_bytes
):
    tier = await open_tier(server.url, ttl_seconds=1000.0)
    await tier.introduce(NAMESPACE, b"manifest")
    assert await write(tier, 1, size_bytes)
    for key in keys_of(server):
        assert 990_000 < server.do("PTTL", key) <= 1_000_000
        server.do("PEXPIRE", key, 500_000)
    assert await write(tier, 1, size_bytes)
    assert all(server.do("PTTL", key) > 990_000 for key in keys_of(server) if b"{" in key)


async def test_without_a_time_to_live_nothing_expires(server, open_tier):
    tier = await open_tier(server.url, ttl_seconds=0)
    await tier.introduce(NAMESPACE, b"manifest")
    assert await write(tier, 1)
    assert {server.do("PTTL", key) for key in keys_of(server)} == {-1}


async def test_a_manifest_is_kept_beside_and_put_again_when_it_was_altered(server, open_tier):
    tier = await open_tier(server.url)
    await tier.introduce(NAMESPACE, b"manifest")
    assert await tier.manifest(NAMESPACE) == b"manifest"
    server.do("SET", NAMES.manifest(NAMESPACE), "something else")
    other = await open_tier(server.url)
    await other.introduce(NAMESPACE, b"manifest")
    assert await other.manifest(NAMESPACE) == b"manifest"
    assert other.counters.quarantined == 1
    assert await other.manifest(NamespaceId(b"m" * 16)) is None


async def test_a_removed_shard_leaves_nothing_behind_and_other_heads_alone(server, open_tier):
    tier = await open_tier(server.url)
    half = shard_of(1)._replace(key=shard_of(1).key._replace(heads=HeadRange(0, 4)))
    assert await tier.write(half, memoryview(payload_of(1))) is not None
    before = keys_of(server)
    assert await write(tier, 1)
    assert await tier.remove(shard_of(1), PLACE)
    assert keys_of(server) == before
    assert await tier.find(NAMESPACE, [half.key.digest]) == [[Recovered(half, PLACE)]]


# --- what does not belong there ------------------------------------------------------------


async def test_a_stripe_that_vanished_is_a_miss_and_no_host_is_sent_to_it_again(server, open_tier):
    tier = await open_tier(server.url)
    assert await write(tier, 1, LARGE_BYTES)
    server.do("DEL", NAMES.stripes(shard_of(1, LARGE_BYTES))[2].name)
    assert not await read(tier, 1, LARGE_BYTES)
    assert tier.counters.vanished == 1
    assert await found(tier, [1], LARGE_BYTES) == []
    assert keys_of(server) == set()


ALTERATIONS = {
    "a bit of the bytes": ("SETRANGE", STRIPE, LABEL_BYTES + 70_000, "x"),
    "the magic of the label": ("SETRANGE", STRIPE, 0, "x"),
    "the digest in the label": ("SETRANGE", STRIPE, 60, "x"),
    "too long": ("APPEND", STRIPE, "x"),
    "too short for a label": ("SET", STRIPE, "short"),
    "empty": ("SET", STRIPE, ""),
    "of the same length": ("SET", STRIPE, b"y" * (SIZE_BYTES + LABEL_BYTES)),
    "of another chunk": ("SET", STRIPE, pack_label(shard_of(2), 0) + payload_of(2)),
    "of another stripe": ("SET", STRIPE, pack_label(shard_of(1), 1) + payload_of(1)),
}


@pytest.mark.parametrize("words", ALTERATIONS.values(), ids=ALTERATIONS.keys())
async def test_a_value_altered_by_hand_is_quarantined(server, open_tier, words):
    tier = await open_tier(server.url)
    assert await write(tier, 1)
    server.do(*words)
    assert not await read(tier, 1)
    assert tier.counters.quarantined == 1
    assert keys_of(server) == set()
    # It can be stored again.
    assert await write(tier, 1)
    assert await read(tier, 1)


@pytest.mark.parametrize(
    "record",
    [b"", b"garbage", pack_label(shard_of(2), None), pack_label(shard_of(1), None)[:-1] + b"\0"],
    ids=["empty", "garbage", "of another chunk", "with a wrong check"],
)
async def test_a_record_altered_by_hand_is_quarantined(server, open_tier, record):
    tier = await open_tier(server.url)
    assert await write(tier, 1)
    server.do("HSET", META, "0-8", record)
    assert await found(tier, [1]) == []
    assert tier.counters.quarantined == 1
    assert await write(tier, 1)
    assert await found(tier, [1]) == [1]


async def test_keys_of_other_programs_are_left_alone(server, open_tier):
    tier = await open_tier(server.url)
    server.do("RPUSH", META, "theirs")
    assert await found(tier, [1]) == []
    assert not await write(tier, 1)
    assert not await read(tier, 1)
    assert not await tier.remove(shard_of(1), PLACE)
    assert server.do("LRANGE", META, 0, -1) == [b"theirs"]
    assert keys_of(server) == {META}
    assert tier.counters.foreign >= 2


async def test_a_stripe_of_another_program_is_left_alone(server, open_tier):
    tier = await open_tier(server.url)
    server.do("RPUSH", STRIPE, "theirs")
    assert not await write(tier, 1)
    assert not await read(tier, 1)
    assert server.do("LRANGE", STRIPE, 0, -1) == [b"theirs"]
    assert tier.counters.foreign == 2


async def test_fields_of_other_programs_in_our_hash_are_left_alone(server, open_tier):
    tier = await open_tier(server.url)
    server.do("HSET", META, "theirs", "1", "8-0", "2")
    assert await found(tier, [1]) == []
    assert await write(tier, 1)
    assert await found(tier, [1]) == [1]
    assert server.do("HGET", META, "theirs") == b"1"
    assert tier.counters.foreign == 2


async def test_a_record_of_a_newer_version_is_a_miss_with_one_line(server, open_tier, caplog):
    tier = await open_tier(server.url)
    newer = b"KVST\x02\x00\x00\x00 and whatever comes then"
    server.do("HSET", META, "0-8", newer)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert await found(tier, [1]) == []
    assert [record.getMessage() for record in caplog.records] == [
        "redis holds records of a newer version; they are misses here"
    ]
    assert not await write(tier, 1)
    assert server.do("HGET", META, "0-8") == newer
    assert tier.counters.quarantined == 0


async def test_a_hash_of_endless_fields_is_read_in_part(server, open_tier):
    tier = await open_tier(server.url)
    with server.client() as client:
        client.hset(META, mapping={f"field {n}": n for n in range(20_000)})
    assert await found(tier, [1, 2]) == []
    assert tier.counters.failures == 0


async def test_thousands_of_digests_are_looked_up_in_one_round_trip(server, open_tier):
    tier = await open_tier(server.url)
    for number in (0, 2000, 4095):
        assert await write(tier, number)
    digests = [loose_digest(number) for number in range(5000)]
    shards = await tier.find(NAMESPACE, digests)
    assert [n for n, it in enumerate(shards) if it] == [0, 2000, 4095]
    assert tier.counters.connections <= 2


async def test_two_writers_of_different_bytes_never_mix_them(server, open_tier):
    tiers = [await open_tier(server.url) for _ in range(2)]
    payloads = [make_payload(loose_digest(7 + n), LARGE_BYTES) for n in range(2)]
    shards = [shard_of(1)._replace(size_bytes=LARGE_BYTES, root=make_root(it)) for it in payloads]
    for _ in range(10):
        await asyncio.gather(
            *(
                tier.write(shard, memoryview(payload))
                for tier, shard, payload in zip(tiers, shards, payloads, strict=True)
            )
        )
        ((kept,),) = await tiers[0].find(NAMESPACE, [shards[0].key.digest])
        target = bytearray(LARGE_BYTES)
        assert await tiers[1].read(kept.shard, PLACE, memoryview(target))
        assert target == payloads[shards.index(kept.shard)]
    assert len(keys_of(server)) == 1 + 3

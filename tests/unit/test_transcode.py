"""Tiers with codecs of their own: what is made smaller, what is not, what the store knows of it."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from kvstore.compression.chunks import ChunkCodec, decode
from kvstore.compression.container import open_container
from kvstore.compression.policy import CodecPolicy
from kvstore.compression.shapes import CodecId
from kvstore.errors import ChecksumError, CodecError
from kvstore.hashing import block_digests, root_of
from kvstore.limits import MIB
from kvstore.metrics import Counters
from kvstore.store.shards import ShardRecord
from kvstore.store.transcode import Form, Stored, Transcoder, count, form_of
from kvstore.tiers.base import Recovered, Shard, ShardKey
from kvstore.types import HeadRange, Place, Root, TierKind
from tests.support.codec_chunks import kv_of
from tests.support.making import make_digests, make_manifest, make_payload, opaque_manifest
from tests.support.stores import write_chunk
from tests.support.tiers import DISK, REDIS, Slower, Tiers, fake, running

HOST = TierKind.HOST
SHAPE = {"layers": 6, "kv_heads": 2, "head_dim": 64, "chunk_tokens": 64}
RAW = make_manifest(**SHAPE)
ALL = RAW.all_heads
CUTS = [[ALL], [HeadRange(0, 1), HeadRange(1, 2)]]


@cache
def all_values(digest: bytes):
    return kv_of(RAW, seed=digest[0])


def values_of(digest: bytes, heads: HeadRange = ALL):
    values = all_values(digest)
    return np.ascontiguousarray(values[:, :, heads.start : heads.stop])


def plain_of(digest: bytes, heads: HeadRange = ALL) -> bytes:
    return values_of(digest, heads).tobytes()


def container(codec: str, digest: bytes, position: int = 64) -> bytes:
    coder = ChunkCodec(make_manifest(codec=codec, **SHAPE), CodecPolicy(codec=codec))
    room = bytearray(coder.encoded_size(ALL))
    values = values_of(digest)
    return bytes(
        room[: coder.encode(values, memoryview(room), ALL, first_position=position).size_bytes]
    )


def stored_as(codec: str, payload: bytes, *, is_first: bool = False) -> Stored:
    manifest = make_manifest(codec=codec, **SHAPE)
    return Stored(manifest, ALL, is_first, memoryview(payload), root_of(block_digests(payload)))


def decoded(stored: bytes, heads: HeadRange = ALL):
    found = np.empty_like(values_of(b"\0", heads))
    decode(RAW, stored, found, heads)
    return found


def error_of(found, expected) -> float:
    one, other = ((v.astype(np.uint32) << 16).view(np.float32) for v in (found, expected))
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


(DIGEST,) = make_digests(1)


@pytest.mark.parametrize(
    ("namespace", "tier", "expected"),
    [
        ("raw", "int4kv", CodecId.INT4KV),
        ("raw", "exp3", CodecId.EXP3),
        ("exp3", "int4kv", CodecId.INT4KV),
        ("exp3", "rans", CodecId.RANS),
        ("int8kv", "int4kv", CodecId.INT4KV),
        ("int8kv", "ecsq-mid", CodecId.ECSQ),
        # As small already, as the tier would have it, or encoded with loss once.
        ("rans", "exp3", None),
        ("exp3", "exp3", None),
        ("int8kv", "fp8", None),
        ("int8kv", "exp3", None),
        ("int4kv", "int4kv", None),
        ("int4kv", "ecsq-lo", None),
        ("k8v4", "hq3", None),
        ("ecsq-hi", "ecsq-lo", None),
    ],
)
def test_what_has_lost_something_loses_nothing_more_but_behind_gentle_codecs(
    namespace, tier, expected
):
    payload = plain_of(DIGEST) if namespace == "raw" else container(namespace, DIGEST)
    made = form_of(Transcoder(tier), stored_as(namespace, payload))
    if expected is None:
        assert made == "transcode_chunks_kept"
        return
    assert isinstance(made, Form)
    assert len(made.payload) < len(payload)
    assert made.root == root_of(block_digests(made.payload))
    assert open_container(made.payload).header.codec == expected
    error = error_of(decoded(bytes(made.payload)), values_of(DIGEST))
    assert (error == 0) == (tier in {"exp3", "rans"})
    assert error < 0.25


def test_the_first_tokens_stay_as_they_are_also_when_the_tier_encodes():
    for is_first in (True, False):
        made = form_of(Transcoder("int8kv"), stored_as("raw", plain_of(DIGEST), is_first=is_first))
        assert isinstance(made, Form)
        same = decoded(bytes(made.payload)) == values_of(DIGEST)
        assert bool(same[:, :, :, :4].all()) == is_first
        # A container says so itself, and so says what is made of it.
        gentle = container("int8kv", DIGEST, position=0 if is_first else 64)
        again = form_of(Transcoder("int4kv"), stored_as("int8kv", gentle))
        assert isinstance(again, Form)
        assert open_container(again.payload).header.sinks == (4 if is_first else 0)


def test_what_cannot_be_encoded_goes_as_it_is_and_is_counted():
    counters = Counters()
    broken = np.full(RAW.chunk_bytes // 2, 0x7FC0, dtype=np.uint16).tobytes()  # NaN
    wreck = make_payload(DIGEST, 50_000)
    cases = [
        (stored_as("raw", plain_of(DIGEST)), "int4kv"),
        (stored_as("raw", broken), "int4kv"),
        (stored_as("int8kv", wreck), "int4kv"),
        (stored_as("int4kv", container("int4kv", DIGEST)), "int4kv"),
    ]
    for stored, codec in cases:
        count(counters, stored, form_of(Transcoder(codec), stored))
    assert counters.transcode_chunks == 1
    assert counters.transcode_chunks_failed == 2
    assert counters.transcode_chunks_kept == 1
    assert counters.transcode_bytes_before == RAW.chunk_bytes
    assert 0 < counters.transcode_bytes_after < RAW.chunk_bytes // 2


def test_opaque_bytes_are_left_to_codecs_that_lose_nothing():
    manifest = opaque_manifest(8192)
    payload = bytes(8192)
    stored = Stored(
        manifest, HeadRange(0, 1), True, memoryview(payload), root_of(block_digests(payload))
    )
    assert form_of(Transcoder("int4kv"), stored) == "transcode_chunks_kept"
    assert isinstance(form_of(Transcoder("rans"), stored), Form)


def test_damaged_bytes_are_never_given_a_root_of_their_own():
    stored = stored_as("raw", plain_of(DIGEST))
    with pytest.raises(ChecksumError):
        form_of(Transcoder("int4kv"), stored._replace(root=Root(stored.root ^ 1)))


def test_what_another_thread_forgets_meanwhile_is_not_missed():
    transcoder = Transcoder("int4kv")

    class Forgetful(dict):
        """Forgets at once what it is given."""

        def __setitem__(self, key, value):
            pass

    transcoder._coders = Forgetful()
    assert transcoder.make(stored_as("raw", plain_of(DIGEST))) is not None


def test_a_codec_that_nobody_knows_is_refused():
    with pytest.raises(CodecError, match="codec 'int3' is unknown"):
        Transcoder("int3")


# --- between tiers ------------------------------------------------------------------------


def put(engine, digests, *, parent=None, heads: HeadRange = ALL) -> None:
    """Store the chunks *digests*, which are KV."""
    places = engine.reserve(digests, parent=parent, heads=heads)
    for digest, place in zip(digests, places, strict=True):
        if place.reservation:
            root = write_chunk(engine.store, place.extent, plain_of(digest, heads))
            engine.store.commit(engine.session, place.reservation, root)


def forms(tiers: Tiers, engine, digest: bytes) -> dict[TierKind, int]:
    """Return the bytes of *digest* tier by tier."""
    slot = engine.space.find(digest)
    return {
        kind: sum(s.size_bytes for s in tiers.store.index.shards(slot) if s.tiers & kind)
        for kind in (HOST, DISK, REDIS)
        if tiers.store.index.tiers_of(slot) & kind
    }


async def load(tiers: Tiers, engine, digests) -> list:
    """Return the values of the leading chunks, put together from their shards."""
    loading, pending, answered = tiers.ask(engine, digests)
    lease, chunks = tiers.store.end_load(loading, await answered)
    del pending
    values = []
    for chunk in chunks:
        found = np.empty_like(values_of(DIGEST))
        for shard in chunk:
            stored, heads = bytes(tiers.store.host.view(shard.extent)), shard.heads
            is_plain = len(stored) == RAW.plain_bytes(heads)
            part = np.frombuffer(stored, np.uint16) if is_plain else decoded(stored, heads)
            found[:, :, heads.start : heads.stop] = part.reshape(6, 2, heads.width, 64, 64)
        values.append(found)
    if lease:
        tiers.store.release(engine.session, [lease])
    return values


async def test_each_tier_keeps_its_own_form_and_what_comes_up_stays_small():
    lower = [Slower(fake(DISK), codec="int8kv"), Slower(fake(REDIS), codec="int4kv")]
    async with running(Tiers(lower, capacity_bytes=4 * MIB)) as tiers:
        engine, digests = tiers.engine(RAW), make_digests(3)
        put(engine, digests)
        await tiers.settle()
        tiers.store.check()
        sizes = forms(tiers, engine, digests[1])
        assert sizes[HOST] == RAW.chunk_bytes > 1.9 * sizes[DISK]
        assert sizes[DISK] > sizes[REDIS]
        assert tiers.store.counters.transcode_chunks == 6
        assert tiers.store.holdings(DISK).raw_bytes == 3 * RAW.chunk_bytes
        on_disk = [forms(tiers, engine, digest)[DISK] for digest in digests]
        assert tiers.store.holdings(DISK).stored_bytes == sum(on_disk)
        # Chunks are counted, not their forms: none that are here, one that a load would take.
        assert tiers.mover.prefetch(engine.space, digests) == 0
        tiers.evict_all()
        assert tiers.mover.prefetch(engine.space, digests) == 3
        got = await tiers.load(engine, digests)
        await tiers.settle()
        tiers.store.check()
        assert list(map(len, got)) == on_disk
        for digest, payload in zip(digests, got, strict=True):
            assert open_container(payload).header.codec == CodecId.INT8KV
            assert 0 < error_of(decoded(payload), values_of(digest)) < 0.01
            assert forms(tiers, engine, digest)[HOST] == len(payload)
        # It is on disk in the very form that is in the host tier now: nothing is made again.
        assert tiers.store.counters.transcode_chunks == 6
        assert engine.store.delete(engine.space, digests) == (3, 0)
        await tiers.settle()
        tiers.store.check()
        assert [guard.tier.usage().used_bytes for guard in tiers.guards.values()] == [0, 0]


async def test_a_copy_on_disk_is_found_there_after_redis_has_one_too():
    class Placed(type(fake(DISK))):
        """Reads only what lies where it was put, as a disk does."""

        async def write(self, shard, source):
            await super().write(shard, source)
            return Place(77)

        async def read(self, shard, place, target, table=None):
            return place == Place(77) and await super().read(shard, place, target, table)

    disk = Placed(64 * MIB, kind=DISK)
    async with running(Tiers([Slower(disk), Slower(fake(REDIS))])) as tiers:
        engine = tiers.engine(RAW)
        put(engine, [DIGEST])
        await tiers.settle()
        tiers.evict_all()
        assert await tiers.load(engine, [DIGEST]) == [plain_of(DIGEST)]
        assert set(forms(tiers, engine, DIGEST)) == {HOST, DISK, REDIS}


async def test_what_is_demoted_is_charged_and_evicted_by_what_it_takes_there():
    size = len(container("int4kv", DIGEST))
    disk = fake(DISK, capacity_bytes=int(6.5 * size))
    async with running(Tiers([Slower(disk, codec="int4kv")], capacity_bytes=4 * MIB)) as tiers:
        engine = tiers.engine(RAW)
        for prompt in range(12):
            put(engine, make_digests(1, prompt))
            await tiers.settle()
            tiers.store.check()
        # As plain bytes not even two would fit.
        assert tiers.store.slower.residents[DISK].count in {5, 6}
        assert disk.usage().used_bytes <= disk.usage().capacity_bytes


async def test_damaged_bytes_do_not_go_down():
    async with running(Tiers([Slower(fake(DISK), "on_evict", codec="int4kv")])) as tiers:
        engine = tiers.engine(RAW)
        put(engine, [DIGEST])
        slot = engine.space.find(DIGEST)
        (shard,) = tiers.store.index.shards(slot)
        tiers.store.host.view(shard.extent)[100] ^= 1
        tiers.mover.spread(engine.space, [DIGEST])
        tiers.mover._demote(slot)
        await tiers.settle()
        assert tiers.store.counters.checksum_failures == 1
        assert set(forms(tiers, engine, DIGEST)) == {HOST}
        tiers.store.check()


async def test_bytes_computed_anew_stand_beside_the_form_that_a_tier_has_made():
    """As after a restart, when disk and arena have kept both."""
    async with running(Tiers([Slower(fake(DISK), codec="int4kv")])) as tiers:
        engine = tiers.engine(RAW)
        put(engine, [DIGEST])
        await tiers.settle()
        tiers.evict_all()
        (form,) = tiers.store.index.shards(engine.space.find(DIGEST))
        extent = tiers.store.host.allocate(RAW.chunk_bytes)
        root = write_chunk(tiers.store, extent, plain_of(DIGEST))
        assert tiers.store.restore(engine.space, DIGEST, None, ShardRecord(ALL, extent, root), 0)
        await tiers.settle()
        tiers.store.check()
        sizes = forms(tiers, engine, DIGEST)
        assert sizes == {HOST: RAW.chunk_bytes, DISK: form.size_bytes}
        # What another daemon has put in its place is known by its own bytes.
        other = Shard(ShardKey(engine.space.id, DIGEST, ALL), None, 4096, Root(5))
        tiers.store.slower.learn(engine.space, DISK, Recovered(other, Place(0)), tenant=0)
        tiers.store.check()
        assert forms(tiers, engine, DIGEST) == {HOST: RAW.chunk_bytes, DISK: 4096}


@pytest.mark.parametrize("seed", range(4))
async def test_whatever_happens_every_load_gives_the_values_and_every_byte_is_accounted(seed):
    rng = np.random.default_rng(seed)
    disk = Slower(fake(DISK, capacity_bytes=MIB), ("back", "on_evict")[seed % 2], codec="int8kv")
    redis = Slower(
        fake(REDIS), ("back", "through")[seed // 2], codec=("", "exp3", "k8v4")[seed % 3]
    )
    prompts = [make_digests(3, prompt) for prompt in range(4)]
    async with running(Tiers([disk, redis], capacity_bytes=MIB)) as tiers:
        engine, loaded = tiers.engine(RAW), 0
        for step in rng.integers(5, size=80):
            digests = prompts[rng.integers(4)]
            match step:
                case 0 | 1:
                    for heads in CUTS[rng.integers(2)]:
                        put(engine, digests, heads=heads)
                case 2:
                    found = await load(tiers, engine, digests)
                    loaded += len(found)
                    for digest, values in zip(digests, found, strict=False):
                        assert error_of(values, values_of(digest)) < 0.15
                case 3:
                    await tiers.settle()
                    tiers.evict_all()
                case 4:
                    engine.store.delete(engine.space, digests[rng.integers(3) :])
            tiers.store.check()
        await tiers.settle()
        tiers.store.check()
        assert loaded > 10
        assert tiers.store.counters.transcode_chunks > 10

"""How the disk tier's bytes lie (format 1, golden), and what its in-memory columns promise."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from hypothesis import given, settings, strategies as st

from kvstore.hashing import block_digests, root_of
from kvstore.limits import CHUNK_SIZE_MAX_BYTES, DISK_INDEX_SHARE, GIB, KIB, MIB, TIB
from kvstore.tiers import disk_recovery
from kvstore.tiers.base import Shard
from kvstore.tiers.disk_fingerprints import NO_SLOT, Fingerprints
from kvstore.tiers.disk_layout import (
    FORMAT,
    HEADER_MAX_BYTES,
    RECORD,
    RECORD_BYTES,
    fingerprint_of,
    footprint,
    footprints,
    header_holds,
    header_size,
    pack_header,
    pack_record,
    unpack_shard,
    whole_records,
)
from kvstore.tiers.disk_open import shares_of
from kvstore.tiers.disk_slots import Room, Slots
from kvstore.tiers.disk_volume import Volume
from kvstore.types import Extent, Place
from tests.support.disks import disk_tier, get, payload_of, put, recovered, shard_of

SHARD = shard_of(5, 200_000)
DIGESTS = block_digests(payload_of(5, 200_000))


HEADER_SHA256 = "a592fc0ba6a9b3eb2c9aa69f7ecb11c70212649729b0e499fa7a4bd85481f703"
RECORD_SHA256 = "a33f0c67149ddb2f06c668915e919374f0f75580c097cefcd09c9d9b1b614b6a"


# --- golden bytes --------------------------------------------------------------------------


def test_the_header_is_that_of_format_1() -> None:
    header = pack_header(SHARD, DIGESTS)
    assert FORMAT == 1
    assert header[:16].hex() == "6b76737463686b0a0100000000100000"
    assert hashlib.sha256(header).hexdigest() == HEADER_SHA256


def test_the_record_is_that_of_format_1() -> None:
    record = pack_record(SHARD, sequence=7, page=9, fingerprint=fingerprint_of(SHARD.key, 3))
    assert record[:16].hex() == "070000000000000009000000400d0300"
    assert len(record) == RECORD_BYTES == 128
    assert hashlib.sha256(record).hexdigest() == RECORD_SHA256


# --- headers and records ---------------------------------------------------------------------


def test_a_header_holds_for_its_shard_and_no_other() -> None:
    header = pack_header(SHARD, DIGESTS)
    assert header_holds(header, SHARD, DIGESTS)
    assert header_holds(header, SHARD._replace(parent=None), DIGESTS)
    assert not header_holds(header, shard_of(6, 200_000), DIGESTS)
    assert not header_holds(header, SHARD._replace(size_bytes=199_999), DIGESTS)
    other = block_digests(payload_of(6, 200_000))
    assert not header_holds(header, SHARD, other)
    assert not header_holds(header, SHARD._replace(root=root_of(other)), other)


@given(st.integers(0, header_size(200_000) * 8 - 1))
def test_no_bit_of_a_header_can_be_flipped(at: int) -> None:
    header = bytearray(pack_header(SHARD, DIGESTS))
    header[at // 8] ^= 1 << at % 8
    assert not header_holds(bytes(header), SHARD, DIGESTS)


@given(st.integers(0, RECORD_BYTES * 8 - 1))
def test_no_bit_of_a_record_can_be_flipped(at: int) -> None:
    record = bytearray(pack_record(SHARD, sequence=7, page=9, fingerprint=1))
    record[at // 8] ^= 1 << at % 8
    assert not whole_records(np.frombuffer(record, RECORD)).any()


def test_a_record_says_all_of_its_shard() -> None:
    for shard in (SHARD, SHARD._replace(parent=None)):
        record = pack_record(shard, sequence=1, page=2, fingerprint=3)
        assert unpack_shard(record) == shard
        assert whole_records(np.frombuffer(record, RECORD)).all()


@given(st.lists(st.integers(1, CHUNK_SIZE_MAX_BYTES)))
def test_footprints_are_those_of_each_size(sizes: list[int]) -> None:
    found = footprints(np.array(sizes, "<u4"))
    assert found.tolist() == [footprint(size) for size in sizes]
    assert all(header_size(size) <= HEADER_MAX_BYTES for size in sizes)


@given(st.integers(MIB, 16 * TIB))
def test_a_capacity_is_shared_so_that_no_chunk_lacks_a_record(capacity_bytes: int) -> None:
    shares = shares_of(capacity_bytes)
    assert shares.slab_bytes + shares.index_bytes <= capacity_bytes
    assert shares.slots >= shares.slab_bytes // footprint(1)
    assert shares.slab_bytes >= capacity_bytes * (DISK_INDEX_SHARE - 2) // DISK_INDEX_SHARE


# --- fingerprints ----------------------------------------------------------------------------

# Few values, so that homes meet, runs grow long and tables wrap around.
KEYS = st.integers(0, 40).map(lambda number: (number % 7) * 2**8 + (number // 7) * 2**40)


@given(st.lists(st.tuples(st.sampled_from(["put", "drop"]), KEYS, st.integers(0, 2**32 - 2))))
def test_fingerprints_are_a_dict(steps: list[tuple[str, int, int]]) -> None:
    table, model = Fingerprints(), dict[int, int]()
    for what, key, slot in steps:
        if what == "put":
            table.put(key, slot)
            model[key] = slot
        else:
            table.drop(key)
            model.pop(key, None)
        assert len(table) == len(model)
    for number in range(41):
        key = (number % 7) * 2**8 + (number // 7) * 2**40
        assert table.get(key) == model.get(key, NO_SLOT)


@settings(max_examples=40)
@given(st.sets(st.one_of(KEYS, st.integers(0, 2**64 - 1)), max_size=300))
def test_many_fingerprints_at_once_are_those_one_by_one(keys: set[int]) -> None:
    order = list(keys)
    table = Fingerprints()
    table.fill(np.array(order, np.uint64), np.arange(len(order), dtype=np.uint32))
    assert [table.get(key) for key in order] == list(range(len(order)))
    for key in order[::2]:
        table.drop(key)
    assert [table.get(key) for key in order[1::2]] == list(range(len(order)))[1::2]
    assert {table.get(key) for key in order[::2]} <= {NO_SLOT}


# --- slots -----------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 12), st.integers(1, 300 * KIB))))
def test_slots_tile_the_slab_whatever_comes(steps: list[tuple[int, int, int]]) -> None:
    slots = Slots(slab_bytes=2 * MIB, limit_bytes=2 * MIB - 64 * KIB, slots_max=8)
    rooms: dict[int, Room] = {}
    places: dict[int, Place] = {}
    for verb, key, size_bytes in steps:
        if verb == 0 and key not in rooms:
            room = slots.take(size_bytes)
            if room is not None:
                rooms[key] = room
                places[key] = slots.publish(room, slots.next_sequence(), key)
        elif verb == 1 and key in rooms:
            slots.retire(rooms[key].slot, key)
            assert slots.doom(rooms[key].slot)
            slots.give_back(rooms.pop(key).slot)
            assert slots.find(places.pop(key)) is None
        elif verb == 2 and key in rooms:
            slots.enter(rooms[key].slot)
            assert not slots.leave(rooms[key].slot)
        slots.check()
        assert {key: slots.find(place) for key, place in places.items()} == rooms
        assert len(slots) == len(rooms) <= 8


def test_sequence_numbers_pass_the_end_of_32_bits() -> None:
    slots = Slots(slab_bytes=MIB, limit_bytes=MIB, slots_max=8)
    rows = np.zeros(1, RECORD)
    rows["sequence"], rows["size_bytes"] = 2**32 - 1, 1
    slots.restore(rows, np.array([0]))
    assert slots.next_sequence() == 2**32 + 1


# --- what a start keeps ------------------------------------------------------------------------


def rows_of(*records: tuple[int, int, int]) -> np.ndarray:
    """Return records of (sequence, page, number); each takes two pages."""
    packed = [
        pack_record(
            shard_of(number, 100),
            sequence=sequence,
            page=page,
            fingerprint=fingerprint_of(shard_of(number).key, 0),
        )
        for sequence, page, number in records
    ]
    return np.frombuffer(b"".join(packed), RECORD)


def survey(rows: np.ndarray, pages: int = 100) -> disk_recovery.Survey:
    return disk_recovery.survey(rows, slab_bytes=400 * KIB, limit_bytes=pages * 4 * KIB)


def test_kept_slots_come_by_age() -> None:
    assert survey(rows_of((3, 0, 1), (1, 2, 2), (2, 4, 3))).slots.tolist() == [1, 2, 0]


def test_the_newest_of_a_key_and_of_overlapping_extents_is_kept() -> None:
    same_key = survey(rows_of((1, 0, 1), (2, 2, 1)))
    assert (same_key.slots.tolist(), same_key.superseded) == ([1], 1)
    overlap = survey(rows_of((5, 1, 1), (4, 0, 2), (3, 2, 3), (9, 50, 4)))
    assert (overlap.slots.tolist(), overlap.superseded) == ([0, 3], 2)


def test_what_lies_beyond_the_slab_is_left_out() -> None:
    found = survey(rows_of((1, 98, 1), (2, 99, 2)))
    assert (found.slots.tolist(), found.quarantined) == ([0], 1)


def test_the_newest_that_fit_are_kept() -> None:
    rows = rows_of(*((age, 2 * age, age) for age in range(1, 11)))
    found = survey(rows, pages=7)
    assert (found.slots.tolist(), found.outgrown) == ([7, 8, 9], 7)


def test_runs_and_gaps_tile_the_slab() -> None:
    runs = disk_recovery.runs_of(rows_of((1, 4, 1), (2, 2, 2), (3, 10, 3)))
    page = 4 * KIB
    assert runs == [Extent(2 * page, 4 * page), Extent(10 * page, 2 * page)]
    gaps = disk_recovery.gaps_between(runs, 12 * page)
    assert gaps == [Extent(0, 2 * page), Extent(6 * page, 4 * page)]
    assert disk_recovery.runs_of(rows_of()[:0]) == []


# --- many chunks -------------------------------------------------------------------------------


def write_index(path: Path, shards: list[Shard], *, capacity_bytes: int, seed: int) -> None:
    """Write the index of many small chunks, as the tier would have."""
    records = [
        pack_record(
            shard,
            sequence=number + 1,
            page=2 * number,
            fingerprint=fingerprint_of(shard.key, seed),
        )
        for number, shard in enumerate(shards)
    ]
    path.mkdir(exist_ok=True)
    volume = Volume(path)
    volume.resize(shares_of(capacity_bytes).slab_bytes)
    volume.close()
    (path / "index").write_bytes(b"".join(records))


async def test_twenty_thousand_chunks_are_found_and_none_is_read(tmp_path: Path) -> None:
    count, capacity_bytes = 20_000, GIB // 2
    async with disk_tier(tmp_path, capacity_bytes) as tier:
        seed = tier._directory.seed
    shards = [shard_of(number, 100) for number in range(count)]
    write_index(tmp_path, shards, capacity_bytes=capacity_bytes, seed=seed)
    async with disk_tier(tmp_path, capacity_bytes) as tier:
        found = recovered(tier)
        assert [shard for shard, _ in found] == shards
        assert tier.usage().used_bytes == count * footprint(100)
        for shard, place in found[:10]:
            assert await tier.remove(shard, place)
        # Their payloads were never written: each is found out by its first read.
        target = memoryview(bytearray(100))
        assert not await tier.read(*found[10], target)
        assert tier.counters.quarantined == 1
        await put(tier, 3, size_bytes=100)
        assert tier.usage().used_bytes == (count - 10) * footprint(100)
        shard, place = recovered(tier)[-1]
        assert await get(tier, shard, place) == payload_of(3, 100)

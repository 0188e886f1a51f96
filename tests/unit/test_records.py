"""Records: what was published is found again to the bit, what is torn or void never is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st

from kvstore.limits import (
    ARENA_SIZE_MAX_BYTES,
    ARENA_SIZE_MIN_BYTES,
    GIB,
    MANIFEST_SIZE_MAX_BYTES,
    RECORDS_MAX,
    RECORDS_MIN,
)
from kvstore.tiers import records as records_module
from kvstore.tiers.record_layout import (
    FORMAT,
    RECORD,
    Geometry,
    Owner,
    geometry_for,
    read_header,
    write_header,
)
from kvstore.tiers.records import Records
from kvstore.types import Extent, NamespaceId
from tests.support.records import (
    CAPACITY_BYTES,
    GEOMETRY,
    IDENTITY,
    NAMESPACE,
    OWNER,
    kept,
    make_memory,
    make_shard,
    open_records,
    page,
    rows_of,
)

TABLE = GEOMETRY.table_offset


@pytest.fixture
def memory() -> memoryview:
    return make_memory()


@pytest.fixture
def records(memory) -> Records:
    return open_records(memory)


def reopen(memory: memoryview) -> Records:
    """Go on as the next daemon does, with everything that holds."""
    records = Records(memory, CAPACITY_BYTES, GEOMETRY)
    found = records.scan()
    records.resume(found, np.ones(len(found.rows), dtype=bool))
    return records


# --- the header --------------------------------------------------------------------------


def test_there_is_a_record_for_so_much_arena_between_two_bounds():
    assert geometry_for(ARENA_SIZE_MIN_BYTES).entries == RECORDS_MIN
    assert geometry_for(64 * GIB).entries == 2**20
    assert geometry_for(ARENA_SIZE_MAX_BYTES).entries == RECORDS_MAX
    # A quarter of a percent of the arena.
    assert geometry_for(64 * GIB).size_bytes < 64 * GIB * 0.0026


def test_a_header_is_read_back(memory):
    assert read_header(memory, IDENTITY) == GEOMETRY


def test_memory_without_a_header_has_no_records():
    assert "no records" in read_header(memoryview(bytes(8192)), IDENTITY)
    assert "no records" in read_header(memoryview(b"kvstrec\n"), IDENTITY)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"capacity_bytes": 8192}, f"it has {CAPACITY_BYTES} bytes, tiers.host.capacity is 8192"),
        ({"boot": bytes(16)}, "the machine has been started again since"),
        ({"inode": 3}, "its records are those of another file"),
        ({"device": 3}, "its records are those of another file"),
    ],
)
def test_a_header_of_another_arena_is_refused_with_the_reason(memory, changed, reason):
    assert read_header(memory, IDENTITY._replace(**changed)) == reason


def test_another_format_is_refused_by_its_number_whatever_else_it_has(memory):
    memory[8] = FORMAT + 1
    memory[12:100] = bytes(88)
    assert f"format {FORMAT + 1}, this version reads format {FORMAT}" in read_header(
        memory, IDENTITY
    )


@pytest.mark.parametrize("at", range(12, 80))
def test_a_flipped_bit_anywhere_in_the_header_is_noticed(memory, at):
    memory[at] ^= 4
    assert "damaged" in read_header(memory, IDENTITY)


def test_a_header_whose_table_is_cut_off_is_damaged(memory):
    assert "damaged" in read_header(memory[:-1], IDENTITY)


# --- one extent ----------------------------------------------------------------------------


def test_a_published_shard_is_found_again_to_the_bit(memory, records):
    shards = {page(number, 5000 + number): make_shard(number) for number in range(0, 8, 2)}
    shards = {e: shard._replace(size_bytes=e.size_bytes) for e, shard in shards.items()}
    for extent, shard in shards.items():
        records.publish(extent, shard, tenant=extent.offset)
    found = reopen(memory)
    assert kept(found) == shards
    assert [row["tenant"] for row in rows_of(found)] == [extent.offset for extent in shards]
    assert found.namespaces() == {NAMESPACE: b"introduction"}


def test_an_extent_that_is_filled_is_found_with_its_owner_until_it_is_published(memory, records):
    assert records.fill(page(3), OWNER)
    assert kept(reopen(memory)) == {page(3): OWNER}
    records.publish(page(3), make_shard(1))
    assert kept(reopen(memory)) == {page(3): make_shard(1)}


def test_what_was_freed_is_not_found(memory, records):
    for number in range(4):
        records.publish(page(number), make_shard(number))
    records.fill(page(9), OWNER)
    records.clear(page(9).offset)
    records.clear(page(2).offset)
    records.clear(page(2).offset)
    assert set(kept(reopen(memory))) == {page(0), page(1), page(3)}


def test_records_come_in_the_order_of_publishing_across_restarts(memory, records):
    for number in (5, 2, 9):
        records.publish(page(number), make_shard(number))
    again = reopen(memory)
    again.publish(page(1), make_shard(1))
    offsets = [row["offset"] // 4096 for row in rows_of(reopen(memory))]
    assert offsets == [5, 2, 9, 1]


def test_extents_that_meet_in_one_place_of_the_table_all_have_records(memory, records):
    # 64 pages and 16 records: four pages share a place.
    for number in (0, 1, 2, 3, 63, 62):
        records.publish(page(number), make_shard(number))
    again = reopen(memory)
    again.clear(page(1).offset)
    again.clear(page(62).offset)
    again.publish(page(3), make_shard(40))
    assert kept(reopen(memory)) == {
        page(0): make_shard(0),
        page(2): make_shard(2),
        page(3): make_shard(40),
        page(63): make_shard(63),
    }


# --- a table that is full --------------------------------------------------------------------


def test_a_shard_without_room_for_its_record_is_counted_and_forgotten(memory, records):
    for number in range(17):
        records.publish(page(number), make_shard(number))
    assert records.unrecorded == 1
    records.clear(page(16).offset)
    assert set(kept(reopen(memory))) == {page(number) for number in range(16)}


def test_an_extent_that_is_written_takes_the_place_of_a_published_shard(memory, records):
    for number in range(16):
        records.publish(page(number), make_shard(number))
    assert records.fill(page(40), OWNER)
    assert records.fill(page(41), OWNER)
    found = kept(reopen(memory))
    assert found[page(40)] == found[page(41)] == OWNER
    assert len(found) == 16
    assert records.unrecorded == 2


def test_extents_that_are_written_never_take_the_place_of_one_another(memory, records):
    assert all(records.fill(page(number), OWNER) for number in range(16))
    assert not records.fill(page(20), OWNER)
    assert len(kept(reopen(memory))) == 16


def test_what_lost_its_record_can_be_freed_and_published_again(memory, records):
    for number in range(16):
        records.publish(page(number), make_shard(number))
    records.fill(page(40), OWNER)
    (lost,) = {page(number) for number in range(16)} - set(kept(reopen(memory)))
    records.clear(lost.offset)
    records.clear(page(40).offset)
    records.publish(lost, make_shard(3))
    assert kept(reopen(memory))[lost] == make_shard(3)


# --- namespaces --------------------------------------------------------------------------------


def test_a_shard_of_a_namespace_that_was_not_introduced_is_not_recorded(memory, records):
    stranger = NamespaceId(b"x" * 16)
    records.fill(page(1), OWNER)
    records.publish(page(1), make_shard(1, namespace=stranger))
    records.publish(page(2), make_shard(2, namespace=stranger))
    assert records.unrecorded == 2
    assert kept(reopen(memory)) == {}
    for number in range(16):
        assert records.fill(page(number), OWNER)


def test_namespaces_without_shards_make_room_for_new_ones(memory, records):
    records.publish(page(0), make_shard(0))
    for number in range(40):
        assert records.introduce(NamespaceId(number.to_bytes(16, "big")), b"i" * 100)
    found = reopen(memory)
    assert found.namespaces()[NAMESPACE] == b"introduction"
    assert found.namespaces()[NamespaceId((39).to_bytes(16, "big"))] == b"i" * 100
    assert found.knows(NAMESPACE)
    assert not found.knows(NamespaceId(bytes(16)))


def test_a_namespace_is_introduced_once(memory, records):
    assert all(records.introduce(NAMESPACE, b"introduction") for _ in range(100))
    assert records.introduce(NamespaceId(b"y" * 16), b"y" * 300)
    assert set(reopen(memory).namespaces()) == {NAMESPACE, NamespaceId(b"y" * 16)}


@pytest.mark.parametrize("size", [500, 2 * MANIFEST_SIZE_MAX_BYTES + 1])
def test_an_introduction_that_cannot_fit_is_refused_and_changes_nothing(memory, records, size):
    records.publish(page(0), make_shard(0))
    stranger = NamespaceId(b"x" * 16)
    assert not records.introduce(stranger, bytes(size))
    assert not records.knows(stranger)
    assert reopen(memory).namespaces() == {NAMESPACE: b"introduction"}


def test_an_introduction_that_is_torn_is_not_read_nor_anything_behind_it(memory, records):
    records.introduce(NamespaceId(b"y" * 16), b"behind")
    second = memory.obj.index(b"behind")
    memory[second] ^= 1
    assert set(reopen(memory).namespaces()) == {NAMESPACE}
    # The next one takes its place.
    again = reopen(memory)
    again.introduce(NamespaceId(b"z" * 16), b"another")
    assert set(reopen(memory).namespaces()) == {NAMESPACE, NamespaceId(b"z" * 16)}
    memory[memory.obj.index(b"introduction")] ^= 1
    assert reopen(memory).namespaces() == {}


def test_an_introduction_of_no_possible_size_ends_the_list(memory, records):
    memory[4096 + 8 : 4096 + 12] = b"\xff" * 4
    assert reopen(memory).namespaces() == {}


def test_namespaces_that_found_no_room_are_tried_again_once_there_are_many(records, monkeypatch):
    monkeypatch.setattr(records_module, "NAMESPACES_MAX", 3)
    for number in range(8):
        assert not records.introduce(NamespaceId(number.to_bytes(16, "big")), bytes(500))
    assert len(records._refused) == 2


# --- what is torn -----------------------------------------------------------------------------


def test_a_flipped_bit_anywhere_in_a_record_makes_it_void(memory, records):
    records.publish(page(0), make_shard(0))
    for at in range(RECORD.itemsize):
        memory[TABLE + at] ^= 0x10
        found = records.scan()
        assert (len(found.rows), found.torn) == (0, 1)
        memory[TABLE + at] ^= 0x10
    assert len(records.scan().rows) == 1


def test_a_record_written_over_another_is_one_of_both_or_none_after_every_store(memory, records):
    """Bodies are stored in any order of bytes; here every prefix and every suffix of one."""
    records.publish(page(0), make_shard(0))
    old = bytes(memory[TABLE : TABLE + RECORD.itemsize])
    records.publish(page(0), make_shard(1))
    new = bytes(memory[TABLE : TABLE + RECORD.itemsize])
    for cut in range(8, RECORD.itemsize + 1):
        for mixed in (new[8:cut] + old[cut:], old[8:cut] + new[cut:]):
            for checksum in (old[:8], bytes(8), new[:8]):
                memory[TABLE : TABLE + RECORD.itemsize] = checksum + mixed
                assert set(kept(records).values()) <= {make_shard(0), make_shard(1)}


def test_records_that_are_not_kept_are_void_from_then_on(memory, records):
    for number in range(6):
        records.publish(page(number), make_shard(number))
    memory[TABLE + 20] ^= 1
    again = Records(memory, CAPACITY_BYTES, GEOMETRY)
    found = again.scan()
    assert found.torn == 1
    again.resume(found, found.rows["offset"] != page(3).offset)
    memory[TABLE + 20] ^= 1
    assert set(kept(reopen(memory))) == {page(1), page(2), page(4), page(5)}
    # Their places are vacant.
    assert all(again.fill(page(number), OWNER) for number in range(20, 32))


def test_memory_that_is_let_go_of_keeps_its_records(memory, records):
    records.publish(page(0), make_shard(0))
    records.close()
    assert kept(reopen(memory)) == {page(0): make_shard(0)}


# --- traffic ------------------------------------------------------------------------------------


@given(st.data())
def test_after_random_traffic_the_next_daemon_finds_what_the_last_one_had(data):
    memory = make_memory()
    records = open_records(memory)
    model: dict[Extent, object] = {}
    for number in range(data.draw(st.integers(1, 60))):
        at = page(data.draw(st.integers(0, 63)))
        match data.draw(st.sampled_from(["fill", "publish", "clear", "restart"])):
            case "fill" if at not in model:
                lost = records.unrecorded
                if records.fill(at, Owner(number, number, number)):
                    model[at] = Owner(number, number, number)
                if records.unrecorded > lost:
                    (gone,) = set(model) - set(kept(records))
                    assert not isinstance(model.pop(gone), Owner)
            case "publish":
                lost = records.unrecorded
                records.publish(at, make_shard(number))
                model.pop(at, None)
                if records.unrecorded == lost:
                    model[at] = make_shard(number)
            case "clear":
                records.clear(at.offset)
                model.pop(at, None)
            case "restart":
                records = reopen(memory)
        assert kept(records) == model
    assert kept(reopen(memory)) == model


@given(st.binary(max_size=GEOMETRY.size_bytes), st.integers(0, GEOMETRY.size_bytes))
def test_whatever_lies_there_is_read_without_an_error(noise, at):
    memory = make_memory()
    open_records(memory).publish(page(0), make_shard(0))
    noise = noise[: len(memory) - at]
    memory[at : at + len(noise)] = noise
    geometry = read_header(memory, IDENTITY)
    assert isinstance(geometry, str) or geometry == GEOMETRY
    assert set(kept(Records(memory, CAPACITY_BYTES, GEOMETRY)).values()) <= {make_shard(0)}


# --- the bytes of format 1 ----------------------------------------------------------------------


def test_the_bytes_of_format_1_are_what_they_always_were():
    geometry = Geometry(entries=1, bank_bytes=64)
    memory = memoryview(bytearray(geometry.size_bytes))
    write_header(memory, geometry, IDENTITY)
    records = Records(memory, CAPACITY_BYTES, geometry)
    assert records.introduce(NAMESPACE, b"hello")
    records.publish(Extent(8192, 5000), make_shard(3, size_bytes=5000), tenant=9)
    assert bytes(memory[:88]).hex() == GOLDEN_HEADER
    assert bytes(memory[4096:4136]).hex() == GOLDEN_NAMESPACE
    assert bytes(memory[geometry.table_offset :]).hex() == GOLDEN_RECORD


GOLDEN_HEADER = (
    "6b7673747265630a01000000a0000000000004000000000001000000000000004000000000000000"
    "01000000000000000200000000000000626f6f74626f6f74626f6f74626f6f742d163ece7c203b22"
    "0000000000000000"
)
GOLDEN_NAMESPACE = (
    "03b5cb969d84551505000000000000006e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e68656c6c6f000000"
)
GOLDEN_RECORD = (
    "aecccd650d025b500200000001000000030005008813000001000000000000000020000000000000"
    "16000000000000000000000000000000000000000000000000000000000000000900000000000000"
    "6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6eb88e98ba3cbfc87f29646efa576b61d235d45eaaeee59c94"
    "92f9b616fbe8ca9cc6f6aa3e8efa6972fa3e0e80d0bc97fb0de0372ea6c74a619b88b29d15bf2ae3"
)

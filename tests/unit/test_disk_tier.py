"""The disk tier: what a restart finds, capacity, concurrency, cancellation. See also
test_remote_tiers (what every tier promises) and test_disk_damage (what goes wrong)."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from kvstore.errors import ConfigError, TierError
from kvstore.limits import DISK_PART_SIZE_BYTES, DISK_SIZE_MIN_BYTES, KIB, MIB
from kvstore.tiers.disk_layout import RECORD_BYTES, footprint
from kvstore.tiers.disk_open import open_disk_tier
from kvstore.tiers.disk_volume import Volume
from tests.support.disks import (
    CAPACITY,
    NAMESPACE,
    SIZE,
    disk_tier,
    get,
    payload_of,
    put,
    recovered,
    served,
    shard_of,
)


def blocks_held(path: Path) -> int:
    return sum(found.stat().st_blocks * 512 for found in path.iterdir() if found.is_file())


# --- a restart -----------------------------------------------------------------------------


async def test_a_restart_finds_all_shards_oldest_first_and_all_manifests(tmp_path: Path) -> None:
    async with disk_tier(tmp_path) as tier:
        await tier.introduce(NAMESPACE, b"manifest")
        await put(tier, 3, 1, 2)
        used = tier.usage()
    async with disk_tier(tmp_path) as tier:
        assert recovered(tier) == recovered(tier)
        assert [shard for shard, _ in recovered(tier)] == [shard_of(n) for n in (3, 1, 2)]
        assert await served(tier) == [3, 1, 2]
        assert tier.manifests() == {NAMESPACE: b"manifest"}
        assert tier.usage() == used
        assert tier.counters.quarantined == 0


async def test_what_was_removed_or_replaced_does_not_come_back(tmp_path: Path) -> None:
    async with disk_tier(tmp_path) as tier:
        first, second, _ = await put(tier, 1, 2, 3)
        assert await tier.remove(shard_of(1), first)
        await put(tier, 2)
        assert await get(tier, shard_of(2), second) is None
        assert await served(tier) == [3, 2]
    async with disk_tier(tmp_path) as tier:
        assert await served(tier) == [3, 2]


async def test_rooms_and_slots_are_used_again(tmp_path: Path) -> None:
    async with disk_tier(tmp_path) as tier:
        for number in range(20):
            (place,) = await put(tier, number, size_bytes=3 * MIB)
            assert await tier.remove(shard_of(number, 3 * MIB), place)
        assert tier.usage().used_bytes == 0
    assert (tmp_path / "index").stat().st_size == RECORD_BYTES


async def test_a_place_of_something_gone_never_names_what_came_after(tmp_path: Path) -> None:
    async with disk_tier(tmp_path) as tier:
        (place,) = await put(tier, 1)
        await tier.remove(shard_of(1), place)
        (other,) = await put(tier, 2)
        assert await get(tier, shard_of(2), place) is None
        assert await get(tier, shard_of(1), other) is None
        assert not await tier.remove(shard_of(1), other)
        assert await get(tier, shard_of(2), other) == payload_of(2)


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize(
    "size_bytes",
    [1, 4095, 4096, 64 * KIB, 64 * KIB + 1, DISK_PART_SIZE_BYTES, DISK_PART_SIZE_BYTES * 2 + 5],
)
async def test_any_size_comes_back_from_aligned_and_unaligned_memory(
    tmp_path: Path, size_bytes: int, direct: bool
) -> None:
    async with disk_tier(tmp_path, 32 * MIB, direct=direct) as tier:
        (place,) = await put(tier, 7, size_bytes=size_bytes)
        assert tier.usage().used_bytes == footprint(size_bytes) == tier.footprint(size_bytes)
        shard, expected = shard_of(7, size_bytes), payload_of(7, size_bytes)
        assert await get(tier, shard, place) == expected
        around = bytearray(b"x" * (size_bytes + 6))
        assert await tier.read(shard, place, memoryview(around)[3:-3])
        assert bytes(around) == b"xxx" + expected + b"xxx"


async def test_many_calls_at_once_keep_apart(tmp_path: Path) -> None:
    async with disk_tier(tmp_path, 16 * MIB) as tier:

        async def cycle(number: int) -> None:
            for _ in range(5):
                (place,) = await put(tier, number)
                assert await get(tier, shard_of(number), place) == payload_of(number)
                assert await tier.remove(shard_of(number), place)

        await asyncio.gather(*(cycle(number) for number in range(16)))
        assert tier.usage().used_bytes == 0


# --- capacity ------------------------------------------------------------------------------


async def test_the_directory_never_takes_more_than_its_capacity(tmp_path: Path) -> None:
    async with disk_tier(tmp_path) as tier:
        numbers = range(100)
        places = [await tier.write(shard_of(n), memoryview(payload_of(n))) for n in numbers]
        assert None in places
        usage = tier.usage()
        assert usage.used_bytes <= usage.capacity_bytes < CAPACITY
        kept = await served(tier)
        assert len(kept) == usage.capacity_bytes // footprint(SIZE)
    # Beside slab and index there are a marker and a lock, a page each.
    assert blocks_held(tmp_path) <= CAPACITY + 8 * KIB
    async with disk_tier(tmp_path) as tier:
        assert tier.usage() == usage
        assert await tier.write(shard_of(500), memoryview(payload_of(500))) is None
        assert await served(tier) == kept


async def test_a_smaller_capacity_drops_the_oldest_and_gives_room_back(tmp_path: Path) -> None:
    async with disk_tier(tmp_path, 4 * CAPACITY) as tier:
        await put(tier, *range(60))
    async with disk_tier(tmp_path, CAPACITY) as tier:
        usage = tier.usage()
        assert usage.used_bytes <= usage.capacity_bytes < CAPACITY
        kept = await served(tier)
        assert kept == list(range(60 - len(kept), 60))
        assert len(kept) == usage.capacity_bytes // footprint(SIZE)
        assert tier.counters.outgrown == 60 - len(kept)
        assert await tier.write(shard_of(99), memoryview(payload_of(99))) is None
        shard, place = recovered(tier)[0]
        assert await tier.remove(shard, place)
        await put(tier, 99)
        assert blocks_held(tmp_path) <= CAPACITY + 8 * KIB
    async with disk_tier(tmp_path, CAPACITY) as tier:
        assert await served(tier) == [*kept[1:], 99]
        for shard, place in recovered(tier):
            await tier.remove(shard, place)
    async with disk_tier(tmp_path, CAPACITY):
        # The slab has its own length again.
        assert (tmp_path / "slab").stat().st_size < CAPACITY


async def test_where_no_holes_can_be_made_only_what_lies_inside_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with disk_tier(tmp_path, 4 * CAPACITY) as tier:
        await put(tier, *range(60))
    monkeypatch.setattr(Volume, "punch", lambda *_: False)
    async with disk_tier(tmp_path, CAPACITY) as tier:
        kept = await served(tier)
        assert tier.counters.outgrown == 60 - len(kept)
        assert (tmp_path / "slab").stat().st_size < CAPACITY


async def test_a_larger_capacity_keeps_all_and_has_more_room(tmp_path: Path) -> None:
    async with disk_tier(tmp_path) as tier:
        await put(tier, *range(10))
    async with disk_tier(tmp_path, 2 * CAPACITY) as tier:
        await put(tier, *range(10, 30))
        assert await served(tier) == list(range(30))


async def test_an_index_that_has_become_sparse_is_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore.tiers.disk_open._VACANT_MAX", 4)
    async with disk_tier(tmp_path) as tier:
        places = await put(tier, *range(20), size_bytes=100)
        for number in range(18):
            await tier.remove(shard_of(number, 100), places[number])
    async with disk_tier(tmp_path) as tier:
        assert (tmp_path / "index").stat().st_size == 2 * RECORD_BYTES
        assert await served(tier) == [18, 19]
        await put(tier, 20)
    async with disk_tier(tmp_path) as tier:
        assert await served(tier) == [18, 19, 20]


@pytest.mark.parametrize("capacity_bytes", [DISK_SIZE_MIN_BYTES - 1, 2**50, 0])
async def test_a_capacity_out_of_bounds_is_refused(tmp_path: Path, capacity_bytes: int) -> None:
    with pytest.raises(ConfigError, match=r"tiers\.disk\.capacity"):
        await open_disk_tier(tmp_path, capacity_bytes=capacity_bytes)


async def test_a_disk_smaller_than_the_capacity_is_refused_with_both_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore.tiers.disk_volume.room_bytes", lambda _: 3 * MIB)
    with pytest.raises(ConfigError, match=r"tiers\.disk\.capacity needs .* 3\.00 MiB more"):
        await open_disk_tier(tmp_path, capacity_bytes=64 * MIB)
    assert blocks_held(tmp_path) < MIB


# --- removal and reading at the same time ------------------------------------------------------


async def test_room_that_is_read_is_not_given_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, go_on = threading.Event(), threading.Event()
    read = Volume.read

    def wait_first(self: Volume, views: list[memoryview], offset: int) -> bool:
        entered.set()
        assert go_on.wait(30)
        return read(self, views, offset)

    async with disk_tier(tmp_path, DISK_SIZE_MIN_BYTES) as tier:
        size_bytes = 900 * KIB
        (place,) = await put(tier, 1, size_bytes=size_bytes)
        monkeypatch.setattr(Volume, "read", wait_first)
        reading = asyncio.create_task(get(tier, shard_of(1, size_bytes), place))
        assert await asyncio.to_thread(entered.wait, 30)
        assert await tier.remove(shard_of(1, size_bytes), place)
        source = memoryview(payload_of(2, size_bytes))
        assert await tier.write(shard_of(2, size_bytes), source) is None
        go_on.set()
        assert await reading == payload_of(1, size_bytes)
        await put(tier, 2, size_bytes=size_bytes)


# --- cancellation --------------------------------------------------------------------------


class Pause:
    """Stops threads of one call of *Volume* until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.entered, self.released = threading.Event(), threading.Event()
        real = getattr(Volume, name)

        def paused(*arguments: object) -> object:
            self.entered.set()
            assert self.released.wait(30)
            return real(*arguments)

        monkeypatch.setattr(Volume, name, paused)

    async def cancel(self, task: asyncio.Task[object]) -> None:
        """Cancel *task*, twice, inside the call; it ends only when the call does."""
        assert await asyncio.to_thread(self.entered.wait, 30)
        for _ in range(2):
            task.cancel()
            await asyncio.wait({task}, timeout=0.01)
            assert not task.done()
        self.released.set()
        with pytest.raises(asyncio.CancelledError):
            await task


@pytest.mark.parametrize("call", ["write", "write_record"])
async def test_a_write_that_is_cancelled_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    size_bytes = 3 * DISK_PART_SIZE_BYTES
    async with disk_tier(tmp_path, 32 * MIB) as tier:
        with monkeypatch.context() as patch:
            pause = Pause(patch, call)
            writing = tier.write(shard_of(1, size_bytes), memoryview(payload_of(1, size_bytes)))
            await pause.cancel(asyncio.ensure_future(writing))
        assert tier.usage().used_bytes == 0
        assert recovered(tier) == []
        await put(tier, 1, size_bytes=size_bytes)
    async with disk_tier(tmp_path, 32 * MIB) as tier:
        assert await served(tier) == [1]


async def test_a_read_that_is_cancelled_ends_when_nothing_touches_its_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with disk_tier(tmp_path) as tier:
        (place,) = await put(tier, 1)
        with monkeypatch.context() as patch:
            pause = Pause(patch, "read")
            await pause.cancel(asyncio.ensure_future(get(tier, shard_of(1), place)))
        assert await get(tier, shard_of(1), place) == payload_of(1)
        assert tier.counters.quarantined == 0


async def test_a_removal_that_is_cancelled_is_done_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with disk_tier(tmp_path) as tier:
        (place,) = await put(tier, 1)
        with monkeypatch.context() as patch:
            pause = Pause(patch, "write_record")
            await pause.cancel(asyncio.ensure_future(tier.remove(shard_of(1), place)))
        assert not await tier.remove(shard_of(1), place)
        assert tier.usage().used_bytes == 0


async def test_a_replacement_that_is_cancelled_at_its_end_leaves_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with disk_tier(tmp_path) as tier:
        await put(tier, 1)
        tier_withdraw = tier._withdraw
        reached = asyncio.Event()

        async def slow(slot: int, fingerprint: int, *, forced: bool = False) -> bool:
            if not reached.is_set():
                reached.set()
                try:
                    await asyncio.Event().wait()
                finally:
                    await tier_withdraw(slot, fingerprint, forced=forced)
            return await tier_withdraw(slot, fingerprint, forced=forced)

        monkeypatch.setattr(tier, "_withdraw", slow)
        writing = asyncio.create_task(put(tier, 1))
        await reached.wait()
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
        assert recovered(tier) == []
        assert tier.usage().used_bytes == 0


async def test_closing_does_not_wait_for_ever_for_a_disk_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore.tiers.disk.DISK_CLOSE_TIMEOUT_SECONDS", 0)
    tier = await open_disk_tier(tmp_path, capacity_bytes=CAPACITY)
    (place,) = await put(tier, 1)
    with monkeypatch.context() as patch:
        pause = Pause(patch, "read")
        reading = asyncio.create_task(get(tier, shard_of(1), place))
        assert await asyncio.to_thread(pause.entered.wait, 30)
        tier.close()
        # Its files are open, and the directory is locked, for as long as a thread uses them.
        with pytest.raises(ConfigError, match="in use"):
            await open_disk_tier(tmp_path, capacity_bytes=CAPACITY)
        pause.released.set()
        assert await reading == payload_of(1)
    tier._volume.close()
    tier._directory.close()


async def test_a_closed_tier_says_so(tmp_path: Path) -> None:
    tier = await open_disk_tier(tmp_path, capacity_bytes=CAPACITY)
    (place,) = await put(tier, 1)
    tier.close()
    tier.close()
    with pytest.raises(TierError, match="closed"):
        await get(tier, shard_of(1), place)
    with pytest.raises(TierError, match="closed"):
        await put(tier, 2)

"""The disk tier when its files are damaged, its disk fails, or its directory is not its own:
misses, `TierError` and `ConfigError`, never wrong bytes and never room that is lost."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvstore.errors import ConfigError, TierError
from kvstore.hashing import block_count
from kvstore.limits import NAMESPACES_MAX
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.disk_directory import MARKER_NAME
from kvstore.tiers.disk_layout import RECORD_BYTES, footprint, header_size
from kvstore.tiers.disk_open import open_disk_tier
from kvstore.tiers.disk_volume import Volume
from kvstore.types import NamespaceId
from tests.support.disks import (
    CAPACITY,
    NAMESPACE,
    SIZE,
    disk_tier,
    flip,
    get,
    overwrite,
    payload_of,
    peek,
    put,
    recovered,
    served,
    shard_of,
)

HEADER = header_size(SIZE)
TABLE_END = 256 + 8 * block_count(SIZE)


def offset_of(tier: DiskTier, number: int) -> int:
    """Return where the extent of a shard starts."""
    place = next(place for shard, place in recovered(tier) if shard == shard_of(number))
    room = tier._slots.find(place)
    assert room is not None
    return room.offset


# --- damaged bytes -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "at",
    [0, 8, 12, 16, 40, 64, 96, 100, 104, 112, 248, 256, TABLE_END - 1, HEADER, HEADER + SIZE - 1],
)
async def test_a_flipped_bit_is_a_miss_counted_and_its_room_free(tmp_path: Path, at: int) -> None:
    async with disk_tier(tmp_path) as tier:
        first, second = await put(tier, 1, 2)
        flip(tmp_path / "slab", offset_of(tier, 1) + at, at % 8)
        assert await get(tier, shard_of(1), first) is None
        assert tier.counters.quarantined == 1
        assert not await tier.remove(shard_of(1), first)
        assert tier.usage().used_bytes == footprint(SIZE)
        assert await get(tier, shard_of(2), second) == payload_of(2)
    async with disk_tier(tmp_path) as tier:
        assert await served(tier) == [2]


async def test_damage_that_happened_between_two_runs_is_found_by_the_first_read(
    tmp_path: Path,
) -> None:
    async with disk_tier(tmp_path) as tier:
        await put(tier, 1, 2)
        at = offset_of(tier, 2) + HEADER + 70_000
    flip(tmp_path / "slab", at)
    async with disk_tier(tmp_path) as tier:
        assert len(recovered(tier)) == 2
        assert await served(tier) == [1]
        assert tier.counters.quarantined == 1


async def test_swapped_extents_are_served_as_neither(tmp_path: Path) -> None:
    async with disk_tier(tmp_path) as tier:
        places = await put(tier, 1, 2)
        offsets = [offset_of(tier, number) for number in (1, 2)]
        extents = [peek(tmp_path / "slab", offset, footprint(SIZE)) for offset in offsets]
        overwrite(tmp_path / "slab", offsets[0], extents[1])
        overwrite(tmp_path / "slab", offsets[1], extents[0])
        assert [await get(tier, shard_of(n), places[n - 1]) for n in (1, 2)] == [None, None]
        assert tier.counters.quarantined == 2


async def test_swapped_payloads_are_served_as_neither(tmp_path: Path) -> None:
    async with disk_tier(tmp_path) as tier:
        places = await put(tier, 1, 2)
        offsets = [offset_of(tier, number) + HEADER for number in (1, 2)]
        payloads = [peek(tmp_path / "slab", offset, SIZE) for offset in offsets]
        overwrite(tmp_path / "slab", offsets[0], payloads[1])
        overwrite(tmp_path / "slab", offsets[1], payloads[0])
        assert [await get(tier, shard_of(n), places[n - 1]) for n in (1, 2)] == [None, None]


@pytest.mark.parametrize("at", range(0, RECORD_BYTES, 7))
async def test_a_damaged_record_is_left_out_and_its_room_free(tmp_path: Path, at: int) -> None:
    async with disk_tier(tmp_path) as tier:
        await put(tier, 1, 2, 3)
    flip(tmp_path / "index", RECORD_BYTES + at, at % 8)
    async with disk_tier(tmp_path) as tier:
        assert await served(tier) == [1, 3]
        assert tier.counters.quarantined == 1
        assert tier.usage().used_bytes == 2 * footprint(SIZE)
        await put(tier, 4)
    async with disk_tier(tmp_path) as tier:
        assert await served(tier) == [1, 3, 4]
        assert tier.counters.quarantined == 0


@pytest.mark.parametrize("cut", [1, 64, RECORD_BYTES - 1])
async def test_a_torn_end_of_the_index_is_left_out(tmp_path: Path, cut: int) -> None:
    async with disk_tier(tmp_path) as tier:
        await put(tier, 1, 2, 3)
    os.truncate(tmp_path / "index", 3 * RECORD_BYTES - cut)
    async with disk_tier(tmp_path) as tier:
        assert await served(tier) == [1, 2]
        assert tier.counters.quarantined == 1
    assert (tmp_path / "index").stat().st_size == 2 * RECORD_BYTES


async def test_a_truncated_slab_keeps_what_is_left(tmp_path: Path) -> None:
    async with disk_tier(tmp_path) as tier:
        await put(tier, 1, 2, 3)
        end = offset_of(tier, 3)
    os.truncate(tmp_path / "slab", end + footprint(SIZE) - 1)
    async with disk_tier(tmp_path) as tier:
        assert await served(tier) == [1, 2]
        assert tier.counters.quarantined == 1


async def test_a_slab_that_is_truncated_while_in_use_is_a_miss(tmp_path: Path) -> None:
    async with disk_tier(tmp_path) as tier:
        (place,) = await put(tier, 1)
        os.truncate(tmp_path / "slab", 0)
        assert await get(tier, shard_of(1), place) is None
        assert tier.counters.quarantined == 1


@pytest.mark.parametrize("name", ["slab", "index"])
async def test_without_one_of_its_files_a_tier_starts_empty(tmp_path: Path, name: str) -> None:
    async with disk_tier(tmp_path) as tier:
        await put(tier, 1, 2)
    (tmp_path / name).unlink()
    async with disk_tier(tmp_path) as tier:
        assert recovered(tier) == []
        await put(tier, 1)


async def test_of_records_with_the_same_pages_or_key_the_last_counts(tmp_path: Path) -> None:
    async with disk_tier(tmp_path) as tier:
        old, other = await put(tier, 1, 2)
        records = peek(tmp_path / "index", 0, 2 * RECORD_BYTES)
        await tier.remove(shard_of(1), old)
        await tier.remove(shard_of(2), other)
        await put(tier, 3)
        await put(tier, 2)
    # As after a loss of power: removals never reached the medium, what came later did.
    overwrite(tmp_path / "index", 2 * RECORD_BYTES, records)
    async with disk_tier(tmp_path) as tier:
        assert await served(tier) == [3, 2]
        assert tier.counters.superseded == 2


async def test_noise_for_an_index_is_an_empty_tier(tmp_path: Path) -> None:
    async with disk_tier(tmp_path) as tier:
        await put(tier, 1)
    (tmp_path / "index").write_bytes(os.urandom(100 * RECORD_BYTES))
    async with disk_tier(tmp_path) as tier:
        assert recovered(tier) == []
        assert tier.counters.quarantined == 100
        assert tier.usage().used_bytes == 0


async def test_bytes_that_are_not_those_of_their_root_are_not_kept(tmp_path: Path) -> None:
    async with disk_tier(tmp_path) as tier:
        with pytest.raises(TierError, match="root"):
            await tier.write(shard_of(1), memoryview(payload_of(2)))
        assert tier.usage().used_bytes == 0
        assert recovered(tier) == []


async def test_a_damaged_manifest_is_left_out_until_it_comes_again(tmp_path: Path) -> None:
    async with disk_tier(tmp_path) as tier:
        await tier.introduce(NAMESPACE, b"manifest")
    flip(tmp_path / "manifests" / NAMESPACE.hex(), 9)
    (tmp_path / "manifests" / "odd.new").write_bytes(b"cut short")
    async with disk_tier(tmp_path) as tier:
        assert tier.manifests() == {}
        await tier.introduce(NAMESPACE, b"manifest")
        assert tier.manifests() == {NAMESPACE: b"manifest"}
    assert [path.name for path in (tmp_path / "manifests").iterdir()] == [NAMESPACE.hex()]


async def test_manifests_that_nothing_needs_go_when_there_are_too_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert NAMESPACES_MAX > 3
    monkeypatch.setattr("kvstore.tiers.disk_directory.NAMESPACES_MAX", 3)
    async with disk_tier(tmp_path) as tier:
        for number in range(3):
            await tier.introduce(NamespaceId(bytes([number]) * 16), b"manifest")
        await tier.introduce(NAMESPACE, b"manifest")
        await put(tier, 1)
    async with disk_tier(tmp_path) as tier:
        assert list(tier.manifests()) == [NAMESPACE]


# --- a disk that fails -----------------------------------------------------------------------


def failing(code: int) -> Callable[..., object]:
    def fail(*_: object) -> object:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("call", ["write", "write_record"])
async def test_a_write_that_fails_keeps_nothing_and_leaks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    async with disk_tier(tmp_path) as tier:
        await put(tier, 1)
        with monkeypatch.context() as patch:
            patch.setattr(Volume, call, failing(code))
            with pytest.raises(TierError, match=os.strerror(code)):
                await put(tier, 2)
        assert tier.usage().used_bytes == footprint(SIZE)
        assert tier.counters.io_errors >= 1
        assert (tier.counters.no_space > 0) == (code in (errno.ENOSPC, errno.EDQUOT))
        await put(tier, 2)
        assert await served(tier) == [1, 2]


async def test_every_write_to_the_disk_may_fail_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run the same scenario with the n-th call failing, until none fails any more."""
    real = {name: getattr(Volume, name) for name in ("write", "write_record", "read")}
    calls = failures = 0

    def counted(name: str) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            nonlocal calls, failures
            calls += 1
            if calls == failing_call:
                failures += 1
                raise OSError(errno.EIO, "failing in turn")
            return real[name](*arguments)

        return call

    for name in real:
        monkeypatch.setattr(Volume, name, counted(name))
    for failing_call in range(1, 100):
        calls, before = 0, failures
        async with disk_tier(tmp_path / str(failing_call)) as tier:
            for number in (1, 2, 1, 3):
                try:
                    (place,) = await put(tier, number)
                    found = await get(tier, shard_of(number), place)
                    assert found == payload_of(number)
                    if number == 2:
                        assert await tier.remove(shard_of(number), place)
                except TierError:
                    continue
            tier.check()
        if failures == before:
            break
    assert failures > 10
    assert failing_call == failures + 1


async def test_a_read_that_fails_says_so_and_what_is_kept_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with disk_tier(tmp_path) as tier:
        (place,) = await put(tier, 1)
        with monkeypatch.context() as patch:
            patch.setattr(Volume, "read", failing(errno.EIO))
            with pytest.raises(TierError, match="Input/output error"):
                await get(tier, shard_of(1), place)
        assert await get(tier, shard_of(1), place) == payload_of(1)
        assert tier.counters.quarantined == 0


async def test_a_removal_that_fails_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with disk_tier(tmp_path) as tier:
        (place,) = await put(tier, 1)
        with monkeypatch.context() as patch:
            patch.setattr(Volume, "write_record", failing(errno.EROFS))
            with pytest.raises(TierError, match="Read-only"):
                await tier.remove(shard_of(1), place)
        assert await get(tier, shard_of(1), place) == payload_of(1)
        assert await tier.remove(shard_of(1), place)


async def test_a_probe_says_whether_the_disk_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with disk_tier(tmp_path) as tier:
        await tier.probe()
        with monkeypatch.context() as patch:
            patch.setattr("kvstore.tiers.disk_directory.os.fdatasync", failing(errno.EROFS))
            with pytest.raises(TierError, match="Read-only"):
                await tier.probe()


async def test_a_disk_that_is_really_full_is_an_error_that_passes(tmp_path: Path) -> None:
    async with disk_tier(tmp_path) as tier:
        (place,) = await put(tier, 1)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        # Python ignores the signal, so that what lies beyond fails with EFBIG.
        resource.setrlimit(resource.RLIMIT_FSIZE, (footprint(SIZE), hard))
        try:
            with pytest.raises(TierError, match="File too large"):
                await put(tier, 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert tier.counters.no_space == 1
        assert await get(tier, shard_of(1), place) == payload_of(1)
        await put(tier, 2)


# --- a directory that is not ours --------------------------------------------------------------


def listing(path: Path) -> dict[str, bytes]:
    return {str(found): found.read_bytes() for found in path.rglob("*") if found.is_file()}


async def refused(path: Path, match: str) -> None:
    before = listing(path)
    with pytest.raises(ConfigError, match=match):
        await open_disk_tier(path, capacity_bytes=CAPACITY)
    assert listing(path) == before


async def test_a_directory_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    await refused(tmp_path, r"not a disk tier \(thesis.tex lies there\)")


@pytest.mark.parametrize("text", ["", "noise", "{}", '{"kind": "other", "format": 1, "seed": 1}'])
async def test_a_marker_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / MARKER_NAME).write_text(text)
    await refused(tmp_path, "not a disk tier")


async def test_a_newer_format_is_refused_by_number_and_left_alone(tmp_path: Path) -> None:
    async with disk_tier(tmp_path) as tier:
        await put(tier, 1)
    marker = json.loads((tmp_path / MARKER_NAME).read_text())
    newer = json.dumps({**marker, "format": 2, "added": ["later"]})
    (tmp_path / MARKER_NAME).write_text(newer)
    await refused(tmp_path, "has format 2, this kvstore knows 1")
    (tmp_path / MARKER_NAME).write_text(json.dumps(marker))
    async with disk_tier(tmp_path) as tier:
        assert await served(tier) == [1]


async def test_a_second_daemon_is_refused_by_the_first_ones_pid(tmp_path: Path) -> None:
    async with disk_tier(tmp_path) as tier:
        await put(tier, 1)
        with pytest.raises(ConfigError, match=rf"in use by another daemon \(pid {os.getpid()}\)"):
            await open_disk_tier(tmp_path, capacity_bytes=CAPACITY)
        assert await served(tier) == [1]


async def test_a_start_that_was_cut_short_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("1\n")
    (tmp_path / (MARKER_NAME + ".new")).write_text("{")
    (tmp_path / "lost+found").mkdir()
    async with disk_tier(tmp_path) as tier:
        await put(tier, 1)


async def test_a_path_that_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be used: File exists"):
        await open_disk_tier(tmp_path / "file", capacity_bytes=CAPACITY)


@pytest.mark.skipif(
    os.geteuid() == 0 and shutil.which("setpriv") is None, reason="root may write anywhere"
)
def test_a_directory_that_may_not_be_written_is_refused(tmp_path: Path) -> None:
    code = f"""
import asyncio
from pathlib import Path
from kvstore.errors import ConfigError
from kvstore.tiers.disk_open import open_disk_tier
try:
    asyncio.run(open_disk_tier(Path({str(tmp_path)!r}), capacity_bytes={CAPACITY}))
except ConfigError as error:
    print(error)
"""
    tmp_path.chmod(0o555)
    # Without its capabilities root is bound by permissions, too.
    bound = ["setpriv", "--bounding-set=-all"] if os.geteuid() == 0 else []
    found = subprocess.run(
        [*bound, sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    tmp_path.chmod(0o755)
    assert "cannot be used: Permission denied" in found.stdout
    assert list(tmp_path.iterdir()) == []

"""An arena that outlives its daemon: taken over or made anew, and never shared by two."""

from __future__ import annotations

import gc
import os
import shutil
import sys
from pathlib import Path

import pytest

from kvstore.errors import ConfigError
from kvstore.limits import MIB
from kvstore.tiers import kept as kept_module
from kvstore.tiers.host import HostTier, make_memory
from kvstore.tiers.kept import KeptArena
from kvstore.tiers.record_layout import FORMAT
from kvstore.transfer.arena import Arena, ArenaMapping
from tests.support.records import NAMESPACE, OWNER, kept, make_shard, page

SIZE = 2 * MIB


@pytest.fixture
def path(tmp_path):
    return tmp_path / "kvstore" / "arena"


@pytest.fixture
def records_path(path):
    return path.with_name("arena.records")


@pytest.fixture
def left(path):
    """Leave an arena with one published shard, as a daemon does that has ended."""
    arena = KeptArena(path, SIZE)
    arena.arena.view[4096:4100] = b"kept"
    arena.records.introduce(NAMESPACE, b"introduction")
    arena.records.publish(page(1), make_shard(1))
    arena.close()
    return path


def cold_reason(path, size_bytes=SIZE, **options) -> str:
    """Open what lies at *path*, which must be empty then, and return why."""
    arena = KeptArena(path, size_bytes, **options)
    assert bytes(arena.arena.view[4096:4100]) == bytes(4)
    assert kept(arena.records) == arena.records.namespaces() == {}
    arena.close()
    return arena.cold


def test_the_first_one_is_made_with_its_directory_for_this_user_alone(path, records_path):
    arena = KeptArena(path, SIZE)
    assert arena.cold == ""
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o777 == records_path.stat().st_mode & 0o777 == 0o600
    assert path.stat().st_size == arena.arena.size_bytes == SIZE
    assert arena.arena.kind == "file"
    # Records are written without asking for memory that may be gone.
    found = records_path.stat()
    assert found.st_blocks * 512 >= found.st_size
    arena.close()


def test_the_next_one_finds_bytes_and_records(left):
    arena = KeptArena(left, SIZE)
    assert arena.cold == ""
    assert bytes(arena.arena.view[4096:4100]) == b"kept"
    assert kept(arena.records) == {page(1): make_shard(1)}
    arena.close()
    arena.close()


def test_two_never_have_one_arena(path):
    first = KeptArena(path, SIZE)
    with pytest.raises(ConfigError, match=f"{path}.records is in use by another daemon"):
        KeptArena(path, SIZE)
    first.close()
    KeptArena(path, SIZE).close()


def test_a_client_that_has_the_arena_mapped_keeps_nobody_from_claiming_it(path):
    first = KeptArena(path, SIZE)
    client = ArenaMapping.open(os.dup(first.arena.fd))
    first.close()
    second = KeptArena(path, SIZE)
    assert second.cold == ""
    assert client.size_bytes == SIZE
    second.close()


def test_a_client_of_an_arena_that_was_made_anew_writes_to_the_old_one(left):
    first = KeptArena(left, SIZE)
    client = ArenaMapping.open(os.dup(first.arena.fd))
    first.close()
    second = KeptArena(left, 2 * SIZE)
    client.view[:SIZE] = b"\xff" * SIZE
    assert not any(second.arena.view)
    second.close()


# --- what starts cold ------------------------------------------------------------------------


def test_another_capacity_starts_cold_with_both_numbers(left):
    assert cold_reason(left, SIZE * 2) == (
        f"it has {SIZE} bytes, tiers.host.capacity is {SIZE * 2}"
    )
    assert cold_reason(left, SIZE) == f"it has {SIZE * 2} bytes, tiers.host.capacity is {SIZE}"


def test_an_arena_that_was_cut_off_starts_cold(left):
    os.truncate(left, 4096)
    assert cold_reason(left) == f"it has 4096 bytes, tiers.host.capacity is {SIZE}"


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_records_that_were_cut_off_start_cold(left, records_path, size):
    os.truncate(records_path, size)
    assert cold_reason(left) in {
        "there are no records of it",
        "the header of its records is damaged",
    }


def test_an_arena_without_its_records_starts_cold(left, records_path):
    records_path.unlink()
    assert cold_reason(left) == "there are no records of it"


def test_records_without_their_arena_are_not_used(left, records_path):
    left.unlink()
    arena = KeptArena(left, SIZE)
    assert kept(arena.records) == {}
    assert arena.cold == ""
    arena.close()


def test_a_header_of_noise_starts_cold(left, records_path):
    with records_path.open("r+b") as file:
        file.write(b"\xa5" * 4096)
    assert cold_reason(left) == "there are no records of it"


def test_a_header_that_is_damaged_starts_cold(left, records_path):
    with records_path.open("r+b") as file:
        file.seek(20)
        file.write(b"\xa5")
    assert cold_reason(left) == "the header of its records is damaged"


def test_another_format_starts_cold_and_is_named(left, records_path):
    with records_path.open("r+b") as file:
        file.seek(8)
        file.write((FORMAT + 1).to_bytes(4, "little"))
    assert cold_reason(left) == (
        f"its records have format {FORMAT + 1}, this version reads format {FORMAT}"
    )


def test_an_arena_that_was_copied_from_elsewhere_starts_cold(left):
    shutil.copy(left, left.with_name("copy"))
    left.with_name("copy").rename(left)
    assert cold_reason(left) == "its records are those of another file"


def test_after_a_boot_it_starts_cold(left, monkeypatch, tmp_path):
    (tmp_path / "boot_id").write_text("6f1c1f4e-0000-0000-0000-000000000000\n")
    monkeypatch.setattr(kept_module, "_BOOT_ID", tmp_path / "boot_id")
    assert cold_reason(left) == "the machine has been started again since"


def test_where_the_kernel_names_no_boot_every_one_is_the_same(path, monkeypatch, tmp_path):
    monkeypatch.setattr(kept_module, "_BOOT_ID", tmp_path / "absent")
    first = KeptArena(path, SIZE)
    first.records.introduce(NAMESPACE, b"introduction")
    first.close()
    second = KeptArena(path, SIZE)
    assert second.records.namespaces()
    second.close()


def test_without_checksums_it_starts_cold_and_leaves_nothing(left, records_path):
    reason = cold_reason(left, checksums=False)
    assert reason == "tiers.host.checksum is off, so that nothing in it could be verified"
    assert not left.exists()
    assert not records_path.exists()


def test_what_starts_cold_is_warm_the_next_time(left):
    os.truncate(left, 4096)
    arena = KeptArena(left, SIZE)
    arena.records.introduce(NAMESPACE, b"introduction")
    arena.records.publish(page(2), make_shard(2))
    arena.close()
    again = KeptArena(left, SIZE)
    assert again.cold == ""
    assert kept(again.records) == {page(2): make_shard(2)}
    again.close()


# --- what is refused --------------------------------------------------------------------------


def open_fds() -> set[Path]:
    gc.collect()  # what other tests have left is closed at any time
    return set(Path("/proc/self/fd").iterdir())


def test_a_file_that_is_not_ours_is_refused_and_left(path):
    path.parent.mkdir()
    path.write_bytes(b"precious")
    path.chmod(0o644)
    before = open_fds()
    with pytest.raises(ConfigError, match=f"{path} has mode 0644"):
        KeptArena(path, SIZE)
    assert path.read_bytes() == b"precious"
    assert list(path.parent.iterdir()) == [path]
    assert open_fds() <= before


def test_an_arena_below_the_minimum_is_refused(path):
    with pytest.raises(ConfigError, match="4096 bytes; at least"):
        KeptArena(path, 4096)


def test_what_cannot_be_held_is_refused_and_leaves_nothing_claimed(left):
    before = open_fds()
    with pytest.raises(ConfigError, match="has room for"):
        KeptArena(left, 2**50)
    assert open_fds() <= before
    # And what was kept is kept.
    arena = KeptArena(left, SIZE)
    assert kept(arena.records) == {page(1): make_shard(1)}
    arena.close()


def test_an_arena_whose_records_have_no_room_is_not_left_behind(path, monkeypatch):
    def refuse(*_: object) -> None:
        raise ConfigError("no room")

    before = open_fds()
    monkeypatch.setattr(kept_module, "resize", refuse)
    with pytest.raises(ConfigError, match="no room"):
        KeptArena(path, SIZE)
    assert not path.exists()
    assert open_fds() <= before


def test_an_arena_that_cannot_be_mapped_is_refused_and_closed(left, monkeypatch):
    def refuse(*_: object) -> None:
        raise ConfigError("cannot be mapped")

    before = open_fds()
    monkeypatch.setattr(Arena, "of_file", refuse)
    with pytest.raises(ConfigError, match="cannot be mapped"):
        KeptArena(left, SIZE)
    assert open_fds() <= before


def test_a_memfd_and_a_path_are_told_apart(path):
    memfd = make_memory("memfd", SIZE, huge_pages=False, checksums=True)
    kept_arena = make_memory(str(path), SIZE, huge_pages=False, checksums=True)
    assert isinstance(memfd, Arena)
    assert isinstance(kept_arena, KeptArena)
    assert HostTier(memfd).records is None
    assert HostTier(kept_arena).records is kept_arena.records
    assert HostTier(kept_arena, checksums=False).records is None
    memfd.close()
    kept_arena.close()


def test_a_tier_that_is_closed_keeps_its_arena_and_gives_it_up(path):
    HostTier(KeptArena(path, SIZE)).close()
    assert path.exists()
    KeptArena(path, SIZE).close()


# --- a kill between any two lines --------------------------------------------------------------


def snapshots_of(tier: HostTier, act) -> list[bytes]:
    """Return what the records' memory holds after every line that *act* runs in the tiers."""
    table = tier._memory._map
    seen: list[bytes] = []

    def trace(frame, event, _):
        if "kvstore/tiers" not in frame.f_code.co_filename:
            return None
        now = table[:]
        if not seen or now != seen[-1]:
            seen.append(now)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    finally:
        sys.settrace(before)
    seen.append(table[:])
    return seen


def test_after_every_line_an_extent_is_what_it_was_or_what_it_becomes(path):
    tier = HostTier(KeptArena(path, SIZE))
    extent = tier.allocate(5000)
    shard = make_shard(1, size_bytes=5000)
    steps = [
        ({}, lambda: tier.fill(extent, OWNER), {extent: OWNER}),
        ({extent: OWNER}, lambda: tier.publish(extent, shard, lambda: b"in"), {extent: shard}),
        ({extent: shard}, lambda: tier.free(extent), {}),
        ({}, lambda: tier.publish(extent, shard, lambda: b"in"), {extent: shard}),
    ]
    memory = tier._memory
    for before, act, after in steps:
        seen = snapshots_of(tier, act)
        assert len(seen) > 1
        for snapshot in seen:
            memory._map[:] = snapshot
            found = kept(memory.records)
            # Or none: what was being noted is void, and nobody was told of it yet.
            assert found in (before, after, {})
            assert shard not in found.values() or memory.records.namespaces() == {NAMESPACE: b"in"}
    tier.close()

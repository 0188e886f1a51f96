"""The arena: sealed, bounded by what the machine has, and the same memory for everyone."""

from __future__ import annotations

import errno
import gc
import mmap
import os
from pathlib import Path

import pytest

from kvstore.errors import ConfigError, UnavailableError
from kvstore.limits import ARENA_SIZE_MIN_BYTES, MIB, PREFAULT_STEP_BYTES
from kvstore.transfer import arena as arena_module
from kvstore.transfer.arena import Arena, ArenaMapping, memory_limit_bytes
from tests.support.waiting import wait_until


@pytest.fixture
def arena():
    made = Arena.create(2 * MIB)
    yield made
    made.close()


@pytest.mark.parametrize("size", [MIB, 3 * MIB])
def test_a_memfd_arena_can_neither_shrink_nor_grow(arena, size):
    with pytest.raises(OSError) as failure:  # noqa: PT011  # the errno is checked
        os.ftruncate(arena.fd, size)
    assert failure.value.errno == errno.EPERM


def test_a_client_sees_what_the_daemon_writes_and_the_other_way_round(arena):
    client = ArenaMapping.open(os.dup(arena.fd))
    arena.view[5:8] = b"abc"
    client.view[8:10] = b"de"
    assert bytes(client.view[5:10]) == bytes(arena.view[5:10]) == b"abcde"
    assert client.size_bytes == arena.size_bytes


def test_an_arena_below_the_minimum_is_refused_with_both_numbers():
    with pytest.raises(ConfigError, match=f"{MIB - 4096} bytes; at least {ARENA_SIZE_MIN_BYTES}"):
        Arena.create(MIB - 4096)


def test_an_arena_larger_than_memory_is_refused_with_both_numbers():
    size, memory = 2**50, memory_limit_bytes()
    with pytest.raises(ConfigError, match=f"{size} bytes, memory has {memory} bytes"):
        Arena.create(size)


def test_prefaulting_backs_the_whole_arena_in_steps():
    arena = Arena.create(PREFAULT_STEP_BYTES + MIB)
    assert arena.prefault_step()
    assert arena.prefaulted_bytes == PREFAULT_STEP_BYTES
    assert not arena.prefault_step()
    assert arena.prefaulted_bytes == arena.size_bytes
    assert not arena.prefault_step()
    assert os.fstat(arena.fd).st_blocks * 512 == arena.size_bytes
    arena.close()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.ENOMEM])
def test_prefaulting_stops_quietly_when_memory_runs_out(arena, monkeypatch, code):
    def refuse(*_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    assert not arena.prefault_step()
    assert arena.prefaulted_bytes == 0


def test_prefaulting_reports_what_it_does_not_expect(arena, monkeypatch):
    def refuse(*_: int) -> None:
        raise OSError(errno.EBADF, "bad")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(OSError, match="bad"):
        arena.prefault_step()


def test_mapping_in_reaches_every_page_and_is_done_once(arena):
    arena.map_in()
    arena.map_in()
    wait_until(lambda: os.fstat(arena.fd).st_blocks * 512 == arena.size_bytes)


def test_an_arena_can_be_closed_while_it_is_being_mapped_in():
    arena = Arena.create(256 * MIB)
    arena.map_in()
    arena.close()


def test_closing_twice_is_closing_once():
    arena = Arena.create(MIB)
    fd = arena.fd
    arena.close()
    innocent = os.open(os.devnull, os.O_RDONLY)
    assert innocent == fd, "the descriptor's number is in use again"
    arena.close()
    os.fstat(innocent)
    os.close(innocent)


def test_views_that_are_still_out_keep_the_memory_after_closing(arena):
    client = ArenaMapping.open(os.dup(arena.fd))
    part = client.view[:4]
    arena.view[:4] = b"kept"
    assert bytes(part) == b"kept"


def test_the_memory_limit_is_that_of_the_machine_or_of_its_cgroup():
    total = os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE
    assert MIB < memory_limit_bytes() <= total


def test_reserved_huge_pages_are_none_where_the_kernel_has_none(monkeypatch, tmp_path):
    monkeypatch.setattr(arena_module, "_HUGETLB_FREE", tmp_path / "absent")
    monkeypatch.setattr(arena_module, "_THP_SHMEM", tmp_path / "absent")
    arena = Arena.create(2 * MIB)
    assert not arena.huge_pages
    arena.close()


@pytest.mark.parametrize(
    ("setting", "granted"),
    [("always [advise] never", True), ("always advise [never]", False)],
)
def test_transparent_huge_pages_are_asked_for_where_they_are_granted_on_request(
    monkeypatch, tmp_path, setting, granted
):
    (tmp_path / "shmem_enabled").write_text(setting)
    monkeypatch.setattr(arena_module, "_THP_SHMEM", tmp_path / "shmem_enabled")
    arena = Arena.create(2 * MIB)
    assert arena.huge_pages is granted
    arena.close()


def test_what_cannot_be_mapped_is_unavailable_and_its_descriptor_is_closed():
    reading, writing = os.pipe()
    with pytest.raises(UnavailableError, match="cannot be mapped"):
        ArenaMapping.open(reading)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(reading)
    os.close(writing)


def test_an_arena_that_cannot_be_mapped_is_refused_and_leaves_no_descriptor(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    gc.collect()  # what other tests have left is closed at any time
    before = set(Path("/proc/self/fd").iterdir())
    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(ConfigError, match=f"{MIB} bytes, which cannot be mapped: Cannot allocate"):
        Arena.create(MIB)
    assert set(Path("/proc/self/fd").iterdir()) <= before

"""Files that outlive their daemon: claimed once, ours alone, and nobody else's ever touched."""

from __future__ import annotations

import errno
import os

import pytest

from kvstore.errors import ConfigError
from kvstore.limits import MIB
from kvstore.transfer import private_files
from kvstore.transfer.private_files import (
    check_room,
    claim,
    make_directory,
    open_existing,
    replace,
    resize,
    room_bytes,
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "arena"


@pytest.fixture
def opened():
    """Return a list of descriptors that are closed after the test."""
    fds: list[int] = []
    yield fds
    for fd in fds:
        os.close(fd)


def test_a_file_is_claimed_by_one_at_a_time_and_given_up_by_closing_it(path):
    fd = claim(path)
    with pytest.raises(ConfigError, match=f"{path} is in use by another daemon"):
        claim(path)
    os.close(fd)
    os.close(claim(path))


def test_a_file_that_is_replaced_while_it_is_claimed_is_claimed_anew(path, monkeypatch):
    lock = private_files.fcntl.flock
    replaced = []

    def replace_first(fd: int, operation: int) -> None:
        if not replaced:
            replaced.append(os.fstat(fd).st_ino)
            path.rename(path.with_name("old"))
            path.touch(mode=0o600)
        elif len(replaced) == 1:
            replaced.append(os.fstat(fd).st_ino)
            path.unlink()
        lock(fd, operation)

    monkeypatch.setattr(private_files.fcntl, "flock", replace_first)
    fd = claim(path)
    assert os.path.samestat(os.fstat(fd), path.stat())
    assert len(replaced) == 2
    os.close(fd)


def test_what_is_made_is_private_whatever_the_mask(path, opened):
    before = os.umask(0)
    try:
        opened.append(claim(path))
        opened.append(replace(path.with_name("other"), MIB))
    finally:
        os.umask(before)
    for made in (path, path.with_name("other")):
        assert made.stat().st_mode & 0o777 == 0o600


def test_a_file_that_is_absent_is_none(path):
    assert open_existing(path) is None


def test_a_replaced_file_is_a_fresh_one_and_who_has_the_old_one_keeps_it(path, opened):
    opened.append(replace(path, MIB))
    os.pwrite(opened[0], b"old", 0)
    opened.append(replace(path, 2 * MIB))
    assert os.pread(opened[0], 3, 0) == b"old"
    assert os.pread(opened[1], 3, 0) == bytes(3)
    assert path.stat().st_size == 2 * MIB


@pytest.mark.parametrize("act", [claim, open_existing, lambda path: replace(path, MIB)])
def test_a_link_is_refused_and_left_with_what_it_leads_to(path, act):
    target = path.with_name("target")
    target.write_bytes(b"precious")
    path.symlink_to(target)
    with pytest.raises(ConfigError, match=f"{path} is a link, which is not followed"):
        act(path)
    assert path.is_symlink()
    assert target.read_bytes() == b"precious"


@pytest.mark.parametrize("act", [claim, open_existing, lambda path: replace(path, MIB)])
def test_a_file_that_others_may_open_is_refused_and_left(path, act):
    path.write_bytes(b"precious")
    path.chmod(0o640)
    with pytest.raises(ConfigError, match=f"{path} has mode 0640, ours have 0600; remove it"):
        act(path)
    assert path.read_bytes() == b"precious"


def test_another_users_file_is_refused_and_left(path, monkeypatch):
    path.write_bytes(b"precious")
    path.chmod(0o600)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    message = f"{path} belongs to uid {os.getuid()}, not to {os.getuid() + 1}"
    with pytest.raises(ConfigError, match=message):
        replace(path, MIB)
    assert path.read_bytes() == b"precious"


def test_what_is_no_file_is_refused_without_waiting_for_it(path):
    os.mkfifo(path, 0o600)
    with pytest.raises(ConfigError, match="is not a regular file"):
        open_existing(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(ConfigError, match="cannot be used: Is a directory"):
        open_existing(path)


def test_a_directory_is_made_private_and_one_that_is_there_is_kept(tmp_path):
    make_directory(tmp_path / "new")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    make_directory(tmp_path)
    with pytest.raises(ConfigError, match="missing/deep cannot be used: No such file"):
        make_directory(tmp_path / "missing" / "deep")
    with pytest.raises(ConfigError, match=f"no directory {tmp_path / 'missing'}"):
        claim(tmp_path / "missing" / "arena")


def test_what_the_file_system_cannot_hold_is_refused_with_both_numbers(path):
    path.write_bytes(b"kept")
    path.chmod(0o600)
    size = 2**50
    with pytest.raises(ConfigError, match=rf"{size} bytes, {path.parent} has room for \d+"):
        check_room(path, size)
    check_room(path, 4096)


def test_a_file_makes_room_for_the_one_in_its_place(path, monkeypatch, opened):
    opened.append(replace(path, MIB))
    os.posix_fallocate(opened[0], 0, MIB)
    monkeypatch.setattr(private_files, "room_bytes", lambda _: MIB)
    check_room(path, 2 * MIB)
    with pytest.raises(ConfigError, match=f"has room for {2 * MIB}"):
        check_room(path, 2 * MIB + 4096)


def test_room_is_asked_of_a_file_system_that_is_there(tmp_path):
    with pytest.raises(ConfigError, match="gone cannot be used"):
        room_bytes(tmp_path / "gone")


def test_resizing_leaves_zeros_that_are_backed(path):
    fd = claim(path)
    os.pwrite(fd, b"before", 0)
    resize(fd, path, 10_000)
    assert os.fstat(fd).st_size == 12_288 == os.fstat(fd).st_blocks * 512
    assert os.pread(fd, 6, 0) == bytes(6)
    os.close(fd)


def test_resizing_beyond_what_there_is_leaves_it_empty_and_says_so(path, monkeypatch):
    def refuse(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    fd = claim(path)
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(ConfigError, match=f"{path} needs 4096 bytes: No space left"):
        resize(fd, path, 1)
    assert os.fstat(fd).st_size == 0
    os.close(fd)


def test_a_file_that_cannot_be_made_is_refused_by_name(path, monkeypatch):
    unlink = type(path).unlink

    def refuse(self: object, **_: bool) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(type(path), "unlink", refuse)
    with pytest.raises(ConfigError, match=f"{path} cannot be used: Operation not permitted"):
        replace(path, MIB)
    monkeypatch.setattr(type(path), "unlink", unlink)


# --- huge pages, of which a machine may have none ------------------------------------------


class HugeUsage:
    """What hugetlbfs says of itself when it was mounted without a size."""

    f_bsize = f_frsize = 2 * MIB
    f_blocks = f_bavail = 0


def test_huge_pages_without_a_size_are_those_of_the_pool(tmp_path, monkeypatch):
    pool = tmp_path / "hugepages-2048kB"
    monkeypatch.setattr(os, "statvfs", lambda _: HugeUsage)
    monkeypatch.setattr(private_files, "_POOLS", tmp_path)
    assert room_bytes(tmp_path) == 0
    pool.mkdir()
    (pool / "free_hugepages").write_text("7\n")
    assert room_bytes(tmp_path) == 7 * 2 * MIB


def test_on_huge_pages_arenas_are_whole_and_records_are_rounded_up(path, monkeypatch, opened):
    monkeypatch.setattr(os, "fstatvfs", lambda _: HugeUsage)
    monkeypatch.setattr(os, "statvfs", lambda _: HugeUsage)
    with pytest.raises(ConfigError, match=f"{3 * MIB} bytes, {path.parent} has pages of {2 * MIB}"):
        check_room(path, 3 * MIB)
    opened.append(replace(path, 4 * MIB))
    resize(opened[0], path, 1)
    assert path.stat().st_size == 2 * MIB

"""Files of memory that outlive their daemon: private, never followed, claimed by one at a time.

A file counts as ours when it is a regular file of this user that nobody else may open. What is
not ours is refused by name and left as it is.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path
from typing import Final

from kvstore.errors import ConfigError
from kvstore.limits import EXTENT_ALIGNMENT_BYTES, GIB, MIB

_MODE: Final = 0o600
_DIRECTORY_MODE: Final = 0o700
# O_NONBLOCK: to open a FIFO that lies there must not wait for its writer.
_FLAGS: Final = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_HUGE_PAGES_BYTES: Final = frozenset((2 * MIB, GIB))
_POOLS: Final = Path("/sys/kernel/mm/hugepages")


def claim(path: Path) -> int:
    """Open the file at *path*, made when it is absent, for this process alone.

    Closing the descriptor gives it up, and so does the end of the process. Raises `ConfigError`
    when the path cannot be used, or another daemon has claimed it.
    """
    while True:
        fd = _open(path, os.O_CREAT)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), path.lstat()):
                return fd
        except BlockingIOError:
            os.close(fd)
            raise ConfigError(f"{path} is in use by another daemon") from None
        except FileNotFoundError:
            pass
        # It was replaced between opening and locking: what is locked is not what lies there.
        os.close(fd)


def open_existing(path: Path) -> int | None:
    """Open the file at *path*, or return None when there is none; raises `ConfigError`."""
    try:
        return _open(path, 0)
    except FileNotFoundError:
        return None


def check_room(path: Path, size_bytes: int) -> None:
    """Raise `ConfigError`, with both numbers, unless `replace` can make a file of *size_bytes*."""
    directory = path.parent
    page_bytes = _page_bytes(_usage(directory))
    if size_bytes % page_bytes:
        raise ConfigError(
            f"tiers.host.capacity is {size_bytes} bytes, {directory} has pages of {page_bytes} "
            "and holds whole ones only"
        )
    room = room_bytes(directory) + taken_bytes(path)
    if size_bytes > room:
        raise ConfigError(
            f"tiers.host.capacity is {size_bytes} bytes, {directory} has room for {room}"
        )


def replace(path: Path, size_bytes: int) -> int:
    """Put a fresh file of *size_bytes* zeros at *path*, in place of one of ours.

    Whoever has the old one mapped keeps that. Raises `ConfigError`.
    """
    taken_bytes(path)  # refuses what is not ours
    try:
        path.unlink(missing_ok=True)
        fd = os.open(path, _FLAGS | os.O_CREAT | os.O_EXCL, _MODE)
    except OSError as error:
        raise _unusable(path, error) from error
    os.ftruncate(fd, size_bytes)
    return fd


def resize(fd: int, path: Path, size_bytes: int) -> None:
    """Make the file a whole number of pages of zeros, *size_bytes* at least, backed by memory."""
    page_bytes = _page_bytes(os.fstatvfs(fd))
    size_bytes = -(-size_bytes // page_bytes) * page_bytes
    os.ftruncate(fd, 0)
    try:
        os.ftruncate(fd, size_bytes)
        os.posix_fallocate(fd, 0, size_bytes)
    except OSError as error:
        os.ftruncate(fd, 0)
        raise ConfigError(f"{path} needs {size_bytes} bytes: {error.strerror}") from error


def make_directory(path: Path) -> None:
    """Make the directory *path*, private, unless it is there; raises `ConfigError`."""
    try:
        path.mkdir(mode=_DIRECTORY_MODE, exist_ok=True)
    except OSError as error:
        raise _unusable(path, error) from error


def room_bytes(directory: Path) -> int:
    """Return how much more files below *directory* can hold; raises `ConfigError`."""
    usage = _usage(directory)
    if usage.f_bsize in _HUGE_PAGES_BYTES and not usage.f_blocks:
        # Mounted without a size, hugetlbfs takes from the pool, and does not say how much.
        return _free_pool_bytes(usage.f_bsize)
    return usage.f_bavail * usage.f_frsize


def taken_bytes(path: Path) -> int:
    """Return what the file at *path* takes up, 0 without one; raises `ConfigError`."""
    fd = open_existing(path)
    if fd is None:
        return 0
    taken = os.fstat(fd).st_blocks * 512
    os.close(fd)
    return taken


def _usage(directory: Path) -> os.statvfs_result:
    try:
        return os.statvfs(directory)
    except OSError as error:
        raise _unusable(directory, error) from error


def _page_bytes(usage: os.statvfs_result) -> int:
    """Return the size of the pages that files there are made of."""
    return usage.f_bsize if usage.f_bsize in _HUGE_PAGES_BYTES else EXTENT_ALIGNMENT_BYTES


def _free_pool_bytes(page_bytes: int) -> int:
    free = _POOLS / f"hugepages-{page_bytes // 1024}kB" / "free_hugepages"
    try:
        return int(free.read_text()) * page_bytes
    except (OSError, ValueError):
        return 0


def _open(path: Path, flags: int) -> int:
    try:
        fd = os.open(path, _FLAGS | flags, _MODE)
    except FileNotFoundError:
        if flags & os.O_CREAT:
            raise ConfigError(f"{path} cannot be used: no directory {path.parent}") from None
        raise
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ConfigError(f"{path} is a link, which is not followed; remove it") from None
        raise _unusable(path, error) from error
    found = os.fstat(fd)
    reason = ""
    if not stat.S_ISREG(found.st_mode):
        reason = "is not a regular file"
    elif found.st_uid != os.geteuid():
        reason = f"belongs to uid {found.st_uid}, not to {os.geteuid()}"
    elif stat.S_IMODE(found.st_mode) & 0o077:
        reason = f"has mode {stat.S_IMODE(found.st_mode):04o}, ours have {_MODE:04o}"
    if reason:
        os.close(fd)
        raise ConfigError(f"{path} {reason}; remove it or choose another tiers.host.arena")
    return fd


def _unusable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{path} cannot be used: {error.strerror}")

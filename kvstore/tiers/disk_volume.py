"""The two files of the disk tier: the slab, which holds extents, and the index of its records.

Everything here blocks and is called from threads of the tier, several at a time. Nothing is
kept in memory but descriptors.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from kvstore.errors import ConfigError
from kvstore.limits import EXTENT_ALIGNMENT_BYTES
from kvstore.tiers.disk_layout import RECORD, RECORD_BYTES, Rows
from kvstore.units import format_size, round_size

_MODE: Final = 0o600
_FLAGS: Final = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_KEEP_SIZE: Final = 1
_PUNCH_HOLE: Final = 2
_UNSUPPORTED: Final = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_fallocate = ctypes.CDLL(None, use_errno=True).fallocate64
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class Volume:
    """Slab and index below *directory*, made when absent; the directory is locked by then.

    Raises `OSError`, as everything here does.
    """

    def __init__(self, directory: Path) -> None:
        self._slab_path, self._index_path = directory / "slab", directory / "index"
        self._index = os.open(self._index_path, _FLAGS, _MODE)
        try:
            self._slab = os.open(self._slab_path, _FLAGS, _MODE)
        except OSError:
            os.close(self._index)
            raise
        self.is_direct = False

    # --- extents -------------------------------------------------------------------------

    def read(self, views: Sequence[memoryview], offset: int) -> bool:
        """Fill *views* from the slab; False when it ends before they are full."""
        wanted = sum(view.nbytes for view in views)
        found = os.preadv(self._slab, views, offset)
        while 0 < found < wanted:
            step = os.preadv(self._slab, _after(views, found), offset + found)
            if step == 0:
                return False
            found += step
        return found == wanted

    def write(self, views: Sequence[memoryview], offset: int) -> None:
        """Put *views* into the slab one after the other."""
        wanted = sum(view.nbytes for view in views)
        done = os.pwritev(self._slab, views, offset)
        while done < wanted:
            step = os.pwritev(self._slab, _after(views, done), offset + done)
            if step == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            done += step

    def bypass_cache(self) -> None:
        """Go past the page cache from now on, where the file system lets us: see `is_direct`.

        Then every buffer, offset and length of `read` and `write` has to be whole pages.
        """
        try:
            fd = os.open(self._slab_path, (_FLAGS | os.O_DIRECT) & ~os.O_CREAT)
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                return
            raise
        try:
            # Some file systems refuse on use only.
            os.preadv(fd, [aligned_buffer(EXTENT_ALIGNMENT_BYTES)], 0)
        except OSError as error:
            os.close(fd)
            if error.errno in _UNSUPPORTED:
                return
            raise
        os.close(self._slab)
        self._slab, self.is_direct = fd, True

    def slab_bytes(self) -> int:
        """Return how long the slab is."""
        return os.fstat(self._slab).st_size

    def resize(self, slab_bytes: int) -> None:
        """Make the slab *slab_bytes* long; what was behind is given back."""
        os.ftruncate(self._slab, slab_bytes)

    def reserve(self, slab_bytes: int, index_bytes: int) -> None:
        """Take room for the slab's first *slab_bytes* and the index, so that writes have it.

        Raises `ConfigError` with both numbers when the file system has less. One that cannot
        set room aside is asked what it has, and may be full later.
        """
        self._reserve_file(self._slab, self._slab_path, slab_bytes)
        self._reserve_file(self._index, self._index_path, index_bytes)

    def punch(self, offset: int, size_bytes: int) -> bool:
        """Give a range of the slab back to the file system; False where it takes none back."""
        try:
            _set_aside(self._slab, _PUNCH_HOLE | _KEEP_SIZE, offset, size_bytes)
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                return False
            raise
        return True

    # --- records -------------------------------------------------------------------------

    def index_bytes(self) -> int:
        """Return how long the index is."""
        return os.fstat(self._index).st_size

    def read_records(self) -> Rows:
        """Return all records of the index; a torn one at its end is left out."""
        count = self.index_bytes() // RECORD_BYTES
        rows = np.empty(count, RECORD)
        view = rows.view(np.uint8).data
        done = 0
        while done < len(view):
            step = os.preadv(self._index, [view[done:]], done)
            if step == 0:
                return rows[: done // RECORD_BYTES]
            done += step
        return rows

    def read_record(self, slot: int) -> bytes:
        """Return one record, shorter when the index ends before it."""
        return os.pread(self._index, RECORD_BYTES, slot * RECORD_BYTES)

    def write_record(self, slot: int, record: bytes) -> None:
        """Put *record* into its place. Records lie within sectors: it is there or not."""
        written = os.pwrite(self._index, record, slot * RECORD_BYTES)
        if written != len(record):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def replace_records(self, rows: Rows) -> None:
        """Make *rows* the whole index, in one step: a crash leaves the old one or the new."""
        path = self._index_path.with_name("index.new")
        fd = os.open(path, _FLAGS | os.O_TRUNC, _MODE)
        try:
            view = np.ascontiguousarray(rows).view(np.uint8).data
            done = 0
            while done < len(view):
                done += os.pwrite(fd, view[done:], done)
            os.fsync(fd)
            path.replace(self._index_path)
            sync_directory(path.parent)
        except BaseException:
            os.close(fd)
            path.unlink(missing_ok=True)
            raise
        os.close(self._index)
        self._index = fd

    def cut_records(self, count: int) -> None:
        """Drop what lies behind the first *count* records."""
        os.ftruncate(self._index, count * RECORD_BYTES)

    def probe(self) -> None:
        """Read a page of the slab."""
        os.preadv(self._slab, [aligned_buffer(EXTENT_ALIGNMENT_BYTES)], 0)

    def sync(self) -> None:
        """Return when what was written is on the medium: payloads first, then records."""
        os.fdatasync(self._slab)
        os.fdatasync(self._index)

    def close(self) -> None:
        """Close both files. Nothing may be under way."""
        os.close(self._slab)
        os.close(self._index)

    # --- how -----------------------------------------------------------------------------

    def _reserve_file(self, fd: int, path: Path, size_bytes: int) -> None:
        found = os.fstat(fd)
        taken, room = found.st_blocks * 512, room_bytes(path.parent)
        if taken >= size_bytes:
            return
        if taken + room >= size_bytes:
            try:
                _set_aside(fd, _KEEP_SIZE, 0, size_bytes)
                return
            except OSError as error:
                if error.errno in _UNSUPPORTED:
                    return
                if error.errno not in _FULL:
                    raise
                # Gives back what was set aside before it was full.
                os.ftruncate(fd, found.st_size)
        raise ConfigError(
            f"tiers.disk.capacity needs {format_size(size_bytes)} for {path}, which has "
            f"{round_size(taken)} and could get {round_size(room)} more; lower it, or make room"
        )


def aligned_buffer(size_bytes: int) -> memoryview:
    """Return zeroed memory that starts on a page."""
    return memoryview(mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def room_bytes(directory: Path) -> int:
    """Return how much more files below *directory* can hold."""
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize


def sync_directory(path: Path) -> None:
    """Return when the names in *path* are on the medium."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _set_aside(fd: int, mode: int, offset: int, size_bytes: int) -> None:
    """fallocate(2), which Python has without modes and with a slow way round only."""
    while _fallocate(fd, mode, offset, size_bytes):
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def _after(views: Sequence[memoryview], done: int) -> list[memoryview]:
    """Return what is left of *views* behind their first *done* bytes."""
    left: list[memoryview] = []
    for view in views:
        left.append(view[done:])
        done = max(0, done - view.nbytes)
    return [view for view in left if view.nbytes]

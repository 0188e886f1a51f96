"""An arena that outlives its daemon: a file of extents, and beside it the file of its records.

Clients map the first and never see the second. Whichever daemon has claimed the records owns
both. What cannot be taken over is replaced: the arena by a fresh file, because clients of an
earlier daemon may have the old one mapped.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import uuid
from pathlib import Path
from typing import Final

from kvstore.tiers.record_layout import (
    Geometry,
    Identity,
    geometry_for,
    read_header,
    write_header,
)
from kvstore.tiers.records import Records
from kvstore.transfer.arena import Arena, check_size
from kvstore.transfer.private_files import (
    check_room,
    claim,
    make_directory,
    open_existing,
    replace,
    resize,
)

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_RECORDS_SUFFIX: Final = ".records"


class KeptArena:
    """An arena and its records, claimed by this process until `close`.

    *cold* says why nothing of an earlier daemon could be taken over: empty when something
    was, or when there was nothing.
    """

    def __init__(self, path: Path, size_bytes: int, *, checksums: bool = True) -> None:
        """Take over the arena at *path*, or make one of *size_bytes*.

        Without *checksums* it is always made anew. Raises `ConfigError`.
        """
        check_size(size_bytes)
        make_directory(path.parent)
        self.cold = ""
        self._checksums = checksums
        self._map: mmap.mmap
        self._paths = (path, path.with_name(path.name + _RECORDS_SUFFIX))
        self._fd = claim(self._paths[1])
        try:
            arena_fd, geometry = self._find(size_bytes)
            if geometry is None:
                arena_fd, geometry = self._make(size_bytes)
            try:
                self.arena = Arena.of_file(arena_fd, size_bytes)
            except BaseException:
                os.close(arena_fd)
                raise
        except BaseException:
            if not os.fstat(self._fd).st_size:
                self._paths[1].unlink(missing_ok=True)
            self._give_up()
            raise
        self.records = Records(memoryview(self._map), size_bytes, geometry)

    def close(self) -> None:
        """Let go of both; they stay as they are, unless they are of no use. Idempotent."""
        if self._fd >= 0:
            self.arena.close()
            self.records.close()
            # What still refers to the map keeps it, and nothing of it is ever written again.
            with contextlib.suppress(BufferError):
                self._map.close()
            if not self._checksums:
                for path in self._paths:
                    path.unlink(missing_ok=True)
            self._give_up()

    def _find(self, size_bytes: int) -> tuple[int, Geometry | None]:
        """Return what an earlier daemon left, if it can be taken over; else note why not."""
        arena_fd = open_existing(self._paths[0])
        if arena_fd is None:
            return -1, None
        geometry: Geometry | str = "there are no records of it"
        found_bytes = os.fstat(arena_fd).st_size
        if not self._checksums:
            geometry = "tiers.host.checksum is off, so that nothing in it could be verified"
        elif found_bytes != size_bytes:
            geometry = f"it has {found_bytes} bytes, tiers.host.capacity is {size_bytes}"
        elif os.fstat(self._fd).st_size:
            view = memoryview(self._map_records())
            geometry = read_header(view, _identity_of(arena_fd, size_bytes))
        if isinstance(geometry, Geometry):
            return arena_fd, geometry
        os.close(arena_fd)
        self.cold = geometry
        return -1, None

    def _make(self, size_bytes: int) -> tuple[int, Geometry]:
        """Replace whatever is there."""
        path, records_path = self._paths
        geometry = geometry_for(size_bytes)
        check_room(path, size_bytes)
        # The records go first and come last: those of one arena are never beside another.
        os.ftruncate(self._fd, 0)
        arena_fd = replace(path, size_bytes)
        try:
            resize(self._fd, records_path, geometry.size_bytes)
            view = memoryview(self._map_records())
            write_header(view, geometry, _identity_of(arena_fd, size_bytes))
        except BaseException:
            os.close(arena_fd)
            path.unlink()
            raise
        return arena_fd, geometry

    def _map_records(self) -> mmap.mmap:
        self._map = mmap.mmap(self._fd, os.fstat(self._fd).st_size, flags=mmap.MAP_SHARED)
        return self._map

    def _give_up(self) -> None:
        os.close(self._fd)
        self._fd = -1


def _identity_of(arena_fd: int, size_bytes: int) -> Identity:
    found = os.fstat(arena_fd)
    return Identity(size_bytes, found.st_dev, found.st_ino, _boot_id())


def _boot_id() -> bytes:
    """Return the id of this boot, or zeros where the kernel does not tell."""
    try:
        return uuid.UUID(_BOOT_ID.read_text().strip()).bytes
    except (OSError, ValueError):
        return bytes(16)

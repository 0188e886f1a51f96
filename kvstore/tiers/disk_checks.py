"""Checks of the directory of a disk tier, before a daemon is to use it: nothing is changed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, Literal, NamedTuple

from kvstore.errors import ConfigError
from kvstore.limits import EXTENT_ALIGNMENT_BYTES
from kvstore.tiers.disk_directory import read_marker
from kvstore.tiers.disk_open import shares_of
from kvstore.tiers.disk_volume import aligned_buffer, room_bytes
from kvstore.units import format_size, round_size

# They lose what they hold with the machine, or keep it in the very memory that it is to relieve.
_MEMORY_FILE_SYSTEMS: Final = ("tmpfs", "ramfs", "hugetlbfs")
_NETWORK_FILE_SYSTEMS: Final = ("nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs", "ceph")


class DiskFinding(NamedTuple):
    """The outcome of one check; *fix* is empty when there is nothing to do."""

    check: str
    verdict: Literal["ok", "warn", "fail"]
    found: str
    fix: str = ""


def check_disk(
    path: Path, capacity_bytes: int, *, direct: bool = True, mounts: str | None = None
) -> list[DiskFinding]:
    """Return what is to be said about *path* as the directory of a disk tier.

    *mounts* are the contents of /proc/mounts. A directory that is in use is not disturbed.
    """
    if mounts is None:
        mounts = Path("/proc/mounts").read_text()
    place = next(found for found in (path, *path.parents) if found.exists())
    findings = [_check_directory(path, place)]
    if findings[0].verdict == "fail":
        return findings
    findings += [_check_room(path, place, capacity_bytes), _check_kind(place, mounts)]
    if direct:
        findings.append(_check_direct(place))
    return findings


def _check_directory(path: Path, place: Path) -> DiskFinding:
    try:
        marker = read_marker(path) if path.exists() else None
    except ConfigError as error:
        return DiskFinding("disk directory", "fail", str(error), "choose another tiers.disk.path")
    except OSError as error:
        found = f"{path}: {error.strerror}"
        return DiskFinding("disk directory", "fail", found, "choose another tiers.disk.path")
    if not os.access(place, os.W_OK | os.X_OK):
        found = f"{place} is not writable for uid {os.geteuid()}"
        return DiskFinding("disk directory", "fail", found, f"let uid {os.geteuid()} write there")
    if marker is not None:
        return DiskFinding("disk directory", "ok", f"{path}, format {marker.format}")
    return DiskFinding("disk directory", "ok", f"{path} will be made a disk tier")


def _check_room(path: Path, place: Path, capacity_bytes: int) -> DiskFinding:
    try:
        shares = shares_of(capacity_bytes)
    except ConfigError as error:
        return DiskFinding("disk room", "fail", str(error), "set tiers.disk.capacity")
    files = [found for found in (path / "slab", path / "index") if found.exists()]
    taken = sum(found.stat().st_blocks * 512 for found in files)
    needed, room = shares.slab_bytes + shares.index_bytes, room_bytes(place)
    found = f"{format_size(capacity_bytes)}: {round_size(taken)} taken, {round_size(room)} free"
    if taken + room < needed:
        fix = f"lower tiers.disk.capacity below {round_size(taken + room)}, or make room"
        return DiskFinding("disk room", "fail", found, fix)
    return DiskFinding("disk room", "ok", found)


def _check_kind(place: Path, mounts: str) -> DiskFinding:
    point, kind = _file_system_of(place.resolve(), mounts)
    found = f"{kind} on {point}"
    if kind in _MEMORY_FILE_SYSTEMS:
        return DiskFinding("disk kind", "warn", found, "choose a directory on a disk")
    if kind in _NETWORK_FILE_SYSTEMS:
        fix = "choose a local disk: a server that does not answer holds up stores and loads"
        return DiskFinding("disk kind", "warn", found, fix)
    return DiskFinding("disk kind", "ok", found)


def _check_direct(place: Path) -> DiskFinding:
    """Write a page past the page cache and read it again, in a file without a name."""
    try:
        fd = os.open(place, os.O_TMPFILE | os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        return _through_cache(error.strerror or str(error))
    try:
        page = aligned_buffer(EXTENT_ALIGNMENT_BYTES)
        os.pwritev(fd, [page], 0)
        os.preadv(fd, [page], 0)
    except OSError as error:
        return _through_cache(error.strerror or str(error))
    finally:
        os.close(fd)
    return DiskFinding("disk direct I/O", "ok", "works")


def _through_cache(reason: str) -> DiskFinding:
    fix = 'choose another file system, or set tiers.disk.direct = "off" to say that it is meant'
    found = f"not here ({reason}); payloads go through the page cache"
    return DiskFinding("disk direct I/O", "warn", found, fix)


def _file_system_of(path: Path, mounts: str) -> tuple[str, str]:
    """Return the mount point that *path* lies below and its type."""
    found = ("/", "unknown")
    for line in mounts.splitlines():
        _, place, kind, *_ = line.split(" ")
        if len(place) >= len(found[0]) and path.is_relative_to(place):
            found = (place, kind)
    return found

"""Checks of the machine that a daemon is to run on, each with the fix in words.

`fail` means that the daemon will not start or not work as configured; `warn`, that it will be
slower or narrower than it could be.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import resource
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal, NamedTuple

from kvstore import __version__
from kvstore.cli.tables import align
from kvstore.client.sync import Client
from kvstore.config import Config
from kvstore.daemon.peer_doctor import examine_peers
from kvstore.errors import ConfigError, KVStoreError, RefusedError
from kvstore.gpu.devices import find_devices
from kvstore.limits import MIB
from kvstore.tiers.disk_checks import check_disk
from kvstore.tiers.redis_doctor import examine_redis_now
from kvstore.tiers.redis_settings import redis_settings
from kvstore.transfer import copies
from kvstore.transfer.arena import memory_limit_bytes
from kvstore.transfer.private_files import room_bytes, taken_bytes
from kvstore.units import format_size, round_size

Verdict = Literal["ok", "warn", "fail"]

_PACKAGES: Final = (
    "aiohttp",
    "hiredis",
    "lz4",
    "msgspec",
    "numpy",
    "prometheus-client",
    "redis",
    "uvloop",
    "xxhash",
)
_NIXL_BUILDS: Final = ("nixl-cu13", "nixl-cu12")
_MEMORY_FILE_SYSTEMS: Final = ("tmpfs", "hugetlbfs", "ramfs")
_COMFORTABLE_SHARE: Final = 0.8
"""An arena beyond this share of memory leaves too little for engines and the system."""
_DAEMON_TIMEOUT_SECONDS: Final = 2.0


class Finding(NamedTuple):
    """The outcome of one check; *fix* is empty when there is nothing to do."""

    check: str
    verdict: Verdict
    found: str
    fix: str = ""


def examine(config: Config, socket: Path, root: Path = Path("/")) -> list[Finding]:
    """Return the outcome of every check; *root* is where /proc, /sys and /dev are read."""
    host = config.tiers.host
    limit_bytes, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    findings = [
        check_python(),
        check_packages(),
        check_copies(copies.KERNEL),
        check_memory(host.capacity_bytes, memory_limit_bytes()),
        check_locked_memory(host.capacity_bytes, limit_bytes, gpus=find_devices(root).nodes),
    ]
    if host.arena == "memfd":
        findings.append(check_memfd())
    else:
        findings.append(check_arena_file(Path(host.arena), host.capacity_bytes, root))
    if host.huge_pages == "auto":
        findings.append(check_huge_pages(host.capacity_bytes, root))
    findings += check_slower_tiers(config)
    if config.peer.transport == "nixl":
        findings.append(check_nixl())
    return [*findings, check_gpu(root), check_socket_directory(socket.parent), check_daemon(socket)]


def check_slower_tiers(config: Config) -> list[Finding]:
    """Look at the tiers below the host tier and at peers, as far as they are configured."""
    findings: list[Finding] = []
    disk, redis = config.tiers.disk, config.tiers.redis
    if disk.path:
        checked = check_disk(Path(disk.path), disk.capacity_bytes, direct=disk.direct == "auto")
        findings += [Finding(*found) for found in checked]
    if redis.url:
        try:
            checked_redis = examine_redis_now(redis_settings(redis), shares=config.peer.share)
            findings += [Finding(*found) for found in checked_redis]
        except ConfigError as error:
            findings.append(Finding("redis", "fail", str(error), "mend tiers.redis"))
    return findings + [Finding(*found) for found in examine_peers(config)]


def render(findings: list[Finding]) -> str:
    """Return one line a finding, and its fix below it."""
    lines: list[str] = []
    rows = align([(finding.verdict, finding.check, finding.found) for finding in findings])
    for row, finding in zip(rows, findings, strict=True):
        lines.append(row)
        if finding.fix:
            lines.append(f"      fix: {finding.fix}")
    return "\n".join(lines)


def check_python() -> Finding:
    """Look for assertions: they guard the data, so the daemon refuses `python -O`."""
    found = f"kvstore {__version__}, {platform.python_implementation()} {sys.version.split()[0]}"
    if not __debug__:
        return Finding("python", "fail", f"{found}, assertions off", "run without -O")
    return Finding("python", "ok", found)


def check_packages(names: tuple[str, ...] = _PACKAGES) -> Finding:
    """Look for what the core needs."""
    versions: list[str] = []
    missing: list[str] = []
    for name in names:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return Finding(
            "packages", "fail", f"{', '.join(missing)} not installed", "pip install kvstore"
        )
    return Finding("packages", "ok", ", ".join(versions))


def check_copies(kernel: str) -> Finding:
    """Look for the C library of the copies."""
    if kernel == "numpy":
        return Finding(
            "copies",
            "warn",
            "the C library is not in use; copies run at about half the speed",
            "install a C compiler and install kvstore again",
        )
    return Finding("copies", "ok", f"C library, {kernel}")


def check_memory(capacity_bytes: int, limit_bytes: int) -> Finding:
    """Compare the arena with the memory of this machine or control group."""
    found = f"arena {format_size(capacity_bytes)}, memory {round_size(limit_bytes)}"
    if capacity_bytes > limit_bytes:
        return Finding(
            "memory", "fail", found, "lower tiers.host.capacity, or raise the memory limit"
        )
    if capacity_bytes > limit_bytes * _COMFORTABLE_SHARE:
        fix = f"keep tiers.host.capacity below {_COMFORTABLE_SHARE:.0%} of the memory"
        return Finding("memory", "warn", found, fix)
    return Finding("memory", "ok", found)


def check_memfd() -> Finding:
    """Make a sealed memfd, as the daemon does."""
    try:
        os.close(os.memfd_create("kvstore-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    except OSError as error:
        fix = "set tiers.host.arena to a file on /dev/shm"
        return Finding("arena", "fail", f"memfd_create: {error.strerror}", fix)
    return Finding("arena", "ok", "memfd")


def check_arena_file(path: Path, capacity_bytes: int, root: Path) -> Finding:
    """Look at the file system that is to hold the arena, and at what lies there already."""
    place, kind = file_system_of(path, (root / "proc/mounts").read_text())
    # The daemon makes the last directory itself.
    directory = path.parent if path.parent.exists() else path.parent.parent
    if not directory.is_dir():
        return Finding(
            "arena", "fail", f"{directory} is missing", f"make the directory {directory}"
        )
    try:
        room = room_bytes(directory) + taken_bytes(path)
    except ConfigError as error:
        return Finding("arena", "fail", str(error), "choose another tiers.host.arena")
    found = f"{path} on {kind}, room for {round_size(room)}"
    if room < capacity_bytes:
        fix = f"lower tiers.host.capacity, or give {place} more than {format_size(capacity_bytes)}"
        return Finding("arena", "fail", found, fix)
    if not os.access(directory, os.W_OK):
        return Finding("arena", "fail", f"{found}, not writable", f"let uid {os.geteuid()} write")
    if kind not in _MEMORY_FILE_SYSTEMS:
        return Finding("arena", "warn", found, "choose a file on tmpfs or hugetlbfs")
    return Finding("arena", "ok", found)


def check_locked_memory(capacity_bytes: int, limit_bytes: int, *, gpus: Sequence[str]) -> Finding:
    """Compare the arena with what may be locked: engines pin it for copies to a GPU."""
    if limit_bytes == resource.RLIM_INFINITY:
        return Finding("memlock", "ok", "unlimited")
    found = f"limit {round_size(limit_bytes)}"
    if not gpus:
        return Finding("memlock", "ok", f"{found}; no GPU here needs more")
    if limit_bytes < capacity_bytes:
        fix = "LimitMEMLOCK=infinity in systemd, or --ulimit memlock=-1 for a container"
        return Finding("memlock", "warn", f"{found}; GPU engines cannot pin the arena", fix)
    return Finding("memlock", "ok", found)


def check_huge_pages(capacity_bytes: int, root: Path) -> Finding:
    """Look for reserved huge pages, or transparent ones for shared memory."""
    size_kib = 2 * MIB // 1024
    free = _read(root / f"sys/kernel/mm/hugepages/hugepages-{size_kib}kB/free_hugepages")
    if free.isdecimal() and int(free) * 2 * MIB >= capacity_bytes:
        return Finding("huge pages", "ok", f"{free} of 2 MiB are reserved and free")
    setting = _read(root / "sys/kernel/mm/transparent_hugepage/shmem_enabled")
    chosen = setting.partition("[")[2].partition("]")[0]
    if chosen in {"always", "within_size", "advise", "force"}:
        return Finding("huge pages", "ok", f"transparent, {chosen}")
    return Finding(
        "huge pages",
        "warn",
        f"too few reserved and free for the arena, transparent ones {chosen or 'not available'}",
        "write advise to /sys/kernel/mm/transparent_hugepage/shmem_enabled, "
        "or reserve some in vm.nr_hugepages",
    )


def check_gpu(root: Path) -> Finding:
    """Look for a GPU and for what is needed to use it."""
    devices = find_devices(root)
    if devices.are_absent:
        return Finding("gpu", "ok", "none; engines on this host run on the CPU")
    driver = devices.driver or "no driver version"
    if not devices.nodes:
        fix = "give this container the device nodes"
        return Finding("gpu", "warn", f"{driver}; no device node", fix)
    return Finding("gpu", "ok", f"{', '.join(devices.nodes)}; {driver}")


def check_nixl(names: tuple[str, ...] = _NIXL_BUILDS) -> Finding:
    """Look for the library that hand-offs of other hosts are to come by."""
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return Finding("nixl", "ok", f"{name} {importlib.metadata.version(name)}")
    fix = "pip install 'kvstore[nixl]', or peer.transport = \"tcp\""
    return Finding("nixl", "warn", "not installed: hand-offs come by tcp", fix)


def check_socket_directory(directory: Path) -> Finding:
    """Look at the directory of the socket: writable for us, closed to all others."""
    existing = next(place for place in (directory, *directory.parents) if place.is_dir())
    if not os.access(existing, os.W_OK | os.X_OK):
        found = f"{existing} is not writable for uid {os.geteuid()}"
        return Finding("socket directory", "fail", found, "choose another server.socket")
    mode = stat.S_IMODE(existing.stat().st_mode)
    if existing != directory:
        return Finding("socket directory", "ok", f"{directory} will be made")
    if mode & stat.S_IWOTH:
        found = f"{directory} has mode {mode:04o}: any user can put a socket there"
        return Finding("socket directory", "warn", found, f"chmod 0750 {directory}")
    return Finding("socket directory", "ok", f"{directory}, mode {mode:04o}")


def check_daemon(socket: Path) -> Finding:
    """Ask the daemon, if one runs."""
    if not os.path.lexists(socket):
        return Finding("daemon", "warn", f"none at {socket}", "kvstore serve")
    if not socket.is_socket():
        fix = "remove it, or choose another server.socket"
        return Finding("daemon", "fail", f"{socket} is not a socket", fix)
    try:
        with Client.connect(socket, timeout_seconds=_DAEMON_TIMEOUT_SECONDS) as client:
            stats = client.stats()
    except RefusedError as error:
        return Finding("daemon", "fail", str(error), "add your user to server.allowed_uids")
    except KVStoreError as error:
        fix = "kvstore serve (a socket left by a daemon that is gone is replaced)"
        return Finding("daemon", "warn", str(error), fix)
    found = f"kvstore {stats.version}, {stats.state}, pid {stats.pid}"
    if stats.version != __version__:
        return Finding("daemon", "warn", found, f"restart it to run {__version__}")
    if stats.peer_transport.startswith("tcp ("):
        fix = "its log says why; NIXL is tried again by itself"
        return Finding("daemon", "warn", f"{found}; hand-offs by {stats.peer_transport}", fix)
    by = "" if stats.peer_transport == "tcp" else f"; hand-offs by {stats.peer_transport}"
    return Finding("daemon", "ok", found + by)


def file_system_of(path: Path, mounts: str) -> tuple[str, str]:
    """Return the mount point that *path* lies below and its type, from /proc/mounts."""
    found = ("/", "unknown")
    for line in mounts.splitlines():
        _, place, kind, *_ = line.split(" ")
        if len(place) >= len(found[0]) and path.is_relative_to(place):
            found = (place, kind)
    return found


def _read(path: Path) -> str:
    """Return the text of *path* without blanks around it, or nothing."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""

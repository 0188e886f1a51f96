"""Who is at the other end of a Unix socket, and whether it still lives."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Final, NamedTuple

from kvstore.tiers.record_layout import Owner

_UCRED: Final = struct.Struct("3i")
_ROOT_UID: Final = 0
# Of /proc/PID/stat, counted from behind the program's name.
_STARTED_FIELD: Final = 19
_PID_SPACE: Final = Path("/proc/self/ns/pid")


class Credentials(NamedTuple):
    """What the kernel says of the process that connected."""

    pid: int
    uid: int
    gid: int


def credentials_of(connection: socket.socket) -> Credentials:
    """Return the SO_PEERCRED of *connection*."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return Credentials(*_UCRED.unpack(raw))


def owner_of(pid: int) -> Owner:
    """Return what will tell the process *pid* from all others, in the life of this machine."""
    started = _started(pid)
    return Owner(pid, started, _pid_space()) if started else Owner()


def watch(owner: Owner) -> PeerProcess | None:
    """Return *owner* to be watched, or None when that process has ended.

    One that cannot be seen from here, because of its pid namespace, counts as alive.
    """
    if owner.pid == 0 or owner.pid_space != _pid_space():
        return PeerProcess(0)
    # The pid is held before its start is read: from then on it is nobody else's.
    process = PeerProcess(owner.pid)
    if _started(owner.pid) == owner.started:
        return process
    process.close()
    return None


def _started(pid: int) -> int:
    """Return when *pid* was started, in ticks since the boot, or 0 when it cannot be seen."""
    try:
        # The name of the program, in parentheses, may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return int(fields[_STARTED_FIELD])
    except (OSError, ValueError, IndexError):
        return 0


def _pid_space() -> int:
    """Return the number of this process's pid namespace, 0 where there is none."""
    try:
        return _PID_SPACE.stat().st_ino
    except OSError:
        return 0


class Admission:
    """Decides which local users may use the daemon: its own, root, and those configured."""

    def __init__(self, uids: Collection[int], gids: Collection[int]) -> None:
        self._uids = frozenset((os.getuid(), _ROOT_UID, *uids))
        self._gids = frozenset(gids)

    def admits(self, peer: Credentials) -> bool:
        """Return whether *peer* may open a session."""
        return peer.uid in self._uids or peer.gid in self._gids


class PeerProcess:
    """Tells when the process behind a session has ended, through a pidfd.

    A process in another pid namespace cannot be seen; it counts as alive.
    """

    def __init__(self, pid: int) -> None:
        self._fd: int | None = None
        with contextlib.suppress(OSError):
            self._fd = os.pidfd_open(pid)

    def when_gone(
        self, loop: asyncio.AbstractEventLoop, grace_seconds: float, act: Callable[[], None]
    ) -> None:
        """Call *act* once: when the process has ended, or after *grace_seconds*."""
        timer = loop.call_later(grace_seconds, self._finish, loop, act)
        if self._fd is not None:
            loop.add_reader(self._fd, self._ended, loop, timer, act)

    def close(self) -> None:
        """Stop watching."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _ended(
        self, loop: asyncio.AbstractEventLoop, timer: asyncio.TimerHandle, act: Callable[[], None]
    ) -> None:
        timer.cancel()
        self._finish(loop, act)

    def _finish(self, loop: asyncio.AbstractEventLoop, act: Callable[[], None]) -> None:
        if self._fd is not None:
            loop.remove_reader(self._fd)
        self.close()
        act()

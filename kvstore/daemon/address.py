"""Where the daemon listens, and that no other does: socket file, lock, permissions."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from collections.abc import Sequence
from pathlib import Path

from kvstore.errors import AddressInUseError, ConfigError

_DIRECTORY_MODE = 0o750
_PATH_MAX_BYTES = 107


class SocketAddress:
    """A Unix socket path, claimed by a lock file beside it for as long as the daemon lives.

    The kernel drops the lock with the process, however it ends, so a socket file that is
    found while holding the lock is stale and can be replaced. A socket that systemd listens on
    (*handed_over*) is served as it is, and stays when the daemon ends.
    """

    def __init__(self, path: Path, mode: int, handed_over: Sequence[socket.socket] = ()) -> None:
        self.path = path
        self._mode = mode
        self._handed_over = handed_over
        self._lock: int | None = None

    def bind(self) -> socket.socket:
        """Claim the path and return a bound, non-blocking socket.

        Raises `AddressInUseError` when another daemon holds it, `ConfigError` when the path
        is too long, not ours to use, taken by something that is no socket, or not the one that
        systemd listens on.
        """
        if len(os.fsencode(self.path)) > _PATH_MAX_BYTES:
            raise ConfigError(f"server.socket {self.path} is longer than {_PATH_MAX_BYTES} bytes")
        try:
            self.path.parent.mkdir(mode=_DIRECTORY_MODE, parents=True, exist_ok=True)
            self._claim()
            if self._handed_over:
                return self._adopt()
            self._remove_stale()
            return self._listen()
        except OSError as error:
            self.release()
            raise ConfigError(
                f"server.socket {self.path} cannot be used: {error.strerror}"
            ) from error

    def release(self) -> None:
        """Remove the socket file and give the path up; only what this daemon has claimed."""
        if self._lock is None:
            return
        if self.path.is_socket() and not self._handed_over:
            self.path.unlink(missing_ok=True)
        os.close(self._lock)
        self._lock = None

    def _claim(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        lock = os.open(self.path.with_name(self.path.name + ".lock"), flags, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(lock, 32).decode(errors="replace").strip() or "unknown"
            os.close(lock)
            raise AddressInUseError(
                f"another daemon (pid {owner}) already serves {self.path}"
            ) from None
        os.ftruncate(lock, 0)
        os.write(lock, f"{os.getpid()}\n".encode())
        self._lock = lock

    def _adopt(self) -> socket.socket:
        found = [_address_of(one) for one in self._handed_over]
        if found != [os.fspath(self.path)]:
            self.release()
            raise ConfigError(
                f"systemd listens on {', '.join(found)}, server.socket is {self.path}; "
                "name the same path in both"
            )
        return self._handed_over[0]

    def _remove_stale(self) -> None:
        try:
            mode = self.path.lstat().st_mode
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(mode):
            self.release()
            raise ConfigError(
                f"server.socket {self.path} exists and is not a socket; remove it or choose another"
            )
        self.path.unlink()

    def _listen(self) -> socket.socket:
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        listening.bind(os.fspath(self.path))
        # Nobody can connect between bind and chmod: listening starts later.
        self.path.chmod(self._mode)
        return listening


def _address_of(listening: socket.socket) -> str:
    """Return where *listening* listens: a path where it is a Unix stream, else its address."""
    address = listening.getsockname()
    is_ours = listening.family is socket.AF_UNIX and listening.type is socket.SOCK_STREAM
    return str(address) if is_ours else f"{listening.family.name} {address!r}"

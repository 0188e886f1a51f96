"""A daemon of the bench's own, in its own process, and what it costs in CPU time."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from kvstore.client.sync import Client
from kvstore.errors import UnavailableError
from kvstore.limits import EXTENT_ALIGNMENT_BYTES, MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from kvstore.client.sync import Space
    from kvstore.protocol.manifest import Manifest

_READY_SECONDS_MAX: Final = 20.0
_PREFAULT_SECONDS_MAX: Final = 120.0
_STOP_SECONDS_MAX: Final = 10.0
_LOOK_SECONDS: Final = 0.005


class ChildProcess:
    """A process that serves on a socket in a directory of its own, until it is left."""

    def __init__(self, arguments: Callable[[Path], list[str]]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="kvstore-bench-")
        folder = Path(self._folder.name)
        self.socket = folder / "socket"
        self._log = folder / "log"
        command = [sys.executable, *arguments(self.socket)]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)  # noqa: S603  # ours

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(_STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()

    @property
    def cpu_seconds(self) -> float:
        """What all threads of the process have run for, to the nanosecond where the kernel says."""
        total_ns = 0
        for thread in Path(f"/proc/{self._process.pid}/task").iterdir():
            with contextlib.suppress(OSError):  # a thread may end meanwhile
                total_ns += int((thread / "schedstat").read_text().split()[0])
        return total_ns / 1e9

    def wait_until(self, is_ready: Callable[[], bool], seconds_max: float) -> None:
        """Wait until *is_ready*; raises `UnavailableError` with the process's last words."""
        ends_at = time.monotonic() + seconds_max
        while not is_ready():
            if self._process.poll() is not None or time.monotonic() > ends_at:
                words = self._log.read_text(errors="replace").strip()
                self._stop()
                raise UnavailableError(f"the bench's own process did not start: {words[-2000:]}")
            time.sleep(_LOOK_SECONDS)


class BenchDaemon(ChildProcess):
    """`kvstore serve` with an arena of *capacity_bytes*, and *more* settings."""

    def __init__(
        self,
        capacity_bytes: int,
        *,
        checksums: bool,
        prefault: bool,
        more: Mapping[str, str] | None = None,
    ) -> None:
        started_at = time.perf_counter()
        settings = {
            "tiers.host.capacity": f"{-(-capacity_bytes // MIB)}MiB",
            "tiers.host.checksum": "xxh3" if checksums else "off",
            "tiers.host.prefault": str(prefault).lower(),
        } | dict(more or {})
        super().__init__(lambda socket: _serve(settings | {"server.socket": str(socket)}))
        self.checksums = checksums
        self._client: Client | None = None
        self.wait_until(self._connect, _READY_SECONDS_MAX)
        self.ready_seconds = time.perf_counter() - started_at
        if prefault:
            self.wait_until(self._is_prefaulted, _PREFAULT_SECONDS_MAX)
        self.prefaulted_seconds = time.perf_counter() - started_at

    def __exit__(self, *details: object) -> None:
        self.client.close()
        super().__exit__(*details)

    @property
    def client(self) -> Client:
        """The session that has been open since the daemon was ready."""
        assert self._client is not None, "the daemon is ready"
        return self._client

    def attach_warm(self, manifest: Manifest) -> Space:
        """Enter a namespace; this process's page tables then know the whole arena."""
        space = self.client.attach(manifest)
        for start in range(0, space.attached.arena.size_bytes, EXTENT_ALIGNMENT_BYTES):
            _ = space.attached.arena.view[start]
        return space

    def _connect(self) -> bool:
        with contextlib.suppress(UnavailableError):
            self._client = Client.connect(self.socket, name="kvstore bench", timeout_seconds=60.0)
        return self._client is not None

    def _is_prefaulted(self) -> bool:
        arena = self.client.stats().arena
        return arena.prefaulted_bytes == arena.size_bytes


def _serve(settings: dict[str, str]) -> list[str]:
    flags = [flag for path, value in settings.items() for flag in ("--set", f"{path}={value}")]
    return ["-m", "kvstore", "serve", *flags]

"""A real daemon: `kvstore serve` in a process of its own, on a socket of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Self

from kvstore.client.sync import Client
from kvstore.errors import KVStoreError
from kvstore.protocol import messages as m
from tests.support.waiting import DEADLINE_SECONDS, wait_until

REPOSITORY = Path(__file__).parents[2]

DEFAULTS = {
    "tiers.host.capacity": "16MiB",
    "server.drain_timeout": "2s",
    "log.format": "json",
    "admin.listen": "",
}
NOTHING: Mapping[str, object] = MappingProxyType({})


class Daemon:
    """Serves below *directory* with *settings*; *limits* are changed inside the process."""

    def __init__(
        self,
        directory: Path,
        settings: Mapping[str, object] = NOTHING,
        limits: Mapping[str, object] = NOTHING,
    ) -> None:
        self.socket = Path(settings.get("server.socket", directory / "kvstore.sock"))
        self._log = directory / "daemon.log"
        chosen = DEFAULTS | {"server.socket": self.socket} | dict(settings)
        program = ["-m", "kvstore"] if not limits else ["-m", "tests.support.serve"]
        changed = [f"{name}={value}" for name, value in limits.items()]
        words = [word for path, value in chosen.items() for word in ("--set", f"{path}={value}")]
        self._command = [sys.executable, *program, *changed, "serve", *words]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.launch()
        return self.wait_ready()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def launch(self) -> None:
        """Start the process, without waiting for it."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("KVSTORE_")}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, cwd=REPOSITORY, env=kept, stdin=subprocess.DEVNULL, stderr=log
            )

    def wait_ready(self) -> Self:
        """Wait until it takes connections."""
        wait_until(self._answers, what=f"daemon is ready; its log:\n{self.log()}")
        return self

    def run_to_end(self) -> tuple[int, str]:
        """Start it, wait until it has ended by itself, and return its status and its log."""
        self.launch()
        assert self._process is not None
        return self._process.wait(DEADLINE_SECONDS), self.log()

    def stop(self) -> int:
        """Ask it to end; return its exit status."""
        return self.end(signal.SIGTERM)

    def kill(self) -> None:
        """End it the hard way."""
        self.end(signal.SIGKILL)

    def end(self, number: signal.Signals) -> int:
        if self._process is None:
            return 0
        self.send(number)
        if number is not signal.SIGKILL:
            self.send(signal.SIGCONT)
        status = self._process.wait(DEADLINE_SECONDS)
        self._process = None
        return status

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        if self.is_running:
            os.kill(self.pid, number)

    def log(self) -> str:
        return self._log.read_text(encoding="utf-8") if self._log.exists() else ""

    def connect(self, name: str = "test") -> Client:
        return Client.connect(self.socket, name=name, timeout_seconds=DEADLINE_SECONDS)

    def stats(self) -> m.DaemonStats:
        with self.connect("stats") as client:
            return client.stats()

    def used_bytes(self) -> int:
        return self.stats().tiers[0].used_bytes

    def _answers(self) -> bool:
        assert self.is_running, f"the daemon ended:\n{self.log()}"
        try:
            with socket.socket(socket.AF_UNIX) as probe:
                probe.connect(os.fspath(self.socket))
        except OSError:
            return False
        try:
            self.stats()
        except KVStoreError:
            return False
        return True

"""Real servers: redis-server in processes of its own, on free ports and sockets of its own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from typing import Self

import redis

from tests.support.waiting import DEADLINE_SECONDS, wait_until

SERVER = shutil.which("redis-server") or shutil.which("valkey-server")


class RedisServer:
    """One server below *directory*, with *options* of its command line; it keeps its port.

    With a file as *config*, it is a sentinel.
    """

    def __init__(
        self,
        directory: Path,
        *options: str,
        tls: bool = False,
        config: Path | None = None,
        password: str = "",
    ) -> None:
        assert SERVER is not None, "redis-server is not installed"
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.port = free_port()
        self.path = directory / "redis.sock"
        self.password = password
        port = ("--port", "0", "--tls-port", str(self.port)) if tls else ("--port", str(self.port))
        place = ("--bind", "127.0.0.1", "--unixsocket", str(self.path), "--dir", str(directory))
        keeping = ("--save", "", "--appendonly", "no", "--repl-diskless-sync-delay", "0")
        if password and config is None:
            options += ("--requirepass", password, "--masterauth", password)
        if config is None:
            self._command = [SERVER, *port, *place, *keeping, *options]
        else:
            self._command = [SERVER, str(config), "--sentinel", *port, *place]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    @property
    def unix_url(self) -> str:
        return f"unix://{self.path}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        wait_until(self._listens, what=f"redis listens; its log:\n{self.log()}")

    def kill(self) -> None:
        """End it the hard way."""
        if self._process is not None:
            self.pause(paused=False)
            self._process.kill()
            self._process.wait(DEADLINE_SECONDS)
            self._process = None

    def pause(self, *, paused: bool = True) -> None:
        """Stop the process, so that it answers nothing while its sockets stand; or let it go on."""
        if self._process is not None and self._process.poll() is None:
            os.kill(self.pid, signal.SIGSTOP if paused else signal.SIGCONT)

    def client(self, **options: object) -> redis.Redis:
        """Return redis-py's client, over the Unix socket."""
        chosen = {"password": self.password or None} | options
        return redis.Redis(unix_socket_path=str(self.path), **chosen)

    @staticmethod
    def client_of(port: int) -> redis.Redis:
        """Return redis-py's client, over TCP."""
        return redis.Redis(port=port)

    def do(self, *words: object) -> object:
        """Return the answer to one command."""
        with self.client() as client:
            return client.execute_command(*words)

    def log(self) -> str:
        path = self.directory / "log"
        return path.read_text() if path.exists() else ""

    def _listens(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log()
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.path)) == 0


def free_port() -> int:
    """Return a port that nobody listens on, and whose cluster port (10000 above) exists."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port < 55_000:
            return port

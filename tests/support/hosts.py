"""Two daemons that stand for two hosts: one is called, the other calls it."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Final, Self

from tests.support.daemon import NOTHING, Daemon
from tests.support.redis_proxy import FaultyProxy
from tests.support.waiting import DEADLINE_SECONDS

TOKEN = "a token of some length\n"


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def token_file(directory: Path, token: str = TOKEN) -> Path:
    directory.mkdir(exist_ok=True)
    path = directory / "token"
    path.write_text(token)
    path.chmod(0o600)
    return path


def called(
    directory: Path,
    port: int,
    settings: Mapping[str, object] = NOTHING,
    limits: Mapping[str, object] = NOTHING,
) -> Daemon:
    """Return the daemon *prefill*, where others may call."""
    chosen = {
        "peer.listen": f"127.0.0.1:{port}",
        "peer.name": "prefill",
        "peer.token_file": token_file(directory),
    }
    return Daemon(directory, chosen | dict(settings), limits)


def caller(
    directory: Path,
    port: int,
    settings: Mapping[str, object] = NOTHING,
    limits: Mapping[str, object] = NOTHING,
) -> Daemon:
    """Return the daemon *decode*, which calls *prefill* at *port*."""
    chosen = {
        "peer.name": "decode",
        "peer.token_file": token_file(directory),
        "peers.prefill.url": f"tcp://127.0.0.1:{port}",
    }
    return Daemon(directory, chosen | dict(settings), limits)


class ProxiedHosts:
    """The two daemons with a faulty way between them, which `proxy` spoils.

    Both give up early, so that tests of giving up are short.
    """

    LIMITS: Final = {"PULL_TROUBLE_SECONDS": 3.0, "PEER_TIMEOUT_SECONDS": 0.8}

    def __init__(self, directory: Path, settings: Mapping[str, object] = NOTHING) -> None:
        port = free_port()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.proxy = FaultyProxy(port)
        self.on_loop(self.proxy.__aenter__())
        self.prefill = called(directory / "prefill", port, settings, self.LIMITS)
        self.decode = caller(directory / "decode", self.proxy.port, settings, self.LIMITS)

    def __enter__(self) -> Self:
        try:
            self.prefill.__enter__()
            self.decode.__enter__()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.decode.stop()
        self.prefill.stop()
        self.on_loop(self.proxy.__aexit__())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(DEADLINE_SECONDS)
        self._loop.close()

    def on_loop(self, work: Coroutine[object, object, object]) -> None:
        """Run *work* where the proxy runs."""
        asyncio.run_coroutine_threadsafe(work, self._loop).result(DEADLINE_SECONDS)

    def mend(self) -> None:
        """Let everything pass again, over new connections."""

        async def mend() -> None:
            self.proxy.mend()

        self.on_loop(mend())

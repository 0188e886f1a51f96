"""Runs a daemon of one's own for as long as a block lasts."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from kvstore.client.sync import Client
from kvstore.errors import UnavailableError

_READY_SECONDS_MAX: Final = 10.0
_STOP_SECONDS_MAX: Final = 10.0
_RETRY_SECONDS: Final = 0.01


@contextmanager
def running_daemon(settings: Sequence[str] = ()) -> Generator[tuple[Path, subprocess.Popen[bytes]]]:
    """Serve on a socket in a fresh directory; give its path and the process.

    *settings* are `path=value`. Afterwards the daemon is stopped and the directory removed.
    Raises `UnavailableError` when the daemon does not get ready.
    """
    with tempfile.TemporaryDirectory(prefix="kvstore-demo-") as folder:
        socket = Path(folder) / "kvstore.sock"
        command = [sys.executable, "-m", "kvstore", "serve"]
        for setting in (f"server.socket={socket}", *settings):
            command += ["--set", setting]
        log_path = Path(folder) / "log"
        with log_path.open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            _wait_until_ready(socket, process, log_path)
            yield socket, process
        finally:
            stop(process, _STOP_SECONDS_MAX)


def _wait_until_ready(socket: Path, process: subprocess.Popen[bytes], log_path: Path) -> None:
    deadline = time.monotonic() + _READY_SECONDS_MAX
    while True:
        try:
            Client.connect(socket, name="demo").close()
        except UnavailableError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise UnavailableError(
                    f"the daemon did not get ready:\n{log_path.read_text()}"
                ) from None
            # The pause is no guess at how long it takes, only how often to ask.
            time.sleep(_RETRY_SECONDS)
        else:
            return


def stop(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Ask *process* to end, and kill it when it has not after so many *seconds*."""
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()

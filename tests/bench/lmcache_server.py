"""LMCache's standalone server in a process of its own, for as long as a block lasts."""

from __future__ import annotations

import contextlib
import os
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from deploy.demo.daemon import stop
from kvstore.limits import MIB
from tests.support.redis import free_port
from tests.support.waiting import wait_until

READY_SECONDS = 120.0
STOP_SECONDS = 30.0
QUIET = {
    "DO_NOT_TRACK": "1",
    "LMCACHE_DISABLE_BANNER": "1",
    "LMCACHE_LOG_LEVEL": "WARNING",
    "LMCACHE_TRACK_USAGE": "false",
    "PYTHONUNBUFFERED": "1",
}

# What its copies need on CPUs: otherwise torch's temporaries are mapped, faulted in and given back
# for every chunk, and OpenMP threads that wait take the processor from those that copy.
TUNED = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TOP_PAD_": str(64 * MIB),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    "OMP_WAIT_POLICY": "PASSIVE",
}


class Ports(NamedTuple):
    """Where it is asked: by engines, and over HTTP."""

    engines: int
    http: int


def environment(threads: int) -> dict[str, str]:
    """Return the environment of its processes, with so many OpenMP threads each."""
    return os.environ | QUIET | TUNED | {"OMP_NUM_THREADS": str(threads)}


@contextlib.contextmanager
def lmcache_server(
    program: Path, log: Path, env: dict[str, str], *, l1_gib: int, more: Sequence[str] = ()
) -> Iterator[tuple[Ports, subprocess.Popen[bytes]]]:
    """Serve with *program*, with *more* flags; give its ports and its process."""
    ports = Ports(free_port(), free_port())
    command = [
        *(str(program), "server", "--host", "127.0.0.1", "--port", str(ports.engines)),
        *("--http-port", str(ports.http), "--l1-size-gb", str(l1_gib), "--no-l1-use-lazy"),
        *("--eviction-policy", "LRU", "--supported-transfer-mode", "auto"),
        *("--max-cpu-workers", "2", "--shm-name", f"bench{os.getpid()}-{ports.engines}"),
        *more,
    ]
    with log.open("ab") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file, env=env)
    try:
        wait_until(
            lambda: server.poll() is not None or _is_ready(ports.http),
            seconds=READY_SECONDS,
            what=f"LMCache serves; {log}",
        )
        if server.poll() is not None:
            raise SystemExit(f"LMCache's server ended:\n{log.read_text()[-4000:]}")
        yield ports, server
    finally:
        stop(server, STOP_SECONDS)


def _is_ready(http_port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{http_port}/healthcheck", timeout=1) as it:
            return bool(it.status == 200)
    except (urllib.error.URLError, OSError):
        return False

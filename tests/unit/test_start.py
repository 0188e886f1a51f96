"""What the daemon has imported by the time that it is ready."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_a_daemon_is_ready_before_it_imports_what_can_wait_or_is_not_used(tmp_path: Path) -> None:
    program = f"""
import asyncio, gc, os, signal, sys
from kvstore import app
from kvstore.config import load

def notify(*states):
    if states[0] == "READY=1":
        print([name for name in ("aiohttp", "opentelemetry", "redis") if name in sys.modules])
        print(gc.get_freeze_count() > 10_000)
        asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.SIGTERM)

app.notify = notify
overrides = ["server.socket={tmp_path}/s", "admin.listen=127.0.0.1:0", "tiers.host.capacity=16MiB"]
app.run(load(None, {{}}, overrides))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\nTrue\n", "nothing is imported too early, and garbage is not sought"

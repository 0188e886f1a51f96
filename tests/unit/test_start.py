"""What the daemon has imported by the time that it is ready."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_serve_imports_the_admin_api_before_it_is_ready_and_redis_only_where_it_is_used(
    tmp_path: Path,
) -> None:
    program = f"""
import asyncio, os, signal, sys
from kvstore import app
from kvstore.config import load

def notify(*states):
    if states[0] == "READY=1":
        print([name for name in ("kvstore.admin.server", "redis") if name in sys.modules])
        asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.SIGTERM)

app.notify = notify
overrides = ["server.socket={tmp_path}/s", "admin.listen=127.0.0.1:0", "tiers.host.capacity=16MiB"]
app.run(load(None, {{}}, overrides))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "['kvstore.admin.server']\n"

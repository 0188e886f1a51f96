"""The example of docs/disaggregation.md runs as it is written, with engines that are none."""

from __future__ import annotations

import json
import os
import socket as sockets
import stat
import subprocess
import sys
import urllib.request
from pathlib import Path

from tests.support.waiting import wait_until

EXAMPLE = Path(__file__).parents[2] / "deploy/pd/one-host.sh"
# Stands in for vLLM's server, which it is named like; everything else is Python itself.
PYTHON = """#!{python}
import json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

if "vllm.entrypoints.openai.api_server" not in sys.argv:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
words = sys.argv[sys.argv.index("--model"):]
config = json.loads(words[words.index("--kv-transfer-config") + 1])


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({{}})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        given = {{"transfer_id": "x"}}
        self.answer(
            {{"config": config, "asked": asked, "words": words, "kv_transfer_params": given}}
        )

    def answer(self, content):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


HTTPServer(("127.0.0.1", int(words[words.index("--port") + 1])), Handler).serve_forever()
"""


def free_ports() -> int:
    """Return a port that is free, as are those 100 and 200 above it."""
    for port in range(21_000 + os.getpid() % 20_000, 64_000):
        try:
            for number in (port, port + 100, port + 200):
                with sockets.socket() as probe:
                    probe.bind(("127.0.0.1", number))
        except OSError:
            continue
        return port
    raise AssertionError("no ports are free")


def test_a_daemon_two_engines_and_the_proxy_start_serve_and_end(tmp_path):
    python, log, port = tmp_path / "python", tmp_path / "log", free_ports()
    python.write_text(PYTHON.format(python=sys.executable))
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("KVSTORE_")}
    chosen = {"PYTHON": str(python), "PORT": str(port), "HOST_CAPACITY": "16MiB"}
    with log.open("wb") as file:
        process = subprocess.Popen(
            [str(EXAMPLE), "some/model", "--max-model-len", "2048"],
            stdout=file,
            stderr=file,
            env=kept | chosen | {"TMPDIR": str(tmp_path)},
        )
    try:
        wait_until(
            lambda: process.poll() is not None or b"ready: http" in log.read_bytes(), seconds=50
        )
        assert process.poll() is None, log.read_text()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions",
            json.dumps({"prompt": "x"}).encode(),
            {"Content-Type": "application/json"},
        )
        answer = json.load(urllib.request.urlopen(request, timeout=20))
    finally:
        process.terminate()
        process.wait(30)
    assert answer["config"]["kv_role"] == "kv_consumer"
    assert answer["config"]["kv_connector_extra_config"]["chunk_tokens"] == 128
    assert answer["asked"]["kv_transfer_params"]["do_remote_prefill"] is True
    assert answer["words"][:2] == ["--model", "some/model"]
    assert answer["words"][-2:] == ["--max-model-len", "2048"]
    # Nothing is left: no process that listens, no folder.
    assert free_of_listeners(port)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "python"]


def free_of_listeners(port: int) -> bool:
    for number in (port, port + 100, port + 200):
        with sockets.socket() as probe:
            if probe.connect_ex(("127.0.0.1", number)) == 0:
                return False
    return True

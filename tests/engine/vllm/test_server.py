"""The OpenAI server, started with the configuration that `kvstore connectors vllm` prints."""

from __future__ import annotations

import json
import os
import re
import socket as sockets
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from deploy.demo.daemon import running_daemon
from tests.engine.vllm import models
from tests.engine.vllm.driver import ENVIRONMENT
from tests.support.spans import SpanReceiver
from tests.support.waiting import wait_until

START_SECONDS_MAX = 200.0
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@contextmanager
def serving(model: Path, socket: Path, log: Path, traces: str) -> Iterator[str]:
    """Run a server as a user would, which tells of requests at *traces*; give its address."""
    words = [sys.executable, "-m", "kvstore", "connectors", "vllm", "--print", "--socket", socket]
    config = subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(model), "--served-model-name", "tiny", "--dtype", "float32"]
    command += ["--enforce-eager", "--max-model-len", "2048", "--port", str(port)]
    command += ["--host", "127.0.0.1", "--kv-transfer-config", config]
    command += ["--otlp-traces-endpoint", traces]
    # In this mode the server offers to forget its own cache.
    environment = {**os.environ, **ENVIRONMENT, "VLLM_LOGGING_LEVEL": "INFO"}
    environment["VLLM_SERVER_DEV_MODE"] = "1"
    environment["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"] = "http/protobuf"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until(
            lambda: process.poll() is not None or is_healthy(address), seconds=START_SECONDS_MAX
        )
        assert process.poll() is None, log.read_text()[-4000:]
        yield address
    finally:
        process.terminate()
        process.wait(60)


def free_port() -> int:
    with sockets.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def is_healthy(address: str) -> bool:
    try:
        return urllib.request.urlopen(f"{address}/health", timeout=5).status == 200
    except OSError:
        return False


def post(url: str, body: dict[str, object]) -> str:
    headers = {"Content-Type": "application/json", "traceparent": f"00-{TRACE}-{SPAN}-01"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    return urllib.request.urlopen(request, timeout=120).read().decode()


def stream(address: str, prompt: list[int]) -> str:
    """Return the text of a streaming completion."""
    body = {
        "model": "tiny",
        "prompt": prompt,
        "max_tokens": 8,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    events = re.findall(r"^data: (\{.*\})$", post(f"{address}/v1/completions", body), re.MULTILINE)
    return "".join(json.loads(event)["choices"][0]["text"] for event in events)


def metric(address: str, name: str) -> float:
    text = urllib.request.urlopen(f"{address}/metrics", timeout=30).read().decode()
    return sum(
        float(value) for value in re.findall(rf"^{name}{{[^}}]*}} (\S+)$", text, re.MULTILINE)
    )


@pytest.fixture(scope="module")
def worded(tmp_path_factory) -> Path:
    """A model with a tokenizer, which a server needs."""
    path = models.save(tmp_path_factory.mktemp("worded"), "llama")
    models.save_tokenizer(path)
    return path


def test_a_streaming_request_is_served_from_the_daemon(worded, tmp_path):
    (prompt,) = models.prompts(1, 1100, seed=30)
    log = tmp_path / "log"
    with (
        SpanReceiver() as told,
        running_daemon(["tiers.host.capacity=256MiB", f"tracing.endpoint={told.endpoint}"]) as (
            socket,
            _,
        ),
        serving(worded, socket, log, told.endpoint) as address,
    ):
        cold = stream(address, prompt)
        assert cold
        assert metric(address, "vllm:external_prefix_cache_hits_total") == 0

        # Refused while a store is under way.
        wait_until(lambda: reset(address), what="the server forgets its own cache")
        assert stream(address, prompt) == cold
        assert metric(address, "vllm:external_prefix_cache_hits_total") == 1024
        assert metric(address, "vllm:kvstore_tokens_hit_total") == 1024
        assert metric(address, "vllm:kvstore_chunks_stored_total") == 4
        assert metric(address, "vllm:kvstore_chunks_loaded_total") == 4
        wait_until(lambda: told.named("kvstore load"), what="the daemon has told of the load")
        ours = [span for span in told.spans if span.name.startswith("kvstore ")]
        assert {(span.trace, span.parent) for span in ours} == {(TRACE, SPAN)}
        names = ("lookup", "reserve", "commit", "load")
        assert {span.name for span in ours} == {f"kvstore {name}" for name in names}
    assert re.search(r"INFO .*kvstore: LlamaForCausalLM, full; .* in namespace", log.read_text())


def reset(address: str) -> bool:
    post(f"{address}/reset_prefix_cache", {})
    return True

"""The example of docs/disaggregation.md: a daemon, two vLLM servers and the proxy, as written."""

from __future__ import annotations

import json
import os
import re
import socket as sockets
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.engine.vllm import models
from tests.engine.vllm.driver import ENVIRONMENT
from tests.engine.vllm.test_server import free_port, is_healthy, metric, post, stream
from tests.support.waiting import wait_until

EXAMPLE = Path(__file__).parents[3] / "deploy/pd/one-host.sh"
START_SECONDS_MAX = 280.0
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def free_ports() -> int:
    """Return a port that is free, as are those 100 and 200 above it."""
    for _ in range(100):
        with sockets.socket() as first:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            if port > 65_000:
                continue
            try:
                for other in (port + 100, port + 200):
                    with sockets.socket() as probe:
                        probe.bind(("127.0.0.1", other))
            except OSError:
                continue
            return port
    raise AssertionError("no ports are free")


@contextmanager
def example(model: Path, folder: Path) -> Iterator[int]:
    """Run the example; give the proxy's port."""
    template, log = folder / "template", folder / "log"
    template.write_text(TEMPLATE)
    words = [str(EXAMPLE), str(model), "--served-model-name", "tiny", "--dtype", "float32"]
    words += ["--enforce-eager", "--max-model-len", "2048", "--chat-template", str(template)]
    port = free_ports()
    chosen = {"PYTHON": sys.executable, "PORT": str(port), "HOST_CAPACITY": "256MiB"}
    # The parent has imported what its engine needs.
    chosen["VLLM_WORKER_MULTIPROCESSING_METHOD"] = "fork"
    with log.open("wb") as file:
        process = subprocess.Popen(
            words, stdout=file, stderr=file, env={**os.environ, **ENVIRONMENT, **chosen}
        )
    try:
        wait_until(
            lambda: process.poll() is not None or b"ready: http" in log.read_bytes(),
            seconds=START_SECONDS_MAX,
        )
        assert process.poll() is None, log.read_text()[-4000:]
        yield port
    finally:
        process.terminate()
        process.wait(60)


def chat(port: int, prompt: list[int]) -> str:
    """Return the text of a streaming chat."""
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": " ".join(f"w{token}" for token in prompt)}],
        "max_tokens": 8,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    answer = post(f"http://127.0.0.1:{port}/v1/chat/completions", body)
    events = [json.loads(event) for event in re.findall(r"^data: (\{.*\})$", answer, re.MULTILINE)]
    assert answer.rstrip().endswith("data: [DONE]")
    assert events[-1]["usage"]["completion_tokens"] == 8
    return "".join(
        choice["delta"].get("content") or "" for event in events for choice in event["choices"]
    )


@contextmanager
def in_turn(prefill: str, decode: str) -> Iterator[str]:
    """Run a proxy that asks *decode* when *prefill* has answered; give its address."""
    port = free_port()
    words = [sys.executable, "-m", "kvstore.connectors.pd_proxy", "--in-turn"]
    words += ["--listen", f"127.0.0.1:{port}", "--prefill", prefill, "--decode", decode]
    process = subprocess.Popen(words)
    try:
        address = f"http://127.0.0.1:{port}"
        wait_until(lambda: is_healthy(address), what="the proxy answers")
        yield address
    finally:
        process.terminate()
        process.wait(60)


def text(answer: str) -> str:
    return json.loads(answer)["choices"][0]["text"]


@pytest.mark.timeout(400)
def test_streaming_chats_are_prefilled_here_and_decoded_there(tmp_path):
    model = models.save(tmp_path, "llama")
    models.save_tokenizer(model)
    prompts = models.prompts(3, 600, seed=90)
    with example(model, tmp_path) as port:
        prefill, decode = (f"http://127.0.0.1:{port + above}" for above in (100, 200))
        answers = [chat(port, prompt) for prompt in prompts]
        assert metric(prefill, "vllm:kvstore_handoffs_opened_total") == 3
        assert metric(decode, "vllm:kvstore_handoffs_taken_total") == 3
        assert metric(decode, "vllm:kvstore_tokens_handed_total") == 3 * 512
        assert metric(decode, "vllm:kvstore_chunks_loaded_total") == 3 * 4
        assert metric(decode, "vllm:kvstore_load_failures_total") == 0
        # The same engine, without anybody's help.
        assert [chat(port + 100, prompt) for prompt in prompts] == answers

        # The first token of a completion is prefill's: decode computes the others, and nobody
        # can tell.
        asked = models.prompts(2, 600, seed=92)
        whole = [stream(prefill, prompt) for prompt in asked]
        with in_turn(prefill, decode) as proxy:
            before = metric(decode, "vllm:prompt_tokens_total")
            assert stream(proxy, asked[0]) == whole[0]
            assert metric(decode, "vllm:prompt_tokens_total") - before == 600 + 1
            # With its first token the context is full: there is no rest to ask for.
            (full,) = models.prompts(1, 2047, seed=93)
            assert stream(proxy, full) == stream(prefill, full)
        assert stream(f"http://127.0.0.1:{port}", asked[1]) == whole[1]
        assert stream(f"http://127.0.0.1:{port}", full[1:]) == stream(prefill, full[1:])
        (full,) = models.prompts(1, 2047, seed=94)
        assert stream(f"http://127.0.0.1:{port}", full) == stream(prefill, full)
        before = metric(decode, "vllm:kvstore_tokens_handed_total")
        assert metric(decode, "vllm:kvstore_load_failures_total") == 0

        # As vLLM's own proxies do it, who know nothing of what they carry.
        (other,) = models.prompts(1, 600, seed=91)
        body = {"model": "tiny", "prompt": other, "temperature": 0, "ignore_eos": True}
        remote = dict.fromkeys(("remote_engine_id", "remote_block_ids", "remote_host"))
        asked = {"do_remote_decode": True, "do_remote_prefill": False} | remote
        first = body | {"max_tokens": 1, "stream": False, "kv_transfer_params": asked}
        carried = json.loads(post(f"{prefill}/v1/completions", first))["kv_transfer_params"]
        second = body | {"max_tokens": 8}
        handed = post(f"{decode}/v1/completions", second | {"kv_transfer_params": carried})
        assert metric(decode, "vllm:kvstore_tokens_handed_total") - before == 512
        assert metric(decode, "vllm:kvstore_load_failures_total") == 0
        assert text(handed) == text(post(f"{prefill}/v1/completions", second))

        with pytest.raises(urllib.error.HTTPError) as refused:
            post(f"http://127.0.0.1:{port}/v1/chat/completions", {"model": "tiny"})
        assert refused.value.code == 400
        assert b"messages" in refused.value.read()

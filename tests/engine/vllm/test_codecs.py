"""Real engines and codecs: lossy ones are shared with transformers, lossless ones change no bit."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
import transformers

from deploy.demo.daemon import running_daemon
from kvstore.client.sync import Client
from kvstore.connectors.huggingface import PrefixReuse
from tests.engine.vllm import models
from tests.engine.vllm.driver import Engine
from tests.engine.vllm.test_sharing import CHUNK, TOKENS, WEIGHTS, complete

log = logging.getLogger(__name__)

INT4KV = {"name": "int4kv", "edge_layers": 0, "spare_sections": 0}
# Heads as wide as those of real models: what a codec adds is shared by a head's channels.
WIDE = {"num_hidden_layers": 2, "head_dim": 64}


def open_prefixes(model, socket: Path) -> PrefixReuse:
    return PrefixReuse(
        model,
        chunk_tokens=CHUNK,
        socket=socket,
        revision=WEIGHTS,
        timeout_seconds=5.0,
        codec=INT4KV,
    )


def agreement(found: list[int], expected: list[int]) -> float:
    return sum(a == b for a, b in zip(found, expected, strict=True)) / len(expected)


def test_transformers_and_vllm_share_what_a_codec_has_left(tmp_path):
    path = models.save(tmp_path, "llama", **WIDE)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    theirs, ours = models.prompts(2, 1100, seed=41)
    extra = {"revision": WEIGHTS, "codec": INT4KV}
    with running_daemon(["tiers.host.capacity=64MiB"]) as (socket, _):
        with open_prefixes(model, socket) as prefixes:
            with prefixes.begin(torch.tensor([theirs])) as past:
                expected = complete(model, torch.tensor([theirs]), past)
            report, counters = past.report, prefixes.codec_counters
            assert report.chunks_stored == 4
            assert counters.raw_bytes >= 3.4 * counters.stored_bytes == 3.4 * report.bytes_stored
        with Engine(path, socket=socket, extra=extra, dtype="bfloat16") as engine:
            warm, cold = engine.generate([theirs, ours], tokens=TOKENS)
            engine.call("settle")
            assert (warm.reused, cold.reused) == (1024, 0)
            assert engine.call("counts")["load_failures"] == 0
        with open_prefixes(model, socket) as prefixes:
            with prefixes.begin(torch.tensor([ours])) as past:
                found = complete(model, torch.tensor([ours]), past)
            assert past.report.reused_tokens == 1024
        with Client.connect(socket) as client:
            committed = client.stats().counters["commit_bytes"]
    # The engine has stored as many bytes for its prompt as transformers for the other.
    assert committed == 2 * report.bytes_stored
    alike = agreement(warm.tokens + found, expected + cold.tokens)
    log.info("%.2f times smaller; %.0f %% of tokens are those of raw", counters.ratio, 100 * alike)


def test_what_loses_nothing_changes_no_bit_of_what_an_engine_says(tmp_path):
    path = models.save(tmp_path, "llama", **WIDE)
    (asked,) = models.prompts(1, 1030, seed=42)
    with running_daemon(["tiers.host.capacity=64MiB"]) as (socket, _):
        extra = {"revision": WEIGHTS, "codec": "exp3"}
        with Engine(path, socket=socket, extra=extra, dtype="bfloat16") as engine:
            engine.generate([asked], tokens=TOKENS)
            (local,) = engine.generate([asked], tokens=TOKENS)
            engine.call("forget")
            (loaded,) = engine.generate([asked], tokens=TOKENS)
            assert engine.call("counts")["tokens_hit"] == 1024
    assert (local.reused, loaded.reused) == (1024, 1024)
    assert loaded == local

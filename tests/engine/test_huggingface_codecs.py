"""Prefix reuse with a codec: one process stores a conversation, another goes on with it."""

from __future__ import annotations

import logging
import multiprocessing
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from deploy.demo.daemon import running_daemon
from kvstore.connectors.huggingface import PrefixReuse
from kvstore.errors import ConfigError
from tests.engine import models
from tests.engine.oracle import compute, engine_alone, prompt, remember

log = logging.getLogger(__name__)

CHUNK = 256
TURN, NEXT_TURN = 1024, 1100
INT4KV = {"name": "int4kv", "edge_layers": 0, "spare_sections": 0}


def small_model():
    """Heads as wide as those of real models: what a codec adds is shared by a head's channels."""
    return models.llama(num_hidden_layers=2, head_dim=64).to(torch.bfloat16)


def open_prefixes(socket: Path, codec: object) -> PrefixReuse:
    return PrefixReuse(
        small_model(), chunk_tokens=CHUNK, socket=socket, timeout_seconds=5.0, codec=codec
    )


def store_turn(socket: Path, codec: object, answer: multiprocessing.SimpleQueue) -> None:
    torch.set_num_threads(1)
    with open_prefixes(socket, codec) as prefixes:
        with prefixes.begin(prompt(NEXT_TURN)[:, :TURN]) as past:
            compute(small_model(), prompt(NEXT_TURN)[:, :TURN], past)
        answer.put((past.report, prefixes.codec_counters))


def elsewhere(socket: Path, codec: object):
    """Store the first turn in another process; return its report and counters."""
    context = multiprocessing.get_context("spawn")
    answer = context.SimpleQueue()
    process = context.Process(target=store_turn, args=(socket, codec, answer))
    process.start()
    process.join()
    assert process.exitcode == 0
    return answer.get()


def test_a_conversation_goes_on_elsewhere_with_a_quarter_of_the_bytes():
    model, ids = small_model(), prompt(NEXT_TURN)
    with running_daemon(["tiers.host.capacity=16MiB"]) as (socket, _):
        report, counters = elsewhere(socket, INT4KV)
        with open_prefixes(socket, INT4KV) as prefixes, prefixes.begin(ids) as past:
            loaded = [layer.keys.clone() for layer in past.layers]
            answers = compute(model, ids, past).argmax(-1)
    assert (report.chunks_stored, past.report.reused_tokens) == (TURN // CHUNK, TURN)
    raw_bytes = past.report.bytes_loaded
    assert counters.raw_bytes == raw_bytes
    assert raw_bytes >= 3.4 * report.bytes_stored == 3.4 * counters.stored_bytes
    assert counters.sections == {"int4kv": 4 * TURN // CHUNK}
    own = DynamicCache(config=model.config)
    compute(model, ids[:, :TURN], own)
    for layer, keys in zip(own.layers, loaded, strict=True):
        error = (keys - layer.keys).float().norm() / layer.keys.float().norm()
        assert 0 < error < 0.15
    agreement = (answers == compute(model, ids, own).argmax(-1)).float().mean().item()
    ratio = raw_bytes / report.bytes_stored
    log.info("%.2f times smaller; %.0f %% of next tokens are those of raw", ratio, 100 * agreement)


def test_what_loses_nothing_changes_nothing():
    model, ids = small_model(), prompt(NEXT_TURN)
    with running_daemon(["tiers.host.capacity=16MiB"]) as (socket, _):
        with open_prefixes(socket, "exp3") as prefixes:
            remember(prefixes, model, ids[:, :TURN])
            stored = prefixes.codec_counters
        with open_prefixes(socket, "raw") as others:
            assert others.begin(ids).report.reused_tokens == 0
        with open_prefixes(socket, "exp3") as prefixes:
            past = prefixes.begin(ids)
            assert past.report.reused_tokens == TURN
            found = compute(model, ids, past)
    assert torch.equal(found, engine_alone(model, ids[:, :TURN], ids, TURN))
    assert stored.ratio > 1.3


def test_a_codec_that_is_unknown_is_refused_by_name():
    with pytest.raises(ConfigError, match="codec 'int3' is unknown; known are raw, int8kv"):
        PrefixReuse(small_model(), codec="int3")
    with pytest.raises(ConfigError, match="unknown field `edges`; known are name, edge_layers"):
        PrefixReuse(small_model(), codec={"name": "int4kv", "edges": 0})

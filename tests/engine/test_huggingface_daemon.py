"""Prefix reuse for transformers models through a real daemon: damage, absence, two sessions."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import DynamicCache

from deploy.demo.daemon import running_daemon
from kvstore.connectors.huggingface import PrefixReuse
from tests.engine import models
from tests.engine.damage import scramble
from tests.engine.oracle import CHUNK_TOKENS, compute, engine_alone, generate, prompt, remember


class Daemon(NamedTuple):
    socket: Path
    process: subprocess.Popen[bytes]

    def open(self, model: torch.nn.Module) -> PrefixReuse:
        # Far above what a test machine under load takes; a miss would fail the test.
        return PrefixReuse(
            model, chunk_tokens=CHUNK_TOKENS, socket=self.socket, timeout_seconds=5.0
        )


@pytest.fixture(scope="module")
def shared() -> Iterator[Daemon]:
    with running_daemon(["tiers.host.capacity=64MiB"]) as started:
        yield Daemon(*started)


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    with running_daemon(["tiers.host.capacity=16MiB"]) as started:
        yield Daemon(*started)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_another_session_reuses_what_one_has_stored(family, shared):
    model, ids = models.FAMILIES[family](), prompt(150)
    with shared.open(model) as writer:
        remember(writer, model, ids[:, :144])

    with shared.open(model) as reader:
        past = reader.begin(ids)
        assert past.report.reused_tokens == 144
        assert torch.equal(compute(model, ids, past), engine_alone(model, ids[:, :144], ids, 144))
        with reader.begin(ids) as past:
            tokens = generate(model, ids, past_key_values=past)
        assert torch.equal(tokens, generate(model, ids))


def sample_of_chunk(model, ids: torch.Tensor, index: int) -> bytes:
    """The first keys of chunk *index*, as they are stored."""
    # Without the configuration, sliding layers keep everything.
    own = DynamicCache()
    compute(model, ids, own)
    return own.layers[0].keys[0, 0, index * CHUNK_TOKENS].numpy().tobytes()


@pytest.mark.parametrize(
    ("make", "damaged"), [(models.llama, 5), (models.gemma3, 7)], ids=["llama", "gemma3"]
)
def test_a_damaged_chunk_ends_the_hit_and_is_recomputed(make, damaged, daemon):
    """In Gemma's sliding layers the damaged chunk is one that the window needs."""
    model, ids = make(), prompt(150)
    with daemon.open(model) as prefixes:
        remember(prefixes, model, ids)
        assert scramble(daemon.process.pid, sample_of_chunk(model, ids, damaged)) == 1

        past = prefixes.begin(ids)

        prefix = damaged * CHUNK_TOKENS
        assert past.report.reused_tokens == prefix
        assert torch.equal(compute(model, ids, past), engine_alone(model, ids, ids, prefix))
        with prefixes.begin(ids) as past:
            assert torch.equal(generate(model, ids, past_key_values=past), generate(model, ids))


def test_without_checksums_damaged_bytes_change_the_logits():
    model, ids = models.llama(), prompt(150)
    settings = ["tiers.host.capacity=16MiB", "tiers.host.checksum=off"]
    with running_daemon(settings) as started, Daemon(*started).open(model) as prefixes:
        remember(prefixes, model, ids)
        assert scramble(started[1].pid, sample_of_chunk(model, ids, 5)) == 1
        past = prefixes.begin(ids)
        assert past.report.reused_tokens == 144
        assert not torch.equal(compute(model, ids, past), engine_alone(model, ids, ids, 144))


def test_no_daemon_is_a_miss(tmp_path):
    model, ids = models.gemma3(), prompt(150)
    with PrefixReuse(model, chunk_tokens=CHUNK_TOKENS, socket=tmp_path / "none.sock") as prefixes:
        for _ in range(2):
            with prefixes.begin(ids) as past:
                tokens = generate(model, ids, past_key_values=past)
            assert past.report.reused_tokens == past.report.chunks_stored == 0
            assert torch.equal(tokens, generate(model, ids))


def test_a_daemon_that_dies_is_a_miss(daemon):
    model, ids = models.llama(), prompt(150)
    with daemon.open(model) as prefixes:
        remember(prefixes, model, ids[:, :80])
        past = prefixes.begin(ids)
        assert past.report.reused_tokens == 80

        daemon.process.kill()
        daemon.process.wait()

        # What was loaded before stays good; nothing can be stored or found any more.
        assert torch.equal(compute(model, ids, past), engine_alone(model, ids[:, :80], ids, 80))
        assert past.finish().chunks_stored == 0
        with prefixes.begin(ids) as past:
            assert torch.equal(generate(model, ids, past_key_values=past), generate(model, ids))
        assert past.report.reused_tokens == 0

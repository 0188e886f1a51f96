"""Prefix reuse for transformers models through a real daemon: damage, absence, two sessions."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from deploy.demo.daemon import running_daemon
from kvstore.client.sync import Client
from kvstore.compression.twins import CODEC_TWINS
from kvstore.connectors.huggingface import PrefixReuse
from kvstore.connectors.huggingface_device import Opened
from kvstore.errors import RequestError
from kvstore.gpu.device import host_bytes
from kvstore.gpu.standin import Standin
from tests.engine import models
from tests.engine.damage import scramble
from tests.engine.oracle import CHUNK_TOKENS, compute, engine_alone, generate, prompt, remember


class Daemon(NamedTuple):
    socket: Path
    process: subprocess.Popen[bytes]

    def open(self, model: torch.nn.Module, **options: object) -> PrefixReuse:
        # Far above what a test machine under load takes; a miss would fail the test.
        return PrefixReuse(
            model, chunk_tokens=CHUNK_TOKENS, socket=self.socket, timeout_seconds=5.0, **options
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


# --- models on a GPU ----------------------------------------------------------------------------


class BorrowedMemory(Standin):
    """A stand-in to which all memory of the host is its own: tensors of torch come and go."""

    def memory_at(self, address: int, size_bytes: int) -> np.ndarray:
        return host_bytes(address, size_bytes)


def standin(seed: int) -> BorrowedMemory:
    return BorrowedMemory(np.random.default_rng(seed), twins=CODEC_TWINS)


def opened(device: Standin) -> Opened:
    return Opened(device, lambda: 1)


@pytest.mark.parametrize("writer_is_there", [True, False], ids=["stores", "loads"])
@pytest.mark.parametrize(
    ("make", "codec"),
    [(models.llama, "raw"), (models.gemma3, "raw"), (models.llama, "int8kv")],
    ids=["llama", "gemma3", "llama, int8kv"],
)
def test_a_model_on_a_gpu_shares_with_one_in_host_memory(make, codec, writer_is_there, shared):
    dtype = torch.bfloat16 if codec == "raw" else torch.float32
    model, ids = make().to(dtype), prompt(150, seed=10 + writer_is_there)
    device = standin(1)
    here, there = {"codec": codec}, {"codec": codec, "open_device": lambda _: opened(device)}
    with shared.open(model, **(there if writer_is_there else here)) as writer:
        remember(writer, model, ids[:, :144])
        stored = writer.device_counters
    found = []
    for words in (here, there):
        with shared.open(model, **words) as reader:
            past = reader.begin(ids)
            assert past.report.reused_tokens == 144
            found.append(compute(model, ids, past))
            loaded = reader.device_counters
    assert torch.equal(*found)
    if codec == "raw":
        assert torch.equal(found[0], engine_alone(model, ids[:, :144], ids, 144))
    assert bool(stored) == writer_is_there
    for counters, moved, coded in (
        (stored, "chunks_stored", "encoded_chunks"),
        (loaded, "chunks_loaded", "decoded_chunks"),
    ):
        assert not counters or counters[moved] >= 9
        assert not counters or counters[coded] == (codec != "raw") * counters[moved]


def test_models_on_a_gpu_share_the_daemons_pool_in_encoded_form():
    settings = ["tiers.host.capacity=64MiB"]
    settings += ["tiers.device.gpu=standin", "tiers.device.capacity=16MiB"]
    model, ids, devices = models.llama(), prompt(150, seed=22), [standin(4), standin(5)]
    writer, reader = ({"open_device": lambda _, it=it: opened(it)} for it in devices)
    found = []
    with running_daemon(settings) as started:
        pooled = Daemon(*started)
        with pooled.open(model, codec="int8kv", **writer) as prefixes:
            remember(prefixes, model, ids[:, :144])
        for words in (reader, {}):
            with pooled.open(model, codec="int8kv", **words) as prefixes:
                past = prefixes.begin(ids)
                assert past.report.reused_tokens == 144
                found.append(compute(model, ids, past))
        with Client.connect(pooled.socket) as client:
            (tier,) = [tier for tier in client.stats().tiers if tier.tier == "device"]
    assert torch.equal(*found)
    assert tier.counters["stored_chunks"] == tier.counters["loaded_chunks"] == 9
    assert 0 < tier.counters["stored_bytes"] == tier.counters["loaded_bytes"]


def test_where_the_gpu_fails_the_prompt_is_computed(shared):
    model, ids, device = models.llama().to(torch.bfloat16), prompt(150, seed=20), standin(2)
    with shared.open(model, open_device=lambda _: opened(device)) as prefixes:
        remember(prefixes, model, ids)
        device.fail("lost", after=1)
        for tokens in (0, 144):  # the device is lost while it loads, and from then on torch does
            past = prefixes.begin(ids)
            assert past.report.reused_tokens == tokens
            compute(model, ids, past)
        assert prefixes.device_counters["lost_devices"] == 1


def test_with_staging_for_less_than_a_chunk_torch_moves_them(shared):
    model, ids, device = models.llama().to(torch.bfloat16), prompt(150, seed=21), standin(3)
    there = {"open_device": lambda _: opened(device), "gpu_staging_bytes": 1}
    with shared.open(model, **there) as prefixes:
        remember(prefixes, model, ids)
        assert prefixes.begin(ids).report.reused_tokens == 144
        assert prefixes.device_counters == {}
    with pytest.raises(RequestError, match=r"gpu_staging_bytes must lie in \[1, 8589934592\]"):
        PrefixReuse(model, gpu_staging_bytes=0)

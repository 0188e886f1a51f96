"""What an engine says of its hits, and what adapters find: nothing of each other's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.vllm import models
from tests.engine.vllm.driver import Engine


@pytest.fixture(scope="module")
def engine(llama, socket) -> Iterator[Engine]:
    with Engine(llama, socket=socket, enable_lora=True, max_lora_rank=8, events=True) as made:
        yield made


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [models.save_adapter(folder, name, seed=seed) for seed, name in enumerate("ab", 1)]


def test_adapters_never_meet_each_other_or_the_base(engine, adapters):
    asked = models.prompts(2, 600, seed=80)
    cold = {}
    for adapter in (None, *adapters):
        engine.call("forget")
        cold[adapter] = engine.generate(asked, adapter=adapter)
        assert [output.reused for output in cold[adapter]] == [0, 0]
    # The adapters do something, or this would show nothing.
    assert len({tuple(outputs[0].tokens) for outputs in cold.values()}) == 3
    for adapter, expected in cold.items():
        engine.call("forget")
        warm = engine.generate(asked, adapter=adapter)
        assert [output.reused for output in warm] == [512, 512]
        assert [output.tokens for output in warm] == [output.tokens for output in expected]


def test_routers_learn_what_the_daemon_holds(engine):
    asked = models.prompts(1, 700, seed=81)
    engine.call("forget")
    engine.call("watch_events")
    engine.generate(asked)
    engine.call("settle")
    events = engine.call("published")
    own = [hashes for kind, medium, owner, hashes in events if (kind, medium) == STORED_BY_VLLM]
    ours = [hashes for kind, medium, owner, hashes in events if owner == "kvstore"]
    assert {(kind, medium) for kind, medium, owner, _ in events if owner == "kvstore"} == {
        ("BlockStored", "CPU")
    }
    # The same blocks by the same names, as far as they fill chunks.
    blocks = [block for hashes in own for block in hashes]
    assert [block for hashes in ours for block in hashes] == blocks[:4]


STORED_BY_VLLM = ("BlockStored", "GPU")


def test_hits_are_attributed_to_the_tier_that_had_them(engine):
    asked = models.prompts(1, 700, seed=82)
    engine.generate(asked)
    engine.call("forget")
    before, sources = engine.call("counts"), engine.call("hit_sources")
    engine.generate(asked)
    after = engine.call("counts")
    name = "vllm:prompt_tokens_cached_by_source host"
    assert engine.call("hit_sources")[name] - sources[name] == 512
    assert after["tokens_hit_host"] - before["tokens_hit_host"] == 512
    assert after["tokens_hit_disk"] == before["tokens_hit_disk"] == 0

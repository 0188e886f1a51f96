"""What one engine stores and finds again: which tokens, for whom, how often, and how whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from deploy.demo.daemon import running_daemon
from kvstore.client.sync import Client
from tests.engine.damage import scramble
from tests.engine.vllm import models
from tests.engine.vllm.driver import Engine, Output

CHUNK = 256


class Served(NamedTuple):
    engine: Engine
    socket: Path
    pid: int

    def again(self, prompts: list[list[int]], **options: object) -> list[Output]:
        """Return what the engine makes of *prompts* when it has nothing cached itself."""
        self.engine.call("forget")
        return self.engine.generate(prompts, **options)

    def counters(self) -> dict[str, int]:
        with Client.connect(self.socket) as client:
            return dict(client.stats().counters)


@pytest.fixture(scope="module")
def served(llama) -> Iterator[Served]:
    settings = ["tiers.host.capacity=512MiB"]
    with running_daemon(settings) as (socket, daemon), Engine(llama, socket=socket) as engine:
        yield Served(engine, socket, daemon.pid)


@pytest.mark.parametrize(
    ("tokens", "stored"), [(100, 0), (255, 0), (256, 256), (257, 256), (1024, 1024), (4200, 4096)]
)
def test_whole_chunks_of_the_prompt_are_found_again(served, tokens, stored):
    asked = models.prompts(1, tokens, seed=tokens)
    (cold,) = served.again(asked)
    (warm,) = served.again(asked)
    # Of a prompt that is found whole the last token is computed again; vLLM does not say so.
    assert (cold.reused, warm.reused) == (0, stored)
    assert warm.tokens == cold.tokens


def test_a_longer_local_hit_is_not_loaded_again(served):
    asked = models.prompts(1, 900, seed=1)
    served.again(asked)
    before = served.engine.call("counts")
    (warm,) = served.engine.generate(asked)
    after = served.engine.call("counts")
    assert warm.reused == 896
    assert after["tokens_hit"] == before["tokens_hit"]


def test_a_local_hit_is_completed_from_the_daemon(served):
    (asked,) = models.prompts(1, 1100, seed=2)
    (cold,) = served.again([asked])
    # Three blocks: the local hit ends in the middle of a chunk.
    served.again([asked[:385]])
    before = served.engine.call("counts")["tokens_hit"]
    (warm,) = served.engine.generate([asked])
    assert warm.reused == 1024
    assert served.engine.call("counts")["tokens_hit"] - before == 1024 - 384
    assert warm.tokens == cold.tokens


def test_nothing_is_stored_twice(served):
    asked = models.prompts(3, 800, seed=3)
    served.again(asked)
    served.engine.call("settle")
    before = served.counters()["commit_chunks"]
    served.again(asked)
    served.engine.generate(asked)
    served.engine.generate([[*prompt, 7, 8, 9] for prompt in asked])
    served.engine.call("settle")
    assert served.counters()["commit_chunks"] == before


def test_answers_are_not_stored(served):
    (asked,) = models.prompts(1, 300, seed=4)
    (cold,) = served.again([asked], tokens=300)
    (warm,) = served.again([asked + cold.tokens])
    assert warm.reused == 256


def test_salts_never_meet(served):
    asked = models.prompts(1, 600, seed=5)
    assert served.again(asked, salt="one")[0].reused == 0
    assert served.again(asked, salt="two")[0].reused == 0
    assert served.again(asked)[0].reused == 0
    assert served.again(asked, salt="one")[0].reused == 512


def test_a_damaged_chunk_is_caught_and_computed(served):
    asked = models.prompts(1, 1100, seed=6)
    (cold,) = served.again(asked)
    sample = served.engine.call("value_sample", CHUNK * 2)
    assert scramble(served.pid, sample) == 1
    failures = served.engine.call("counts")["load_failures"]
    (warm,) = served.again(asked)
    assert served.engine.call("counts")["load_failures"] == failures + 1
    assert warm.tokens == cold.tokens
    # It was stored anew by the request that computed it.
    (healed,) = served.again(asked)
    assert served.engine.call("counts")["load_failures"] == failures + 1
    assert (healed.reused, healed.tokens) == (1024, cold.tokens)


def test_after_a_reset_nothing_old_is_used(served):
    asked = models.prompts(1, 600, seed=8)
    served.again(asked)
    served.engine.call("reset")
    assert served.again(asked)[0].reused == 0
    assert served.again(asked)[0].reused == 512

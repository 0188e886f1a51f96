"""A model with sliding windows: a group hits by its own rule, and holes are no chunks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.demo.daemon import running_daemon
from tests.engine.damage import scramble
from tests.engine.vllm import models
from tests.engine.vllm.driver import Engine, Output

THIRDS = list(enumerate(models.prompts(3, 1400, seed=70)))


@pytest.fixture(scope="module")
def gemma(tmp_path_factory) -> Path:
    return models.save(tmp_path_factory.mktemp("gemma"), "gemma3", **models.HYBRID)


@pytest.fixture(scope="module")
def daemon() -> Iterator[tuple[Path, int]]:
    with running_daemon(["tiers.host.capacity=512MiB"]) as (socket, process):
        yield socket, process.pid


def take(engine: Engine, prompt: list[int], name: str) -> Output:
    """Return what *engine* makes of *prompt* when it is handed over to it."""
    name = f"hybrid-{name}"
    _, params = engine.call("hand_over", prompt, {"do_remote_decode": True, "transfer_id": name}, 1)
    engine.call("forget")
    output, _ = engine.call("hand_over", prompt, params, 8)
    return output


@pytest.mark.parametrize("step_tokens", [4096, 512], ids=["whole", "chunked"])
def test_a_hit_equals_a_local_prefix_hit(gemma, daemon, step_tokens):
    asked = models.prompts(4, 1400, seed=50 + step_tokens)
    arguments = {"max_num_batched_tokens": step_tokens, "socket": daemon[0]}
    with Engine(gemma, **arguments) as writer:
        cold = writer.generate(asked)
        local = writer.generate(asked)
        writer.call("forget")
        warm = writer.generate(asked)
        counts = writer.call("counts")
        writer.call("forget")
        # It hands over to itself as it would to another engine.
        handed = [take(writer, prompt, f"{step_tokens}-{number}") for number, prompt in THIRDS]
        writer.call("forget")
        alone = writer.generate([prompt for _, prompt in THIRDS], salt="alone")
        taken = writer.call("counts")
        writer.call("forget")
        free, all_blocks = writer.call("free_blocks")
    assert counts["load_failures"] == taken["load_failures"] == 0
    assert counts["tokens_hit"] == 4 * 1280
    assert (taken["handoffs_taken"], taken["tokens_handed"]) == (3, 3 * 1280)
    assert [output.tokens for output in handed] == [output.tokens for output in alone]
    assert [output.tokens for output in warm] == [output.tokens for output in cold]
    assert warm == local
    assert free == all_blocks


def test_a_damaged_chunk_is_caught_and_computed(gemma, daemon):
    asked = models.prompts(1, 1500, seed=60)
    with Engine(gemma, socket=daemon[0]) as engine:
        (cold,) = engine.generate(asked)
        sample = engine.call("value_sample", 1200)
        assert scramble(daemon[1], sample) == 1
        engine.call("forget")
        (warm,) = engine.generate(asked)
        assert engine.call("counts")["load_failures"] == 1
        assert warm.tokens == cold.tokens

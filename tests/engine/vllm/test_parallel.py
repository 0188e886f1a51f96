"""A real engine whose heads are shared by two processes, and one that has them all."""

from __future__ import annotations

import pytest

from tests.engine.vllm import models
from tests.engine.vllm.driver import Engine

# Two workers on however few cores there are: said, because vLLM does not share them by itself.
BOUND = {"VLLM_CPU_OMP_THREADS_BIND": "0|0"}
PROMPTS = models.prompts(3, 1100, seed=90)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("writes", [1, 2])
def test_engines_of_different_parallelism_share_prefixes(llama, socket, writes):
    asked = [[writes, *prompt] for prompt in PROMPTS]
    with Engine(llama, socket=socket, tensor_parallel_size=writes, environment=BOUND) as writer:
        cold = writer.generate(asked)
        writer.call("settle")
        writer.call("forget")
        warm = writer.generate(asked)
        assert [output.reused for output in warm] == [1024] * 3
        assert [output.tokens for output in warm] == [output.tokens for output in cold]
    reads = 3 - writes
    with Engine(llama, socket=socket, tensor_parallel_size=reads, environment=BOUND) as reader:
        loaded = reader.generate(asked)
        assert reader.call("counts")["load_failures"] == 0
    assert [output.reused for output in loaded] == [1024] * 3
    assert [output.tokens for output in loaded] == [output.tokens for output in cold]

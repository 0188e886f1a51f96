"""A real engine whose heads are shared by two processes hands over to one that has them all, and
the other way around."""

from __future__ import annotations

import pytest

from tests.engine.vllm import models
from tests.engine.vllm.driver import Engine

# Two workers on however few cores there are: said, because vLLM does not share them by itself.
BOUND = {"VLLM_CPU_OMP_THREADS_BIND": "0|0"}
PROMPTS = models.prompts(3, 1100, seed=90)
TOKENS = 8


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("writes", "codec"), [(1, "raw"), (2, "int4kv")])
def test_engines_of_different_parallelism_hand_over(llama, socket, writes, codec):
    extra = {"codec": codec, "chunk_tokens": 128}
    asked = [[writes, *prompt] for prompt in PROMPTS]

    def engine(ranks: int, role: str) -> Engine:
        return Engine(
            llama,
            socket=socket,
            extra=extra,
            role=role,
            tensor_parallel_size=ranks,
            environment=BOUND,
        )

    with engine(writes, "kv_producer") as writer, engine(3 - writes, "kv_consumer") as reader:
        cold = writer.generate(asked, tokens=TOKENS)
        writer.call("settle")
        writer.call("forget")
        # What it has stored it loads itself, as the codec has left it.
        warm = writer.generate(asked, tokens=TOKENS)
        assert [output.reused for output in warm] == [1024] * 3
        if codec == "raw":
            assert [output.tokens for output in warm] == [output.tokens for output in cold]
        for prompt, expected in zip(asked, warm, strict=True):
            _, params = writer.call("hand_over", prompt, {"do_remote_decode": True}, 1)
            output, _ = reader.call("hand_over", prompt, params, TOKENS)
            assert output.tokens == expected.tokens
        counts = reader.call("counts")
    assert (counts["handoffs_taken"], counts["load_failures"]) == (3, 0)
    assert (counts["tokens_handed"], counts["lookups"]) == (3 * 1024, 0)

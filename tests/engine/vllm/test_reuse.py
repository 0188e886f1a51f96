"""A prefix that one engine has stored is a hit in another, and changes no bit of its output."""

from __future__ import annotations

import pytest

from tests.engine.vllm.driver import Engine
from tests.engine.vllm.models import prompts

CHUNK = 256


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_hit_equals_a_local_prefix_hit(llama, socket, dtype):
    asked = prompts(8, 1100)
    with Engine(llama, socket=socket, dtype=dtype) as writer:
        cold = writer.generate(asked)
        local = writer.generate(asked)
        writer.call("settle")
    assert [output.reused for output in cold] == [0] * 8
    with Engine(llama, socket=socket, dtype=dtype) as reader:
        loaded = reader.generate(asked)
        assert reader.call("counts")["load_failures"] == 0
        assert [output.reused for output in loaded] == [1024] * 8
        assert [o.tokens for o in loaded] == [o.tokens for o in local]
        assert [o.logprobs for o in loaded] == [o.logprobs for o in local]

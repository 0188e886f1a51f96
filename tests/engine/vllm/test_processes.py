"""Engines in several processes: stored by one, loaded by another, and never by a stranger."""

from __future__ import annotations

import pytest

from tests.engine.vllm import models
from tests.engine.vllm.driver import Engine


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_hit_equals_a_local_prefix_hit(llama, socket, dtype):
    asked = models.prompts(8, 1100)
    with Engine(llama, socket=socket, dtype=dtype) as writer:
        cold = writer.generate(asked)
        local = writer.generate(asked)
        writer.call("settle")
    assert [output.reused for output in cold] == [0] * 8
    assert [output.reused for output in local] == [1024] * 8
    with Engine(llama, socket=socket, dtype=dtype) as reader:
        loaded = reader.generate(asked)
        assert reader.call("counts")["load_failures"] == 0
    assert loaded == local


def test_two_engines_share_one_daemon_and_models_never_meet(llama, socket, tmp_path):
    stranger = models.save(tmp_path, "llama", seed=1)
    asked = models.prompts(4, 600, seed=20)
    with Engine(llama, socket=socket) as first, Engine(stranger, socket=socket) as other:
        cold = first.generate(asked)
        first.call("settle")
        assert [output.reused for output in other.generate(asked)] == [0] * 4
        other.call("forget")
        assert [output.reused for output in other.generate(asked)] == [512] * 4
        first.call("forget")
        warm = first.generate(asked)
        assert [output.reused for output in warm] == [512] * 4
        assert [output.tokens for output in warm] == [output.tokens for output in cold]

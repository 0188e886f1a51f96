"""An engine whose scheduler and worker are processes of their own."""

from __future__ import annotations

from deploy.demo.daemon import running_daemon
from tests.engine.vllm import models
from tests.engine.vllm.driver import Engine


def test_an_engine_of_several_processes_stores_and_loads(llama):
    asked = models.prompts(4, 1100, seed=21)
    with running_daemon(["tiers.host.capacity=256MiB"]) as (socket, _):
        with Engine(llama, socket=socket, processes=True) as writer:
            cold = writer.generate(asked)
        with Engine(llama, socket=socket, processes=True) as reader:
            warm = reader.generate(asked)
    assert [output.reused for output in warm] == [1024] * 4
    assert [output.tokens for output in warm] == [output.tokens for output in cold]

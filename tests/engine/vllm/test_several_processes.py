"""An engine whose scheduler and worker are processes of their own."""

from __future__ import annotations

from deploy.demo.daemon import running_daemon
from tests.engine.vllm import models
from tests.engine.vllm.driver import Engine


def test_an_engine_of_several_processes_loads_and_stores(llama):
    theirs, ours = models.prompts(4, 1100, seed=21), models.prompts(4, 1100, seed=22)
    with running_daemon(["tiers.host.capacity=256MiB"]) as (socket, _):
        with Engine(llama, socket=socket) as one:
            expected = one.generate(theirs)
            one.call("settle")
        with Engine(llama, socket=socket, processes=True) as several:
            warm = several.generate(theirs)
            cold = several.generate(ours)
        with Engine(llama, socket=socket) as another:
            found = another.generate(ours)
    assert [output.reused for output in warm] == [1024] * 4
    assert [output.tokens for output in warm] == [output.tokens for output in expected]
    assert [output.reused for output in cold] == [0] * 4
    assert [output.reused for output in found] == [1024] * 4
    assert [output.tokens for output in found] == [output.tokens for output in cold]

"""Hundreds of random requests, aborts and preemptions leave nothing behind and change nothing."""

from __future__ import annotations

import numpy as np

from deploy.demo.daemon import running_daemon
from kvstore.client.sync import Client
from tests.engine.vllm import models
from tests.engine.vllm.driver import Engine, Planned
from tests.support.waiting import wait_until

REQUESTS = 500
# Some eight requests at a time do not fit: there are preemptions.
BLOCKS = 48


def plan() -> list[Planned]:
    rng = np.random.default_rng(11)
    prefixes = models.prompts(30, 1100, seed=12)
    planned = []
    for number in range(REQUESTS):
        prefix = prefixes[rng.integers(len(prefixes))][: int(rng.integers(64, 1100))]
        end = rng.integers(2, 320, int(rng.integers(1, 200))).tolist()
        tokens = int(rng.integers(1, 12)) if rng.random() < 0.9 else 150
        steps = int(rng.integers(1, 8)) if rng.random() < 0.2 else 0
        planned.append(Planned(f"request-{number}", prefix + end, tokens, steps))
    return planned


def test_random_requests(llama):
    asked, arguments = plan(), {"num_gpu_blocks_override": BLOCKS, "max_num_seqs": 12}
    with Engine(llama, **arguments) as alone:
        expected = alone.call("churn", asked, 12)
    # So small that chunks are evicted all the time.
    small = ["tiers.host.capacity=48MiB"]
    with running_daemon(small) as (socket, _), Engine(llama, socket=socket, **arguments) as engine:
        found = engine.call("churn", asked, 12)
        counts = engine.call("counts")
        assert engine.call("preemptions") > 0
        assert engine.call("tracked") == 0
        engine.call("forget")
        free, all_blocks = engine.call("free_blocks")
        assert free == all_blocks
        with Client.connect(socket) as client:
            wait_until(lambda: not client.stats().reservations)
            assert client.stats().leases == 0
    assert counts["tokens_hit"] > 0
    both = found.keys() & expected.keys()
    assert len(both) > 0.7 * REQUESTS
    assert {name: found[name] for name in both} == {name: expected[name] for name in both}

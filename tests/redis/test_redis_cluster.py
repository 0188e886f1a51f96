"""A cluster of six nodes: slots on the move, a master that dies, a node that only points away."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from redis.crc import key_slot

from kvstore.errors import ConfigError, TierError
from kvstore.tiers import redis_steps
from kvstore.tiers.peer_directory import Directory
from kvstore.tiers.redis_records import Names
from kvstore.tiers.redis_settings import check_settings
from kvstore.tiers.redis_wire import ReplyError
from tests.support.making import loose_digest
from tests.support.redis_cluster import Cluster, running_cluster
from tests.support.redis_shards import (
    LARGE_BYTES,
    NAMESPACE,
    attempt,
    found,
    read,
    shard_of,
    until,
    write,
)

NAMES = Names("kvstore")

pytestmark = pytest.mark.slow


def meta_of(number: int) -> bytes:
    return NAMES.meta(NAMESPACE, loose_digest(number))


@pytest.fixture(scope="module")
def shared_cluster(tmp_path_factory):
    with running_cluster(tmp_path_factory.mktemp("cluster")) as running:
        yield running


@pytest.fixture
def cluster(shared_cluster) -> Cluster:
    shared_cluster.flush()
    return shared_cluster


async def test_chunks_spread_over_all_masters_and_are_found_in_one_call(cluster, open_tier):
    tier = await open_tier(cluster.url)
    await tier.introduce(NAMESPACE, b"manifest")
    assert all(await asyncio.gather(*(write(tier, n) for n in range(24))))
    assert await found(tier, range(30)) == list(range(24))
    assert all(await asyncio.gather(*(read(tier, n) for n in range(24))))
    assert await tier.manifest(NAMESPACE) == b"manifest"
    assert len({cluster.master_of(meta_of(n)).port for n in range(24)}) == 3
    assert tier.counters.redirects == tier.counters.failures == 0


async def test_a_directory_spans_all_masters_and_follows_a_slot_that_has_moved(cluster):
    directory = Directory(check_settings(cluster.url, timeout_seconds=5.0))
    names = [f"host-{number}" for number in range(12)]
    digest = loose_digest(1)
    try:
        for name in names:
            await directory.change(NAMESPACE, name, [digest], [])
        assert await directory.holders(NAMESPACE, [digest], names) == [[True]] * len(names)
        keys = [f"kvstore:{NAMESPACE.hex()}:held:{name}".encode() for name in names]
        assert len({cluster.master_of(key).port for key in keys}) == 3
        slot, source = key_slot(keys[0]), cluster.master_of(keys[0])
        target = next(node for node in cluster.nodes[:3] if node is not source)
        cluster.begin_migration(slot, source, target)
        cluster.migrate(keys[0], source, target)
        cluster.end_migration(slot, target)
        # What stands elsewhere by now is missed once, and found from then on.
        rows = await directory.holders(NAMESPACE, [digest], names)
        assert rows[1:] == [[True]] * (len(names) - 1)
        assert await directory.holders(NAMESPACE, [digest], names) == [[True]] * len(names)
        assert await directory.renew([NAMESPACE], names[0]) == [1]
    finally:
        directory.close()


async def test_one_living_seed_is_enough(cluster, open_tier):
    dead = "127.0.0.1:1"
    seed = f"127.0.0.1:{cluster.nodes[4].port}"
    tier = await open_tier(f"redis+cluster://{dead},{seed}")
    assert await write(tier, 1)
    assert await read(tier, 1)


async def test_a_node_given_as_a_single_server_says_what_to_write(cluster, open_tier):
    number = next(
        n for n in itertools.count() if cluster.master_of(meta_of(n)) is not cluster.nodes[0]
    )
    tier = await open_tier(cluster.nodes[0].url)
    with pytest.raises(TierError, match="redis\\+cluster://"):
        await write(tier, number)
    with pytest.raises(ConfigError, match="only database 0"):
        await open_tier(cluster.url + "/1")


async def test_a_lookup_that_is_sent_on_and_on_finds_nothing(cluster, open_tier, monkeypatch):
    tier = await open_tier(cluster.url)
    assert await write(tier, 1)

    def look(lane, *, digests, **_):
        return [ReplyError(f"MOVED 1 127.0.0.1:{cluster.nodes[0].port}") for _ in digests]

    monkeypatch.setattr(redis_steps, "look", look)
    assert await found(tier, [1, 2]) == []
    monkeypatch.undo()
    assert await found(tier, [1, 2]) == [1]
    assert tier.counters.failures == tier.counters.refusals == 0


async def test_at_every_step_of_a_migration_shards_are_read_and_written(cluster, open_tier):
    tier = await open_tier(cluster.url)
    assert await write(tier, 1, LARGE_BYTES)
    slot, source = key_slot(meta_of(1)), cluster.master_of(meta_of(1))
    target = next(node for node in cluster.nodes[:3] if node is not source)
    # Another chunk of the same slot is written in the midst of it.
    newcomer = next(n for n in itertools.count(2) if key_slot(meta_of(n)) == slot)
    cluster.begin_migration(slot, source, target)
    for key in sorted(source.do("CLUSTER", "GETKEYSINSLOT", slot, 100)):
        assert await read(tier, 1, LARGE_BYTES)
        assert await found(tier, [1], LARGE_BYTES) == [1]
        # Written in the midst of it, every key stays on the node that has it.
        assert await write(tier, 1, LARGE_BYTES)
        cluster.migrate(key, source, target)
    assert await read(tier, 1, LARGE_BYTES)
    assert await write(tier, newcomer)
    assert await read(tier, newcomer)
    cluster.end_migration(slot, target)
    assert await read(tier, 1, LARGE_BYTES)
    assert await read(tier, newcomer)
    assert await write(tier, 1, LARGE_BYTES)
    assert cluster.master_of(meta_of(1)) is target
    assert target.do("CLUSTER", "COUNTKEYSINSLOT", slot) == 1 + 3 + 1 + 1
    assert source.do("CLUSTER", "COUNTKEYSINSLOT", slot) == 0
    assert tier.counters.failures == tier.counters.quarantined == 0
    assert tier.counters.redirects > 0


async def test_a_shard_rewritten_during_a_migration_stays_whole(cluster, open_tier):
    tier = await open_tier(cluster.url)
    assert await write(tier, 1, LARGE_BYTES)
    slot, source = key_slot(meta_of(1)), cluster.master_of(meta_of(1))
    target = next(node for node in cluster.nodes[:3] if node is not source)
    cluster.begin_migration(slot, source, target)
    first, *others = sorted(source.do("CLUSTER", "GETKEYSINSLOT", slot, 100))
    cluster.migrate(first, source, target)
    source.do("DEL", NAMES.stripes(shard_of(1, LARGE_BYTES))[2].name)
    await attempt(write(tier, 1, LARGE_BYTES))
    for key in others:
        cluster.migrate(key, source, target)
    cluster.end_migration(slot, target)
    await until(lambda: write(tier, 1, LARGE_BYTES))
    assert await read(tier, 1, LARGE_BYTES)


async def test_slots_migrate_under_load(cluster, open_tier):
    tier = await open_tier(cluster.url)
    numbers = range(12)
    assert all(await asyncio.gather(*(write(tier, n) for n in numbers)))
    is_over = False

    async def load(step: int) -> list[bool | None]:
        outcomes = []
        for number in itertools.cycle(numbers[step::3]):
            if is_over:
                return outcomes
            outcomes.append(await attempt(read(tier, number)))
            outcomes.append(await attempt(write(tier, number)))
        return outcomes

    running = [asyncio.ensure_future(load(step)) for step in range(3)]
    for number in numbers:
        await asyncio.to_thread(_move_slot, cluster, key_slot(meta_of(number)))
    is_over = True
    outcomes = [it for part in await asyncio.gather(*running) for it in part]
    assert outcomes.count(True) > len(numbers)
    assert all([await read(tier, n) for n in numbers])
    assert tier.counters.redirects > 0
    assert tier.counters.quarantined == 0


def _move_slot(cluster: Cluster, slot: int) -> None:
    source = next(node for node in cluster.nodes[:3] if node.do("CLUSTER", "COUNTKEYSINSLOT", slot))
    target = cluster.nodes[(cluster.nodes.index(source) + 1) % 3]
    cluster.begin_migration(slot, source, target)
    while keys := source.do("CLUSTER", "GETKEYSINSLOT", slot, 10):
        for key in keys:
            cluster.migrate(key, source, target)
    cluster.end_migration(slot, target)


async def test_a_master_that_dies_is_replaced(tmp_path, open_tier):
    with running_cluster(tmp_path) as cluster:
        tier = await open_tier(cluster.url, timeout_seconds=0.5)
        assert all([await write(tier, n) for n in range(12)])
        victim = cluster.master_of(meta_of(0))
        theirs = [n for n in range(12) if cluster.master_of(meta_of(n)) is not victim]
        victim.do("WAIT", 1, 5000)
        victim.kill()
        assert await attempt(read(tier, 0)) is None
        # The others serve on, and what only the dead one could say is missed.
        assert await found(tier, range(14)) == theirs
        for number in theirs:
            await until(lambda number=number: read(tier, number))
        await until(lambda: write(tier, 0))
        assert await read(tier, 0)
        assert all([await attempt(write(tier, n)) for n in range(12)])
        victim.start()
        assert all([await read(tier, n) for n in range(12)])
        assert tier.counters.failures > 0
        assert tier.counters.quarantined == 0

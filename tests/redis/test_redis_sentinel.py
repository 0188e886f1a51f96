"""Sentinels: the tier follows the master wherever it goes."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from kvstore.errors import TierError
from tests.support.redis import RedisServer
from tests.support.redis_cluster import running_sentinels
from tests.support.redis_shards import attempt, read, until, write
from tests.support.waiting import wait_until

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def watch(directory, password=""):
    """Start a master, its replica, and three sentinels that watch them."""
    with contextlib.ExitStack() as running:
        master = running.enter_context(RedisServer(directory / "master", password=password))
        replica = running.enter_context(RedisServer(directory / "replica", password=password))
        replica.do("REPLICAOF", "127.0.0.1", master.port)
        wait_until(lambda: replica.do("INFO", "replication")["master_link_status"] == "up")
        wait_until(lambda: master.do("INFO", "replication")["connected_slaves"] == 1)
        ports = running.enter_context(running_sentinels(directory, master, 3))
        yield master, replica, ports


@pytest.fixture
def watched(tmp_path):
    with watch(tmp_path) as servers:
        yield servers


def url_of(ports: list[int], service: str = "cache") -> str:
    return "redis+sentinel://" + ",".join(f"127.0.0.1:{it}" for it in ports) + f"/{service}"


async def test_the_tier_follows_a_failover(watched, open_tier):
    master, replica, ports = watched
    tier = await open_tier(url_of([1, *ports]), timeout_seconds=0.5)
    assert await write(tier, 1)
    assert master.do("WAIT", 1, 5000) == 1
    master.kill()
    assert await attempt(read(tier, 1)) is None
    await until(lambda: write(tier, 2))
    assert replica.do("INFO", "replication")["role"] == "master"
    assert await read(tier, 1)
    # The former master comes back as a replica and is not written to. Sentinels would see to
    # that, too, after a while.
    master.start()
    master.do("REPLICAOF", "127.0.0.1", replica.port)
    assert await write(tier, 3)
    assert await read(tier, 3)


async def test_callers_that_give_up_early_are_led_away_from_a_silent_master(watched, open_tier):
    master, replica, ports = watched
    tier = await open_tier(url_of(ports), timeout_seconds=60.0)
    assert await write(tier, 1)

    async def hasty(number: int) -> bool:
        try:
            async with asyncio.timeout(0.3):
                return await write(tier, number)
        except TimeoutError:
            return False

    master.pause()
    assert not await hasty(2)
    await until(lambda: hasty(2))
    assert replica.do("INFO", "replication")["role"] == "master"


async def test_a_master_demoted_while_it_lives_is_left_without_a_failed_call(watched, open_tier):
    master, replica, ports = watched
    tier = await open_tier(url_of(ports))
    assert await write(tier, 1)
    with RedisServer.client_of(ports[0]) as sentinel:
        sentinel.execute_command("SENTINEL", "FAILOVER", "cache")
    wait_until(lambda: replica.do("INFO", "replication")["role"] == "master")
    master.do("REPLICAOF", "127.0.0.1", replica.port)
    await until(lambda: write(tier, 2))
    assert await read(tier, 2)


async def test_an_unknown_service_and_silent_sentinels_are_errors(watched, open_tier):
    _, _, ports = watched
    tier = await open_tier(url_of(ports, "unknown"))
    with pytest.raises(TierError, match="knows no master 'unknown'"):
        await write(tier, 1)
    nobody = await open_tier(url_of([1, 2]))
    with pytest.raises(TierError, match=r"127\.0\.0\.1:1"):
        await write(nobody, 1)


async def test_sentinels_that_want_the_servers_password_are_given_it(open_tier, tmp_path):
    file = tmp_path / "password"
    file.write_text("secret")
    with watch(tmp_path, password="secret") as (_, _, ports):
        tier = await open_tier(url_of(ports), password_file=file)
        assert await write(tier, 1)
        assert await read(tier, 1)
        stranger = await open_tier(url_of(ports))
        with pytest.raises(TierError, match=r"NOAUTH|Authentication required"):
            await write(stranger, 1)

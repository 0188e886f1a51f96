"""Servers that die, stall, fill up, refuse or lie: no wrong byte, no stuck call, and recovery."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket

import pytest

from kvstore.errors import TierError
from kvstore.limits import KIB, MIB
from kvstore.tiers.redis import RedisTier
from kvstore.tiers.redis_doctor import ACL_COMMANDS
from kvstore.tiers.redis_records import LABEL_BYTES
from kvstore.tiers.redis_settings import REMOTE_WINDOW_BYTES, Pace, check_settings
from tests.support.redis import RedisServer, free_port
from tests.support.redis_proxy import (
    Spoil,
    Swapped,
    cut,
    dripping,
    flipped_once,
    late,
    lost,
)
from tests.support.redis_shards import (
    LARGE_BYTES,
    NAMESPACE,
    PLACE,
    SIZE_BYTES,
    attempt,
    found,
    payload_of,
    read,
    shard_of,
    until,
    write,
)
from tests.support.waiting import DEADLINE_SECONDS

SHORT = {"timeout_seconds": 0.2}


async def use(tier: RedisTier, number: int = 1, size_bytes: int = LARGE_BYTES) -> list[bool | None]:
    """Do one of everything; each call ends, with a result or with the tier's error."""
    return [
        await attempt(write(tier, number, size_bytes)),
        await attempt(read(tier, number, size_bytes)),
        await attempt(_finds(tier, number, size_bytes)),
        await attempt(tier.remove(shard_of(number, size_bytes), PLACE)),
    ]


async def _finds(tier: RedisTier, number: int, size_bytes: int) -> bool:
    return await found(tier, [number], size_bytes) == [number]


async def works(tier: RedisTier, number: int = 1) -> bool:
    return await write(tier, number) and await read(tier, number)


# --- gone ----------------------------------------------------------------------------------


async def test_a_server_that_is_not_there_yet_is_found_when_it_comes(tmp_path, open_tier, caplog):
    late_server = RedisServer(tmp_path)
    with caplog.at_level(logging.INFO):
        tier = await open_tier(late_server.url, **SHORT)
        assert await use(tier) == [None] * 4
        with late_server:
            await until(lambda: works(tier))
    assert [record.getMessage() for record in caplog.records] == [
        "redis fails; the tier is skipped until it answers",
        "redis answers again",
    ]
    assert tier.counters.failures == 5


@pytest.mark.parametrize("over", ["url", "unix_url"])
async def test_a_server_that_is_killed_and_starts_again_is_used_again(own_server, open_tier, over):
    tier = await open_tier(getattr(own_server, over), **SHORT)
    assert await write(tier, 1)
    own_server.kill()
    assert await use(tier) == [None] * 4
    own_server.start()
    # Connections of the former server are noticed, and not even one call fails for them.
    assert await read(tier, 1) is False
    assert await works(tier)
    assert tier.counters.timeouts == 0


async def test_a_restart_between_two_calls_costs_none_of_them(own_server, open_tier):
    tier = await open_tier(own_server.url)
    assert await works(tier)
    own_server.kill()
    own_server.start()
    assert await works(tier)
    assert tier.counters.failures == 0


async def test_a_server_killed_under_load_fails_calls_and_gives_no_wrong_bytes(
    own_server, open_tier
):
    tier = await open_tier(own_server.url, **SHORT)
    assert all([await write(tier, n, LARGE_BYTES) for n in range(4)])
    calls = [attempt(read(tier, n % 4, LARGE_BYTES)) for n in range(16)]
    calls += [attempt(write(tier, 10 + n, LARGE_BYTES)) for n in range(8)]
    running = [asyncio.ensure_future(call) for call in calls]
    await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    own_server.kill()
    outcomes = await asyncio.gather(*running)
    assert None in outcomes
    own_server.start()
    await until(lambda: works(tier))


# --- silent --------------------------------------------------------------------------------


async def test_a_server_that_stalls_is_given_up_in_time_and_used_again(own_server, open_tier):
    tier = await open_tier(own_server.url, **SHORT)
    assert await works(tier)
    own_server.pause()
    assert await use(tier) == [None] * 4
    assert tier.counters.timeouts == 4
    own_server.pause(paused=False)
    await until(lambda: works(tier))


async def test_a_paused_server_is_given_up_and_its_late_answers_go_to_nobody(server, open_tier):
    tier = await open_tier(server.url, **SHORT)
    for number in (1, 2):
        assert await write(tier, number)
    server.do("CLIENT", "PAUSE", 600, "ALL")
    # Two chunks are asked for one after the other; what was meant for the first comes late.
    assert await attempt(read(tier, 1)) is None
    await until(lambda: read(tier, 2))
    assert tier.counters.quarantined == 0


async def test_calls_that_wait_behind_a_silent_server_fail_together(own_server, open_tier):
    tier = await open_tier(own_server.url, timeout_seconds=0.5, connections=1)
    own_server.pause()
    calls = [attempt(read(tier, n)) for n in range(100)]
    # One after the other they would take 50 s.
    async with asyncio.timeout(DEADLINE_SECONDS):
        assert set(await asyncio.gather(*calls)) == {None}
    assert tier.counters.timeouts == 100


async def test_a_black_hole_is_given_up(open_tier):
    with contextlib.ExitStack() as sockets:
        hole = sockets.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        # Once its queue is full, what comes is dropped: connecting never ends.
        for _ in range(3):
            caller = sockets.enter_context(socket.socket())
            caller.setblocking(False)
            caller.connect_ex(hole.getsockname())
        tier = await open_tier(f"redis://127.0.0.1:{hole.getsockname()[1]}", **SHORT)
        assert await use(tier) == [None] * 4
        assert tier.counters.timeouts == 5


async def test_a_server_that_takes_connections_and_says_nothing_is_given_up(open_tier):
    with socket.create_server(("127.0.0.1", 0)) as mute:
        tier = await open_tier(f"redis://127.0.0.1:{mute.getsockname()[1]}", **SHORT)
        assert await use(tier) == [None] * 4
        assert tier.counters.timeouts == 5


# --- an unreliable way ---------------------------------------------------------------------

FAULTS: dict[str, Spoil] = {
    "half-open": lost,
    "late": late(0.5),
    "dripping": dripping(1000, 0.05),
    "cut at once": cut(1, with_reset=False),
    "cut in a label": cut(70, with_reset=False),
    "cut in the bytes": cut(100_000, with_reset=False),
    "reset at once": cut(1, with_reset=True),
    "reset in the bytes": cut(LARGE_BYTES // 2, with_reset=True),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
async def test_a_bad_way_costs_time_and_nothing_else(proxy, server, open_tier, fault):
    there = await open_tier(server.url)
    assert await write(there, 5, LARGE_BYTES)
    tier = await open_tier(proxy.url, **SHORT)
    proxy.fault = fault
    outcomes = [await attempt(read(tier, 5, LARGE_BYTES)), *await use(tier, 6)]
    assert None in outcomes
    assert tier.counters.failures > 0
    proxy.mend()
    await until(lambda: works(tier))
    # Nothing half is left that could be read, and nothing whole was taken for damaged.
    assert await read(there, 5, LARGE_BYTES)
    assert await read(there, 6, LARGE_BYTES) in {True, False}
    assert tier.counters.quarantined == 0


async def test_requests_that_never_arrive_are_given_up(proxy, open_tier):
    tier = await open_tier(proxy.url, **SHORT)
    assert await works(tier)
    proxy.is_swallowing = True
    assert await use(tier) == [None] * 4
    proxy.mend()
    await until(lambda: works(tier))


@pytest.mark.parametrize("offset", [0, 3, 20, 140, SIZE_BYTES, SIZE_BYTES + LABEL_BYTES + 10])
async def test_a_bit_flipped_on_the_way_is_noticed_and_fetched_again(
    proxy, server, open_tier, offset
):
    there = await open_tier(server.url)
    assert await write(there, 1)
    tier = await open_tier(proxy.url)
    proxy.fault = flipped_once(offset)
    assert await read(tier, 1)
    assert tier.counters.connections == 2
    assert tier.counters.quarantined == 0


async def test_swapped_answers_are_never_taken_for_each_other(proxy, server, open_tier):
    there = await open_tier(server.url, ttl_seconds=0)
    for number in range(4):
        assert await write(there, number)
    tier = await open_tier(proxy.url, **SHORT)
    proxy.mend()
    proxy.fault = Swapped()
    await asyncio.gather(*(attempt(read(tier, n)) for n in range(4)))
    proxy.mend()
    for number in range(4):
        assert await write(there, number)
        await until(lambda number=number: read(tier, number))


# --- full, refusing ------------------------------------------------------------------------


async def test_a_server_that_evicts_under_us_serves_whole_chunks_or_misses(own_server, open_tier):
    own_server.do("CONFIG", "SET", "maxmemory", 64 * MIB, "maxmemory-policy", "allkeys-lru")
    tier = await open_tier(own_server.url)
    assert all([await write(tier, n, LARGE_BYTES) for n in range(16)])
    hits = [await read(tier, n, LARGE_BYTES) for n in range(16)]
    assert not all(hits)
    assert own_server.do("INFO", "stats")["evicted_keys"] > 0
    assert tier.counters.quarantined == tier.counters.failures == 0
    # What was not whole is not offered again.
    numbers = [n for n in range(16) if not hits[n]]
    assert await found(tier, numbers, LARGE_BYTES) == []
    own_server.do("CONFIG", "SET", "maxmemory", 0)
    assert await write(tier, numbers[0], LARGE_BYTES)
    assert await read(tier, numbers[0], LARGE_BYTES)


async def test_a_full_server_takes_no_more_and_keeps_no_parts(own_server, open_tier):
    own_server.do("CONFIG", "SET", "maxmemory", 16 * MIB, "maxmemory-policy", "noeviction")
    tier = await open_tier(own_server.url)
    kept = [await write(tier, n, LARGE_BYTES) for n in range(4)]
    assert kept[0] is True
    assert kept[-1] is False
    assert tier.counters.full == kept.count(False)
    assert [await read(tier, n, LARGE_BYTES) for n in range(4)] == kept
    parts = [key for key in own_server.do("KEYS", "*") if b":0-8:" in key]
    assert len(parts) == 3 * kept.count(True)
    own_server.do("CONFIG", "SET", "maxmemory", 0)
    assert await write(tier, 3, LARGE_BYTES)


async def test_a_loading_server_is_waited_for(tmp_path, open_tier):
    slow = ("--key-load-delay", "500", "--loading-process-events-interval-bytes", "1024")
    with RedisServer(tmp_path, *slow) as server:
        with server.client() as client:
            client.mset({f"other:{number}": b"x" * KIB for number in range(40_000)})
        server.do("SAVE")
        tier = await open_tier(server.url)
        assert await works(tier)
        server.kill()
        server.start()
        with pytest.raises(TierError, match="LOADING"):
            await write(tier, 2)
        server.do("CONFIG", "SET", "key-load-delay", 0)
        await until(lambda: works(tier, 2))


async def test_a_replica_refuses_writes_until_it_is_master_again(own_server, open_tier):
    tier = await open_tier(own_server.url)
    assert await works(tier)
    own_server.do("REPLICAOF", "127.0.0.1", free_port())
    with pytest.raises(TierError, match="READONLY"):
        await write(tier, 2)
    assert tier.counters.refusals == 1
    own_server.do("REPLICAOF", "NO", "ONE")
    assert await works(tier, 2)


async def test_a_wrong_password_is_said_and_its_correction_taken_without_a_restart(
    own_server, open_tier, tmp_path, caplog
):
    own_server.do("CONFIG", "SET", "requirepass", "right secret")
    file = tmp_path / "password"
    file.write_text("wrong secret\n")
    tier = await open_tier(own_server.url, password_file=file, **SHORT)
    assert await use(tier) == [None] * 4
    with pytest.raises(TierError, match=r"WRONGPASS|invalid username-password"):
        await write(tier, 1)
    assert "secret" not in caplog.text
    file.write_text("right secret\n")
    assert await works(tier)


async def test_no_password_is_said(own_server, open_tier):
    own_server.do("CONFIG", "SET", "requirepass", "secret")
    tier = await open_tier(own_server.url)
    with pytest.raises(TierError, match="NOAUTH"):
        await write(tier, 1)
    assert tier.counters.refusals == 2


async def test_the_documented_rights_are_enough_and_fewer_are_refused(
    own_server, open_tier, tmp_path
):
    file = tmp_path / "password"
    file.write_text("secret")
    rule = ("ACL", "SETUSER", "kv", "reset", "on", ">secret", "~kvstore:*")
    own_server.do(*rule, *ACL_COMMANDS.split(" "))
    url = own_server.url.replace("//", "//kv@")
    tier = await open_tier(url, password_file=file)
    await tier.introduce(NAMESPACE, b"manifest")
    assert await works(tier)
    assert await found(tier, [1]) == [1]
    assert await tier.remove(shard_of(1), PLACE)
    own_server.do("ACL", "SETUSER", "kv", "-psetex")
    with pytest.raises(TierError, match="NOPERM"):
        await write(tier, 1)
    own_server.do("ACL", "SETUSER", "kv", "+psetex")
    assert await works(tier)
    elsewhere = await open_tier(url, password_file=file, prefix="other")
    with pytest.raises(TierError, match="NOPERM"):
        await write(elsewhere, 1)


# --- given up by the caller ----------------------------------------------------------------


async def test_a_cancelled_read_leaves_its_target_alone_at_once(own_server, open_tier):
    tier = await open_tier(own_server.url)
    assert await write(tier, 1, LARGE_BYTES)
    own_server.pause()
    target = bytearray(LARGE_BYTES)
    reading = asyncio.ensure_future(tier.read(shard_of(1, LARGE_BYTES), PLACE, memoryview(target)))
    await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    before = bytes(target)
    own_server.pause(paused=False)
    assert await read(tier, 1, LARGE_BYTES)
    assert target == before


async def test_cancelled_writes_leave_nothing_that_can_be_read_half(server, open_tier):
    tier = RedisTier(
        check_settings(server.url, timeout_seconds=5.0), pace=Pace(2, REMOTE_WINDOW_BYTES)
    )
    for yields in range(12):
        writing = asyncio.ensure_future(
            tier.write(shard_of(1, LARGE_BYTES), memoryview(payload_of(1, LARGE_BYTES)))
        )
        for _ in range(yields):
            await asyncio.sleep(0)
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        if await found(tier, [1], LARGE_BYTES):
            assert await read(tier, 1, LARGE_BYTES)
    tier.close()


async def test_closing_ends_what_is_under_way(own_server, open_tier):
    tier = await open_tier(own_server.url, timeout_seconds=60.0)
    assert await works(tier)
    own_server.pause()
    reading = asyncio.ensure_future(read(tier, 1))
    while not reading.done():
        await asyncio.sleep(0)
        tier.close()
    with pytest.raises(TierError):
        await reading
    with pytest.raises(TierError):
        await write(tier, 1)
    tier.close()

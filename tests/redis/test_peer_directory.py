"""The directory of what hosts hold, over real servers: told, renewed, expired, altered, away."""

from __future__ import annotations

import asyncio

import pytest

from kvstore.errors import TierError
from kvstore.limits import DIRECTORY_TTL_SECONDS
from kvstore.tiers.peer_directory import Directory
from kvstore.tiers.redis_settings import check_settings
from kvstore.types import NamespaceId
from tests.support.making import loose_digest
from tests.support.waiting import DEADLINE_SECONDS

SPACE, OTHER = NamespaceId(b"s" * 16), NamespaceId(b"o" * 16)
DIGESTS = [loose_digest(number) for number in range(5)]
KEY = f"kvstore:{SPACE.hex()}:held:one"


@pytest.fixture
def open_directory():
    opened: list[Directory] = []

    def open_one(url: str, timeout_seconds: float = 5.0) -> Directory:
        opened.append(Directory(check_settings(url, timeout_seconds=timeout_seconds)))
        return opened[-1]

    yield open_one
    for directory in opened:
        directory.close()


async def held(directory: Directory, name: str = "one", namespace: NamespaceId = SPACE):
    (row,) = await directory.holders(namespace, DIGESTS, [name])
    return [number for number, is_held in enumerate(row) if is_held]


async def held_again(directory: Directory) -> list[int]:
    """Return the same as soon as it is said in time, however busy this machine is."""
    loop = asyncio.get_running_loop()
    ends_at = loop.time() + DEADLINE_SECONDS
    while True:
        try:
            return await held(directory)
        except TierError:
            if loop.time() > ends_at:
                raise


async def test_what_one_host_says_another_hears_by_name_and_namespace(server, open_directory):
    one, other = open_directory(server.url), open_directory(server.unix_url)
    assert await one.change(SPACE, "one", DIGESTS[:3], []) == 3
    await other.change(SPACE, "other", DIGESTS[2:], [])
    # Two that are there come, one leaves that is, and one that is not.
    assert await one.change(SPACE, "one", DIGESTS[1:4], [DIGESTS[0], DIGESTS[4]]) == 0
    rows = await other.holders(SPACE, DIGESTS, ["other", "nobody", "one"])
    assert rows == [
        [False, False, True, True, True],
        [False] * 5,
        [False, True, True, True, False],
    ]
    assert await held(other, namespace=OTHER) == []
    assert await held(other, "on") == await held(other, "ONE") == []


async def test_what_is_not_renewed_ends_and_that_is_noticed(server, open_directory):
    one = open_directory(server.url)
    await one.change(SPACE, "one", DIGESTS, [])
    assert 0 < server.do("PTTL", KEY) <= DIRECTORY_TTL_SECONDS * 1000
    server.do("PEXPIRE", KEY, 10_000)
    assert await one.renew([SPACE, OTHER], "one") == [5, 0]
    assert server.do("PTTL", KEY) > 10_000
    server.do("PEXPIRE", KEY, 0)
    assert await held(one) == []
    assert await one.renew([SPACE], "one") == [0]
    await one.change(SPACE, "one", DIGESTS, [])
    await one.withdraw([SPACE, OTHER], "one")
    assert server.do("EXISTS", KEY) == 0


async def test_a_thousand_chunks_take_a_handful_of_commands_and_little_memory(
    server, open_directory
):
    one = open_directory(server.unix_url)
    await one.probe()
    many = [loose_digest(number) for number in range(1000)]
    before = server.do("INFO", "stats")["total_commands_processed"]
    await one.change(SPACE, "one", many[:500], [])
    await one.change(SPACE, "one", many[500:], [])
    (row,) = await one.holders(SPACE, many[:256], ["one"])
    assert all(row)
    # The server counts those of the test, too.
    assert server.do("INFO", "stats")["total_commands_processed"] - before < 20
    assert server.do("MEMORY", "USAGE", KEY) < 150 * len(many)


async def test_what_stands_there_and_is_no_set_is_nothing_and_not_overwritten(
    server, open_directory
):
    one = open_directory(server.url)
    server.do("SET", KEY, "of another program")
    assert await held(one) == []
    with pytest.raises(TierError, match="WRONGTYPE"):
        await one.change(SPACE, "one", DIGESTS, [])
    assert await one.renew([SPACE], "one") == [0]
    await one.withdraw([SPACE], "one")
    assert server.do("GET", KEY) == b"of another program"
    assert server.do("PTTL", KEY) == -1


async def test_a_silent_server_fails_the_call_in_its_time_and_is_found_again(
    own_server, open_directory
):
    await open_directory(own_server.url).change(SPACE, "one", DIGESTS, [])
    one = open_directory(own_server.url, timeout_seconds=0.2)
    assert await held_again(one) == [0, 1, 2, 3, 4]
    own_server.pause()
    for call in (one.probe, lambda: held(one), lambda: one.renew([SPACE], "one")):
        with pytest.raises(TierError, match="directory: "):
            await call()
    own_server.pause(paused=False)
    assert await held_again(one) == [0, 1, 2, 3, 4]
    own_server.kill()
    with pytest.raises(TierError, match="directory: "):
        await held(one)
    own_server.start()
    assert await held_again(one) == []


async def test_a_server_without_memory_for_more_says_so(own_server, open_directory):
    one = open_directory(own_server.url)
    own_server.do("CONFIG", "SET", "maxmemory", "1")
    with pytest.raises(TierError, match="OOM"):
        await one.change(SPACE, "one", DIGESTS, [])
    # What takes no memory is still done.
    await one.withdraw([SPACE], "one")
    assert await held(one) == []

"""Real servers, and tiers over them. Every tier of a test is closed with it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest

from kvstore.tiers.redis import RedisTier, open_redis_tier
from tests.support.redis import SERVER, RedisServer
from tests.support.redis_proxy import FaultyProxy

OpenTier = Callable[..., Awaitable[RedisTier]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if SERVER is None:
        for item in items:
            if "tests/redis/" in item.path.as_posix():
                item.add_marker(pytest.mark.skip(reason="redis-server is not installed"))


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory) -> Iterator[RedisServer]:
    """Return a server that all tests of a module use."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture
def server(shared_server) -> RedisServer:
    """Return the module's server, empty and with its default settings; none may stop it."""
    shared_server.do("FLUSHALL")
    return shared_server


@pytest.fixture
def own_server(tmp_path) -> Iterator[RedisServer]:
    """Return a server that one test may do anything to."""
    with RedisServer(tmp_path / "redis") as running:
        yield running


@pytest.fixture
async def open_tier() -> AsyncIterator[OpenTier]:
    """Return a function that opens a tier with a short timeout."""
    tiers: list[RedisTier] = []

    async def open_one(url: str, **options: object) -> RedisTier:
        tiers.append(await open_redis_tier(url, **({"timeout_seconds": 5.0} | options)))
        return tiers[-1]

    yield open_one
    for tier in tiers:
        tier.close()


@pytest.fixture
async def proxy(server) -> AsyncIterator[FaultyProxy]:
    """Return a faulty way to the module's server."""
    async with FaultyProxy(server.port) as running:
        yield running

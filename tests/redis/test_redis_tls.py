"""TLS: bytes pass whole, and no server is trusted that the authority has not vouched for."""

from __future__ import annotations

import asyncio

import pytest

from kvstore.errors import TierError
from tests.support.redis import RedisServer
from tests.support.redis_shards import LARGE_BYTES, NAMESPACE, found, read, until, write
from tests.support.redis_tls import make_certificates


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    return make_certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def tls_server(certificates, tmp_path_factory):
    directory = tmp_path_factory.mktemp("redis")
    with RedisServer(directory, *certificates.options, tls=True) as running:
        running.do("CONFIG", "SET", "requirepass", "secret")
        yield running


@pytest.fixture
def url(tls_server) -> str:
    return f"rediss://127.0.0.1:{tls_server.port}/3"


@pytest.fixture
def password_file(tmp_path):
    file = tmp_path / "password"
    file.write_text("secret\n")
    return file


async def test_shards_pass_over_tls(url, open_tier, certificates, password_file):
    tier = await open_tier(url, ca_file=certificates.authority, password_file=password_file)
    await tier.introduce(NAMESPACE, b"manifest")
    assert all(await asyncio.gather(*(write(tier, n, LARGE_BYTES) for n in range(6))))
    assert all(await asyncio.gather(*(read(tier, n, LARGE_BYTES) for n in range(6))))
    assert await found(tier, range(7), LARGE_BYTES) == list(range(6))
    assert tier.counters.failures == 0


async def test_the_database_of_the_url_is_used(
    url, tls_server, open_tier, certificates, password_file
):
    tier = await open_tier(url, ca_file=certificates.authority, password_file=password_file)
    assert await write(tier, 50)
    with tls_server.client(password="secret", db=3) as third:
        assert third.dbsize() > 0
    with tls_server.client(password="secret") as first:
        assert first.dbsize() == 0


async def test_a_server_of_another_authority_is_not_trusted(
    url, open_tier, tmp_path, password_file
):
    other = make_certificates(tmp_path / "other")
    tier = await open_tier(url, ca_file=other.authority, password_file=password_file)
    with pytest.raises(TierError, match="certificate verify failed"):
        await write(tier, 1)


async def test_a_certificate_for_another_host_is_not_trusted(tmp_path, open_tier):
    wrong = make_certificates(tmp_path / "wrong", "DNS:another.example")
    with RedisServer(tmp_path / "redis", *wrong.options, tls=True) as server:
        tier = await open_tier(f"rediss://127.0.0.1:{server.port}", ca_file=wrong.authority)
        with pytest.raises(TierError, match="certificate verify failed"):
            await write(tier, 1)


async def test_a_server_without_tls_is_an_error(server, open_tier, certificates):
    tier = await open_tier(f"rediss://127.0.0.1:{server.port}", ca_file=certificates.authority)
    with pytest.raises(TierError):
        await write(tier, 1)


async def test_a_tls_server_that_stalls_or_restarts_is_used_again(
    tmp_path, open_tier, certificates
):
    with RedisServer(tmp_path / "redis", *certificates.options, tls=True) as server:
        url = f"rediss://127.0.0.1:{server.port}"
        tier = await open_tier(url, ca_file=certificates.authority, timeout_seconds=0.5)
        assert await write(tier, 1, LARGE_BYTES)
        server.pause()
        with pytest.raises(TierError):
            await read(tier, 1, LARGE_BYTES)
        server.pause(paused=False)
        await until(lambda: read(tier, 1, LARGE_BYTES))
        server.kill()
        server.start()
        await until(lambda: write(tier, 1, LARGE_BYTES))
        assert await read(tier, 1, LARGE_BYTES)

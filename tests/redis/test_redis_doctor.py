"""Every mistake around Redis is found, and its fix named."""

from __future__ import annotations

import pytest

from kvstore.limits import MIB
from kvstore.tiers.peer_directory import Directory
from kvstore.tiers.redis_doctor import (
    ACL_COMMANDS,
    SHARING_COMMANDS,
    RedisFinding,
    examine_redis,
)
from kvstore.tiers.redis_settings import check_settings
from kvstore.types import NamespaceId
from tests.support.making import loose_digest
from tests.support.redis import RedisServer, free_port
from tests.support.redis_tls import make_certificates


async def examine(url: str, **options: object) -> dict[str, RedisFinding]:
    settings = check_settings(url, **({"timeout_seconds": 5.0} | options))
    findings = await examine_redis(settings)
    return {finding.check: finding for finding in findings}


async def test_a_server_as_it_should_be_has_no_fixes(own_server):
    own_server.do("CONFIG", "SET", "maxmemory", 64 * MIB, "maxmemory-policy", "allkeys-lru")
    for url in (own_server.url, own_server.unix_url):
        findings = await examine(url)
        assert {it.verdict for it in findings.values()} == {"ok"}
        assert set(findings) == {
            "redis", "redis version", "redis mode", "redis memory", "redis rights",
        }  # fmt: skip
    assert own_server.do("DBSIZE") == 0


async def test_an_unreachable_server_is_said(tmp_path):
    finding = (await examine(f"redis://127.0.0.1:{free_port()}"))["redis"]
    assert (finding.verdict, finding.fix) == ("fail", "start it, or correct host and port")
    finding = (await examine(f"unix://{tmp_path}/none"))["redis"]
    assert finding.fix == "start it, or correct the path of its socket"


async def test_a_silent_server_is_said(own_server):
    own_server.pause()
    finding = (await examine(own_server.url, timeout_seconds=0.2))["redis"]
    assert finding.verdict == "fail"
    assert "timeout" in finding.fix


async def test_limits_of_memory_and_policy_are_judged(own_server):
    assert (await examine(own_server.url))["redis memory"].fix.startswith("set maxmemory and")
    own_server.do("CONFIG", "SET", "maxmemory", 64 * MIB)
    assert "once full" in (await examine(own_server.url))["redis memory"].fix
    own_server.do("CONFIG", "SET", "maxmemory-policy", "allkeys-random")
    assert (await examine(own_server.url))["redis memory"].verdict == "warn"
    own_server.do("CONFIG", "SET", "maxmemory-policy", "noeviction", "maxmemory", 1)
    assert "raise maxmemory" in (await examine(own_server.url))["redis rights"].fix


async def test_passwords_and_rights_are_judged(own_server, tmp_path):
    file = tmp_path / "password"
    file.write_text("secret")
    file.chmod(0o644)
    findings = await examine(own_server.url, password_file=file)
    assert findings["redis password"].fix == f"chmod 0640 {file}"
    assert "has no password" in findings["redis"].fix
    own_server.do("CONFIG", "SET", "requirepass", "other")
    assert "right password" in (await examine(own_server.url, password_file=file))["redis"].fix
    assert "wants a password" in (await examine(own_server.url))["redis"].fix
    own_server.password = "other"
    rule = ("ACL", "SETUSER", "kv", "reset", "on", ">secret", "~kvstore:*")
    own_server.do(*rule, *ACL_COMMANDS.split())
    url = own_server.url.replace("//", "//kv@")
    file.chmod(0o600)
    findings = await examine(url, password_file=file)
    assert findings["redis rights"].verdict == findings["redis password"].verdict == "ok"
    settings = check_settings(url, password_file=file, timeout_seconds=5.0)
    (rights,) = (await examine_redis(settings, shares=True))[-1:]
    assert rights.verdict == "fail"
    assert SHARING_COMMANDS in rights.fix
    own_server.do("ACL", "SETUSER", "kv", *SHARING_COMMANDS.split())
    assert (await examine_redis(settings, shares=True))[-1].verdict == "ok"
    # All that a directory does is among them.
    directory = Directory(settings)
    await directory.probe()
    await directory.change(NamespaceId(bytes(16)), "one", [loose_digest(1)], [loose_digest(2)])
    assert await directory.renew([NamespaceId(bytes(16))], "one") == [1]
    assert await directory.holders(NamespaceId(bytes(16)), [loose_digest(1)], ["one"]) == [[True]]
    await directory.withdraw([NamespaceId(bytes(16))], "one")
    directory.close()
    own_server.do("ACL", "SETUSER", "kv", "-unlink")
    assert ACL_COMMANDS in (await examine(url, password_file=file))["redis rights"].fix


async def test_a_replica_and_a_cluster_are_noticed(own_server, tmp_path):
    own_server.do("REPLICAOF", "127.0.0.1", free_port())
    assert "its master" in (await examine(own_server.url))["redis mode"].fix
    url = own_server.url.replace("redis:", "redis+cluster:")
    assert "in place of" in (await examine(url))["redis"].fix
    with RedisServer(tmp_path / "node", "--cluster-enabled", "yes") as node:
        assert "redis+cluster://" in (await examine(node.url))["redis mode"].fix


async def test_tls_mistakes_are_named(tmp_path, server):
    right, wrong = make_certificates(tmp_path / "right"), make_certificates(tmp_path / "wrong")
    with RedisServer(tmp_path / "redis", *right.options, tls=True) as secure:
        url = f"rediss://127.0.0.1:{secure.port}"
        good = (await examine(url, ca_file=right.authority))["redis"]
        assert good.verdict == "ok", good
        assert "ca_file" in (await examine(url, ca_file=wrong.authority))["redis"].fix
        plain = (await examine(url.replace("rediss", "redis")))["redis"]
        assert plain.fix == "if it speaks TLS, write rediss:// in place of redis://"
    secure_url = server.url.replace("redis:", "rediss:")
    over = (await examine(secure_url, ca_file=right.authority, timeout_seconds=0.5))["redis"]
    assert over.fix.startswith("write redis:// in place of rediss:// if it speaks no TLS")


@pytest.mark.parametrize("version", ["6.0.9", "unknown"])
async def test_an_old_server_is_refused(version):
    from kvstore.tiers.redis_doctor import _check_version

    assert _check_version({"redis_version": version}).verdict == "fail"
    assert _check_version({"redis_version": "7.2.4", "valkey_version": "8.1.0"}).verdict == "ok"

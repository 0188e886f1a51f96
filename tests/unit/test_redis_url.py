"""URLs and settings of the Redis tier: every form, and what each mistake is answered with."""

from __future__ import annotations

import pytest

from kvstore.errors import ConfigError
from kvstore.tiers.redis_settings import LOCAL_WINDOW_BYTES, Pace, check_settings
from kvstore.tiers.redis_url import Address, Form, RedisUrl, parse_url

A, B = Address("a", 6379), Address("b", 7000)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("redis://a", RedisUrl(Form.STANDALONE, (A,), False, "", "", 0)),
        ("redis://a/", RedisUrl(Form.STANDALONE, (A,), False, "", "", 0)),
        ("redis://kv@b:7000/3", RedisUrl(Form.STANDALONE, (B,), False, "kv", "", 3)),
        ("rediss://a", RedisUrl(Form.STANDALONE, (A,), True, "", "", 0)),
        (
            "redis://[::1]:7000",
            RedisUrl(Form.STANDALONE, (Address("::1", 7000),), False, "", "", 0),
        ),
        (
            "unix:///run/redis.sock",
            RedisUrl(Form.STANDALONE, (Address("/run/redis.sock", 0),), False, "", "", 0),
        ),
        (
            "unix://kv@/run/a%20b?db=2",
            RedisUrl(Form.STANDALONE, (Address("/run/a b", 0),), False, "kv", "", 2),
        ),
        (
            "redis+sentinel://a,b:7000/cache/1",
            RedisUrl(Form.SENTINEL, (Address("a", 26379), B), False, "", "cache", 1),
        ),
        (
            "rediss+sentinel://kv@a:1/cache",
            RedisUrl(Form.SENTINEL, (Address("a", 1),), True, "kv", "cache", 0),
        ),
        ("redis+cluster://a,b:7000", RedisUrl(Form.CLUSTER, (A, B), False, "", "", 0)),
        ("rediss+cluster://kv@b:7000/", RedisUrl(Form.CLUSTER, (B,), True, "kv", "", 0)),
    ],
)
def test_every_form_is_understood(text: str, expected: RedisUrl) -> None:
    assert parse_url(text) == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is not understood"),
        ("a:6379", "is not understood"),
        ("http://a", "is not understood"),
        ("redis://", "0 hosts"),
        ("redis://a,b", "only sentinel and cluster forms take several"),
        ("redis://a:0", "no host with a port"),
        ("redis://a:70000", "out of range"),
        ("redis://a:x", "Port"),
        ("redis://a/x", "no number of a database"),
        ("redis://a/-1", "no number of a database"),
        ("redis://a?db=1", "nothing may follow"),
        ("unix://run/redis.sock", "three slashes"),
        ("unix:///", "three slashes"),
        ("unix:///run/s?x=1", "only \\?db="),
        ("redis+sentinel://a", "service is missing"),
        ("redis+sentinel://a/", "service is missing"),
        ("redis+cluster://a/1", "only database 0"),
        ("redis+cluster://" + ",".join("a" * 65), "65 hosts; 1 to 64"),
    ],
)
def test_every_mistake_is_named(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        parse_url(text)


@pytest.mark.parametrize("text", ["redis://kv:hunter2@a", "redis://:hunter2@a", "x://:hunter2@a"])
def test_a_password_in_the_url_is_refused_and_never_shown(text: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_url(text)
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize(
    ("address", "shown", "is_local"),
    [
        (Address("127.0.0.2", 1), "127.0.0.2:1", True),
        (Address("::1", 1), "[::1]:1", True),
        (Address("/run/s", 0), "/run/s", True),
        (Address("redis.example", 1), "redis.example:1", False),
    ],
)
def test_an_address_says_where_it_is(address: Address, shown: str, is_local: bool) -> None:
    assert (str(address), address.is_local) == (shown, is_local)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"prefix": ""}, "prefix ''"),
        ({"prefix": "a{b}"}, "letters, digits"),
        ({"prefix": "a" * 65}, "1 to 64"),
        ({"ttl_seconds": -1.0}, "ttl is -1"),
        ({"connections": 0}, "connections is 0; 1 to 32"),
        ({"connections": 33}, "connections is 33"),
        ({"timeout_seconds": 0.001}, "timeout is 0.001"),
        ({"timeout_seconds": 61.0}, "timeout is 61"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        check_settings("redis://a", **options)


def test_files_are_checked_at_the_start(tmp_path) -> None:
    missing, long, binary = tmp_path / "missing", tmp_path / "long", tmp_path / "binary"
    long.write_bytes(b"x" * 5000)
    binary.write_bytes(b"\xff\xfe")
    for file, reason in ((missing, "No such file"), (long, "4096 bytes"), (binary, "UTF-8")):
        with pytest.raises(ConfigError, match=reason):
            check_settings("redis://a", password_file=file)
    with pytest.raises(ConfigError, match="No such file"):
        check_settings("rediss://a", ca_file=missing)
    with pytest.raises(ConfigError, match="write rediss://"):
        check_settings("redis://a", ca_file=long)


def test_the_secret_is_the_first_line_and_read_anew_each_time(tmp_path) -> None:
    file = tmp_path / "password"
    file.write_text("one\r\nnot this\n")
    settings = check_settings("redis://kv@a", password_file=file)
    assert settings.access().password == "one"
    file.write_text("two")
    assert settings.access().password == "two"
    assert settings.access(with_password=False)[:2] == ("", "")


def test_servers_on_this_host_are_used_one_stripe_at_a_time() -> None:
    assert check_settings("unix:///run/s").pace == Pace(1, LOCAL_WINDOW_BYTES, stores_singly=True)
    far = check_settings("redis://redis.example", connections=7).pace
    assert (far.lanes, far.store_window) == (7, far.window)
    assert check_settings("redis+cluster://127.0.0.1,b", connections=7).pace.lanes == 7

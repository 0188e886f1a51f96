"""Checks of the Redis servers that a daemon is to use, each with the fix in words."""

from __future__ import annotations

import asyncio
import stat
import statistics
import time
from collections.abc import Mapping
from functools import partial
from typing import Final, Literal, NamedTuple

from kvstore.tiers.redis_counters import RedisCounters
from kvstore.tiers.redis_lanes import Budget
from kvstore.tiers.redis_routes import Routes, call
from kvstore.tiers.redis_settings import RedisSettings
from kvstore.tiers.redis_steps import RefusedError
from kvstore.tiers.redis_url import Form
from kvstore.tiers.redis_wire import Command, LaneError, LaneTimeoutError, Reply, ReplyError
from kvstore.units import round_size

ACL_COMMANDS: Final = (
    "+get +set +psetex +strlen +hget +hset +hdel +hrandfield +unlink +pexpire +multi +exec +ping "
    "+select +info"
)
"""What a user needs; `+cluster|slots +asking` besides in a cluster."""

SHARING_COMMANDS: Final = "+sadd +srem +smismember +scard"
"""What it needs besides where hosts share what they hold (peer.share)."""

_VERSION_MIN: Final = (6, 2)
_PINGS: Final = 10
_SLOW_SECONDS: Final = 0.005


class RedisFinding(NamedTuple):
    """The outcome of one check; *fix* is empty when there is nothing to do."""

    check: str
    verdict: Literal["ok", "warn", "fail"]
    found: str
    fix: str = ""


async def examine_redis(settings: RedisSettings, *, shares: bool = False) -> list[RedisFinding]:
    """Return the outcome of every check that can be made; each takes a few timeouts at most.

    With *shares*, the servers are to keep the directory of what hosts hold, too.
    """
    routes = Routes(settings, RedisCounters())
    try:
        findings = [*_check_secret(settings)]
        try:
            facts = await _ask_facts(routes, settings)
            pings = [await _ping(routes, settings) for _ in range(_PINGS)]
        except (LaneError, RefusedError) as error:
            return [*findings, _unreachable(settings, error)]
        findings += [
            _check_latency(settings, pings),
            _check_version(facts),
            _check_mode(settings, facts),
            _check_memory(facts),
            await _check_rights(routes, settings, shares=shares),
        ]
        return findings
    finally:
        routes.close()


def _check_secret(settings: RedisSettings) -> list[RedisFinding]:
    file = settings.password_file
    if file is None:
        return []
    mode = stat.S_IMODE(file.stat().st_mode)
    if mode & (stat.S_IRWXO | stat.S_IWGRP):
        found = f"{file} has mode {mode:04o}: others can read or change it"
        return [RedisFinding("redis password", "warn", found, f"chmod 0640 {file}")]
    return [RedisFinding("redis password", "ok", f"{file}, mode {mode:04o}")]


async def _ask_facts(routes: Routes, settings: RedisSettings) -> dict[str, str]:
    (reply,) = await _run(routes, settings, [(b"INFO",)])
    if isinstance(reply, ReplyError):
        raise RefusedError(reply)
    text = reply.decode(errors="replace") if isinstance(reply, bytes) else ""
    pairs = (line.partition(":") for line in text.splitlines() if ":" in line)
    return {name: value for name, _, value in pairs}


async def _ping(routes: Routes, settings: RedisSettings) -> float:
    began = time.perf_counter()
    await _run(routes, settings, [(b"PING",)])
    return time.perf_counter() - began


async def _run(
    routes: Routes, settings: RedisSettings, commands: list[Command], key: bytes = b""
) -> list[Reply]:
    budget = Budget(settings.timeout_seconds)
    return await routes.at_home(key, partial(call, commands=commands), budget)


def _unreachable(settings: RedisSettings, error: LaneError | RefusedError) -> RedisFinding:
    reason = str(error)
    fixes = (
        ("certificate verify failed", "set ca_file to the authority that signed its certificate"),
        ("WRONGPASS", "put the right password into password_file, or the right user into the url"),
        ("invalid username-password", "put the right password into password_file"),
        ("without any password configured", "remove password_file: this server has no password"),
        ("NOAUTH", "set password_file: this server wants a password"),
        ("Authentication required", "set password_file: this server wants a password"),
        ("NOPERM", f"give the user its rights: ~{settings.prefix}:* {ACL_COMMANDS}"),
        ("no permissions", f"give the user its rights: ~{settings.prefix}:* {ACL_COMMANDS}"),
        ("LOADING", "wait until it has loaded its keys"),
        ("knows no master", "name the service as the sentinels do"),
        ("cluster support disabled", "write redis:// in place of redis+cluster://"),
        ("DB index is out of range", "choose a database that the server has"),
        ("closed the connection", "if it speaks TLS, write rediss:// in place of redis://"),
        ("reset by peer", "if it speaks TLS, write rediss:// in place of redis://"),
        ("Connection refused", "start it, or correct host and port"),
        ("No such file", "start it, or correct the path of its socket"),
    )
    fix = next((advice for part, advice in fixes if part.lower() in reason.lower()), "")
    if not fix and isinstance(error, LaneTimeoutError):
        fix = "check the way to it (firewall, route), or raise the timeout"
        if settings.url.tls:
            fix = f"write redis:// in place of rediss:// if it speaks no TLS; else {fix}"
    return RedisFinding(
        "redis", "fail", reason, fix or "see its log; the daemon serves without it meanwhile"
    )


def _check_latency(settings: RedisSettings, pings: list[float]) -> RedisFinding:
    middle = statistics.median(pings)
    places = ", ".join(map(str, settings.url.seeds))
    found = f"{places} answers in {middle * 1e3:.2f} ms"
    if middle > _SLOW_SECONDS:
        return RedisFinding("redis", "warn", found, "put it nearer; every look-up waits that long")
    return RedisFinding("redis", "ok", found)


def _check_version(facts: Mapping[str, str]) -> RedisFinding:
    if "valkey_version" in facts:
        return RedisFinding("redis version", "ok", f"Valkey {facts['valkey_version']}")
    text = facts.get("redis_version", "unknown")
    numbers = tuple(int(part) for part in text.split(".")[:2] if part.isdigit())
    if numbers < _VERSION_MIN:
        fix = "use Redis 6.2 or newer, or Valkey"
        return RedisFinding("redis version", "fail", f"Redis {text}", fix)
    return RedisFinding("redis version", "ok", f"Redis {text}")


def _check_mode(settings: RedisSettings, facts: Mapping[str, str]) -> RedisFinding:
    is_cluster = facts.get("cluster_enabled") == "1"
    if is_cluster and settings.url.form is not Form.CLUSTER:
        fix = "write redis+cluster:// in the url"
        return RedisFinding("redis mode", "fail", "a node of a cluster", fix)
    if facts.get("role") == "slave":
        fix = "name its master, or its sentinels with redis+sentinel://"
        return RedisFinding("redis mode", "fail", "a replica, which takes no writes", fix)
    return RedisFinding("redis mode", "ok", "a cluster" if is_cluster else "a master")


def _check_memory(facts: Mapping[str, str]) -> RedisFinding:
    limit, policy = int(facts.get("maxmemory", "0")), facts.get("maxmemory_policy", "unknown")
    used = int(facts.get("used_memory", "0"))
    if limit == 0:
        found = f"no maxmemory, {round_size(used)} used"
        fix = "set maxmemory and maxmemory-policy allkeys-lru: it grows until the system ends it"
        return RedisFinding("redis memory", "warn", found, fix)
    found = f"{round_size(used)} of {round_size(limit)} used, {policy}"
    if policy == "noeviction":
        fix = "set maxmemory-policy allkeys-lru: once full, it takes nothing new"
        return RedisFinding("redis memory", "warn", found, fix)
    if policy.endswith("random"):
        return RedisFinding("redis memory", "warn", found, "set maxmemory-policy allkeys-lru")
    return RedisFinding("redis memory", "ok", found)


async def _check_rights(routes: Routes, settings: RedisSettings, *, shares: bool) -> RedisFinding:
    """Use every command once on keys of our own that nobody else uses, and remove them."""
    base = f"{settings.prefix}:doctor:{{{time.time_ns():x}}}".encode()
    text, table = base + b":text", base
    commands: list[Command] = [
        (b"SET", text, b"x", b"NX"),
        (b"PSETEX", text, b"10000", b"x"),
        (b"GET", text),
        (b"STRLEN", text),
        (b"HSET", table, b"field", b"x"),
        (b"HGET", table, b"field"),
        (b"HRANDFIELD", table, b"1", b"WITHVALUES"),
        (b"PEXPIRE", table, b"10000"),
        (b"HDEL", table, b"field"),
        (b"UNLINK", text),
    ]
    rule = f"~{settings.prefix}:* {ACL_COMMANDS}"
    if shares:
        held = base + b":held"
        commands += [
            (b"SADD", held, b"x"),
            (b"SCARD", held),
            (b"SMISMEMBER", held, b"x"),
            (b"SREM", held, b"x"),
        ]
        rule += f" {SHARING_COMMANDS}"
    try:
        replies = await _run(routes, settings, [(b"MULTI",), *commands, (b"EXEC",)], base)
    except (LaneError, RefusedError) as error:
        return RedisFinding("redis rights", "fail", str(error), f"give the user {rule}")
    errors = [it for it in replies if isinstance(it, ReplyError) and it.word != "EXECABORT"]
    if not errors:
        return RedisFinding("redis rights", "ok", f"all that is needed below {settings.prefix}:")
    if errors[0].word == "NOPERM":
        return RedisFinding("redis rights", "fail", str(errors[0]), f"give the user {rule}")
    fix = "raise maxmemory, or set maxmemory-policy allkeys-lru" if errors[0].word == "OOM" else ""
    return RedisFinding("redis rights", "fail", str(errors[0]), fix or "see the server's log")


def examine_redis_now(settings: RedisSettings, *, shares: bool = False) -> list[RedisFinding]:
    """Do the same where no event loop runs."""
    return asyncio.run(examine_redis(settings, shares=shares))

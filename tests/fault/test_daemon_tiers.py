"""A real daemon over real and scripted slower tiers: nothing is lost, wrong, or waited for long."""

from __future__ import annotations

import signal

import pytest

from kvstore.client.sync import Client
from kvstore.errors import RefusedError
from tests.support.daemon import Daemon
from tests.support.making import (
    empty_targets,
    make_digests,
    make_manifest,
    make_payload,
    sources_of,
)
from tests.support.redis import SERVER, RedisServer
from tests.support.waiting import DEADLINE_SECONDS, wait_until

MANIFEST = make_manifest()
# Four times what the host tier holds.
CHUNKS = 128


@pytest.fixture
def settings(tmp_path):
    return {
        "tiers.host.capacity": "1MiB",
        "tiers.disk.path": tmp_path / "disk",
        "tiers.disk.capacity": "64MiB",
        "tiers.disk.write": "through",
    }


def store_all(daemon: Daemon, digests) -> None:
    with daemon.connect() as client:
        space = client.attach(MANIFEST)
        for start in range(0, len(digests), 16):
            batch = digests[start : start + 16]
            parent = digests[start - 1] if start else None
            report = space.store(batch, sources_of(MANIFEST, batch), parent=parent)
            assert report.stored == len(batch)


def load_all(daemon: Daemon, digests) -> None:
    with daemon.connect() as client:
        space = client.attach(MANIFEST)
        # A look-up waits for a server for so long only, and for one that is busy not at all.
        wait_until(lambda: space.lookup(digests).hits == len(digests), what="all are hits")
        for start in range(0, len(digests), 16):
            batch = digests[start : start + 16]
            buffers, targets = empty_targets(MANIFEST, len(batch))
            with space.load(batch) as loaded:
                assert len(loaded) == len(batch)
                loaded.copy_to(targets)
            for digest, buffer in zip(batch, buffers, strict=True):
                assert buffer == make_payload(digest, MANIFEST.chunk_bytes)


@pytest.mark.parametrize("ended_by", [signal.SIGTERM, signal.SIGKILL])
def test_what_disk_was_to_keep_is_served_after_a_restart(tmp_path, settings, ended_by):
    digests = make_digests(CHUNKS)
    with Daemon(tmp_path, settings) as daemon:
        store_all(daemon, digests)
        load_all(daemon, digests)
        stats = daemon.stats()
        disk = next(tier for tier in stats.tiers if tier.tier == "disk")
        assert disk.chunks == CHUNKS
        assert stats.counters["evict_chunks"] > 0
        daemon.end(ended_by)
        daemon.launch()
        daemon.wait_ready()
        load_all(daemon, digests)


def test_a_prefix_larger_than_the_host_tier_is_stored_whole_where_it_is_written_through(
    tmp_path, settings
):
    digests = make_digests(CHUNKS)
    with Daemon(tmp_path, settings) as daemon:
        with daemon.connect() as client:
            space = client.attach(MANIFEST)
            report = space.store(digests, sources_of(MANIFEST, digests))
            assert (report.stored, report.refused, report.volatile) == (CHUNKS, 0, 0)
            assert space.store(digests, sources_of(MANIFEST, digests)).present == CHUNKS
        load_all(daemon, digests)


def test_a_prefix_larger_than_the_host_tier_keeps_its_head_where_nothing_else_has_it(
    tmp_path, settings
):
    digests = make_digests(CHUNKS)
    with (
        Daemon(tmp_path, settings | {"tiers.disk.write": "back"}) as daemon,
        daemon.connect() as it,
    ):
        space = it.attach(MANIFEST)
        report = space.store(digests, sources_of(MANIFEST, digests))
        assert report.stored + report.refused == CHUNKS
        assert 0 < report.stored == space.lookup(digests).hits < CHUNKS


# --- tiers that hosts share -------------------------------------------------------------------


@pytest.fixture
def redis(tmp_path):
    if SERVER is None:
        pytest.skip("redis-server is not installed")
    with RedisServer(tmp_path / "redis") as server:
        yield server


def shared_settings(redis, **changes) -> dict[str, object]:
    return {
        "tiers.host.capacity": "2MiB",
        "tiers.redis.url": redis.url,
        "tiers.redis.write": "through",
        "tiers.redis.timeout": "500ms",
    } | changes


def test_what_one_daemon_has_stored_is_a_hit_at_another(tmp_path, redis):
    digests = make_digests(32)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    theirs.mkdir()
    with (
        Daemon(ours, shared_settings(redis)) as first,
        Daemon(theirs, shared_settings(redis)) as second,
    ):
        store_all(first, digests)
        load_all(second, digests)
        tier = next(tier for tier in second.stats().tiers if tier.tier == "redis")
        assert tier.hit_chunks == len(digests)
        # Of a server that is not ours, what is known here.
        assert tier.capacity_bytes == 0
        assert tier.used_bytes == len(digests) * MANIFEST.chunk_bytes


def test_a_redis_that_is_away_at_start_costs_nothing_and_is_found_later(tmp_path, redis):
    digests = make_digests(8)
    redis.kill()
    with Daemon(tmp_path, shared_settings(redis)) as daemon:
        with daemon.connect() as client:
            space = client.attach(MANIFEST)
            report = space.store(digests, sources_of(MANIFEST, digests))
            assert (report.stored, report.volatile) == (8, 8)
            assert space.lookup(digests).hits == 8
        redis.start()
        wait_until(lambda: redis_tier(daemon).state == "ready", what="redis is found")

        def are_written() -> bool:
            # A use offers the tier what it lacks.
            load_all(daemon, digests)
            return redis_tier(daemon).chunks == 8

        wait_until(are_written, what="chunks are written after all")


def redis_tier(daemon: Daemon):
    return next(tier for tier in daemon.stats().tiers if tier.tier == "redis")


# --- tenants ----------------------------------------------------------------------------------


def test_tenants_do_not_meet_and_only_those_who_may_act_for_one(tmp_path, settings):
    tenants = {"tenants.blue.quota": "512KiB", "tenants.both.shared": "true"}
    digests = make_digests(4)
    with Daemon(tmp_path, settings | tenants) as daemon:
        with connect_as(daemon, "blue") as blue, connect_as(daemon, "both") as both:
            mine, ours = blue.attach(MANIFEST), both.attach(MANIFEST)
            assert mine.store(digests, sources_of(MANIFEST, digests)).stored == 4
            assert ours.lookup(digests).hits == 0
            assert ours.store(digests, sources_of(MANIFEST, digests)).stored == 4
            used = {
                (one.tenant, one.tier): one.chunks for one in both.stats().tenants if one.chunks
            }
            expected = {("blue", "host"), ("blue", "disk"), ("both", "host"), ("both", "disk")}
            assert set(used) == expected
        with daemon.connect() as anybody:
            assert anybody.attach(MANIFEST).lookup(digests).hits == 4
        with pytest.raises(RefusedError, match="may not act for tenant 'red'"):
            connect_as(daemon, "red")
        daemon.end(signal.SIGKILL)
        daemon.launch()
        daemon.wait_ready()
        with connect_as(daemon, "blue") as blue:
            space = blue.attach(MANIFEST)
            assert space.lookup(digests).hits == 4
            more = make_digests(40, prompt=1)
            space.store(more, sources_of(MANIFEST, more))
            own = {one.tier: one for one in blue.stats().tenants if one.tenant == "blue"}
            assert own["host"].used_bytes <= own["host"].quota_bytes == 512 * 1024


def connect_as(daemon: Daemon, tenant: str) -> Client:
    return Client.connect(daemon.socket, tenant=tenant, timeout_seconds=DEADLINE_SECONDS)
